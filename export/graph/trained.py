"""The model as it was trained, from stored pixels to calibrated logits: the reference for every exported form.

Shape letters: B images, H and W the input size in pixels, K classes.
"""

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from training.model import Perceiver
from training.preprocessing import Preprocess

Images = NDArray[np.uint8]
Logits = NDArray[np.float32]

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


def reference_logits(model: nn.Module, images: Images) -> Logits:
    """Run torch in batches: uint8 [B, H, W, 3] -> float32 [B, K]."""
    with torch.inference_mode():
        batches = [model(batch) for batch in torch.split(torch.from_numpy(images), BATCH_SIZE)]
    logits: Logits = torch.cat(batches).numpy()
    return logits


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
