"""What every network of this package is: images to logits, in one view or in two."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from training.config import ModelConfig


class Network(nn.Module):
    """Normalised images to logits: features that a subclass computes, and its ``head``, which classifies them."""

    head: nn.Module

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config

    def forward(self, pixels: Tensor) -> Tensor:
        """Normalised pixels, float [B, 3, image_size, image_size] -> logits, float [B, K].

        With ``test_time_flip``, outside of training, the mean of the image's and its mirror image's (Krizhevsky et
        al. 2012, section 4.1, average the answers to mirrored crops).
        """
        if self.training or not self.config.test_time_flip:
            return self.forward_view(pixels)
        views = torch.stack([pixels, pixels.flip(3)], dim=1).flatten(0, 1)
        return self.forward_view(views).unflatten(0, (-1, 2)).mean(dim=1)

    def forward_with_features(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """`forward` in evaluation, and what the head classifies: float [B, K] and float [B, C].

        The features, `features_of_view`, are with ``test_time_flip`` the mean of both views.
        """
        if not self.config.test_time_flip:
            features = self.features_of_view(pixels)
            return self.head(features), features
        views = torch.stack([pixels, pixels.flip(3)], dim=1).flatten(0, 1)
        features = self.features_of_view(views)
        logits = self.head(features).unflatten(0, (-1, 2)).mean(dim=1)
        return logits, features.unflatten(0, (-1, 2)).mean(dim=1)

    def forward_view(self, pixels: Tensor) -> Tensor:
        """The logits of the pixels as they are; shapes as `forward`'s."""
        return self.head(self.features_of_view(pixels))

    def features_of_view(self, pixels: Tensor) -> Tensor:
        """What the head classifies, of the pixels as they are: float [B, 3, image_size, image_size] -> float [B, C]."""
        raise NotImplementedError


def count_parameters(model: nn.Module) -> int:
    """Trainable parameters of a model."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
