"""The model as it was trained, from stored pixels to calibrated logits: the reference for every exported form.

Shape letters: B images, H and W the input size in pixels, K classes, C the width of the latents.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from training.model import Perceiver
from training.preprocessing import Preprocess

Images = NDArray[np.uint8]
Logits = NDArray[np.float32]
Features = NDArray[np.float32]

BATCH_SIZE = 100


class TrainedModel(nn.Module):
    """Preprocess, Perceiver and temperature in one module."""

    def __init__(self, preprocess: Preprocess, model: Perceiver, temperature: float = 1.0) -> None:
        super().__init__()
        self.preprocess = preprocess
        self.model = model
        self.temperature = temperature

    def forward(self, images: Tensor) -> Tensor:
        """Map uint8 [B, H, W, 3], RGB, to calibrated logits, float [B, K]."""
        logits: Tensor = self.model(self.preprocess(images))
        return logits / self.temperature

    def with_features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Map images as `forward` to calibrated logits, [B, K], and to features, float [B, C]."""
        logits, features = self.model.forward_with_features(self.preprocess(images))
        return logits / self.temperature, features


class WithFeatures(nn.Module):
    """A form of the model as it is exported: its forward returns logits and features.

    Args:
        form: has a method `with_features`.
    """

    form: Any

    def __init__(self, form: nn.Module) -> None:
        super().__init__()
        self.form = form

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Map uint8 [B, H, W, 3], RGB, to calibrated logits, [B, K], and features, [B, C]."""
        result: tuple[Tensor, Tensor] = self.form.with_features(images)
        return result


def reference_logits(model: nn.Module, images: Images) -> Logits:
    """Run torch in batches: uint8 [B, H, W, 3] -> float32 [B, K]."""
    with torch.inference_mode():
        batches = [model(batch) for batch in torch.split(torch.from_numpy(images), BATCH_SIZE)]
    logits: Logits = torch.cat(batches).numpy()
    return logits


def reference_features(trained: TrainedModel, images: Images) -> Features:
    """Run torch in batches: uint8 [B, H, W, 3] -> float32 [B, C]."""
    with torch.inference_mode():
        batches = [trained.with_features(batch)[1] for batch in torch.split(torch.from_numpy(images), BATCH_SIZE)]
    features: Features = torch.cat(batches).numpy()
    return features


def cached_reference(model: nn.Module) -> Callable[[Images], Logits]:
    """Return `reference_logits` of a model that runs once for equal images: edge batches repeat for every file."""
    cache: dict[bytes, Logits] = {}

    def reference(images: Images) -> Logits:
        key = images.tobytes()
        if key not in cache:
            cache[key] = reference_logits(model, images)
        return cache[key]

    return reference


def count_flops(model: nn.Module, image: Tensor) -> int:
    """Count the floating-point operations of matrix products and convolutions for one image, 2 a multiply-add.

    Args:
        model: any form of the model; it is run once.
        image: uint8 [1, H, W, 3].
    """
    with FlopCounterMode(display=False) as counter:
        model(image)
    return int(counter.get_total_flops())
