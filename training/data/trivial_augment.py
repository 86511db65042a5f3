"""TrivialAugment (Müller and Hutter 2021): one operation an image, drawn evenly, of a strength drawn evenly.

Batched tensor code: every operation is computed for every image and each keeps its own, so that no value leaves the
device and `torch.compile` sees one shape. Their ranges are those of the paper's wide space, on 8-bit levels; its
``equalize`` is left out, and what moves in is the image reflected at its edge, where the paper has black.

Shape letters: B images of H x W pixels.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

GEOMETRIC = ("shear_x", "shear_y", "translate_x", "translate_y", "rotate")
BLENDS = ("brightness", "colour", "contrast", "sharpness")
OPERATIONS = ("identity", *GEOMETRIC, *BLENDS, "posterize", "solarize", "autocontrast")

_SHEAR, _ROTATE = 0.99, 0.75 * math.pi  # of grid coordinates, which go from -1 to 1
_TRANSLATE = 32  # pixels
_BLEND = 0.99
_BITS = 6  # that posterize takes away at most
_LUMA = (0.299, 0.587, 0.114)  # ITU-R 601-2, as Pillow


def trivial_augment(images: Tensor, operation: Tensor, strength: Tensor) -> Tensor:
    """Change each image by its operation.

    Args:
        images: uint8 or float [B, H, W, 3], 0..255.
        operation: int64 [B], indices into `OPERATIONS`.
        strength: float32 [B], -1..1.

    Returns:
        float32 [B, H, W, 3], 0..255, not rounded.
    """
    pixels = images.permute(0, 3, 1, 2).float()
    amount = strength[:, None, None, None]

    def where(name: str, changed: Tensor, otherwise: Tensor) -> Tensor:
        return torch.where((operation == OPERATIONS.index(name))[:, None, None, None], changed, otherwise)

    result = _move(pixels, operation, strength)
    for name, base in zip(BLENDS, _blend_bases(pixels), strict=True):
        result = where(name, (base + (1 + _BLEND * amount) * (pixels - base)).clamp(0, 255), result)
    step = 2 ** (_BITS * amount.abs()).round()
    result = where("posterize", (pixels / step).floor() * step, result)
    result = where("solarize", torch.where(pixels < 256 * (1 - amount.abs()), pixels, 255 - pixels), result)
    result = where("autocontrast", _autocontrast(pixels), result)
    return result.permute(0, 2, 3, 1)


def _move(pixels: Tensor, operation: Tensor, strength: Tensor) -> Tensor:
    """Shear, translate or rotate those images that are to be; float [B, 3, H, W], bilinear, about the centre."""
    height, width = pixels.shape[2:]
    # The side is 2 in grid coordinates; an image that moved by more would only come back as its own reflection.
    across, along = (2 * min(_TRANSLATE / side, 1) for side in (width, height))
    shear_x, shear_y, right, down, angle = (
        torch.where(operation == OPERATIONS.index(name), strength * most, 0.0)
        for name, most in zip(GEOMETRIC, (_SHEAR, _SHEAR, across, along, _ROTATE), strict=True)
    )
    cosine, sine = angle.cos(), angle.sin()
    y = ((2 * torch.arange(height, device=pixels.device) + 1) / height - 1)[:, None]
    x = (2 * torch.arange(width, device=pixels.device) + 1) / width - 1
    # No matrix product, which autocast would round to eight bits.
    columns = _at(cosine) * x + _at(shear_x - sine) * y + _at(right)
    rows = _at(shear_y + sine) * x + _at(cosine) * y + _at(down)
    grid = torch.stack([columns, rows], dim=-1)
    moved = F.grid_sample(pixels, grid, mode="bilinear", padding_mode="reflection", align_corners=False)
    # Those that stay where they are keep their levels to the last bit.
    stays = (operation == 0) | (operation > len(GEOMETRIC))
    return torch.where(stays[:, None, None, None], pixels, moved)


def _at(number: Tensor) -> Tensor:
    """[B] -> [B, 1, 1]."""
    return number[:, None, None]


def _blend_bases(pixels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What an image is blended with, or pushed away from, in the order of `BLENDS`: black, grey, its mean, a blur."""
    grey = sum(weight * pixels[:, i : i + 1] for i, weight in enumerate(_LUMA))
    assert isinstance(grey, Tensor)
    mean = grey.mean(dim=(1, 2, 3), keepdim=True)
    window = F.avg_pool2d(F.pad(pixels, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    blurred = (9 * window + 4 * pixels) / 13  # Pillow's SMOOTH: ones around a five
    return torch.zeros_like(pixels), grey, mean, blurred


def _autocontrast(pixels: Tensor) -> Tensor:
    """Stretch each channel to 0..255; float [B, 3, H, W]; a channel of one level stays."""
    low, high = pixels.amin((2, 3), keepdim=True), pixels.amax((2, 3), keepdim=True)
    stretched = (255 * (pixels - low) / (high - low).clamp(min=1)).clamp(max=255)
    return torch.where(high > low, stretched, pixels)
