"""The network that a configuration describes."""

from __future__ import annotations

from training.config import ModelConfig
from training.model import Perceiver
from training.network import Network
from training.residual_network import ResidualNetwork


def build_model(config: ModelConfig) -> Network:
    """Build a network with random weights, which torch's generator draws."""
    return (Perceiver if config.network == "perceiver" else ResidualNetwork)(config)
