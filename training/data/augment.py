"""Augmentation as batched tensor code on the device that holds the images.

Everything random is drawn first (`draw`, `draw_mix`), from torch's global CPU generator, and applied after: the draws
of a batch can then be cut into the shares of several processes, and a seeded step always sees the same images.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torch.nn import functional as F

from training.config import TrainConfig
from training.data.corruption import CORRUPTIONS
from training.data.trivial_augment import OPERATIONS

RATIO = 16 / 9  # of the widest ratio to the narrowest: 4:3 and 3:4


@dataclass(frozen=True)
class Draws:
    """The random numbers of B images.

    Attributes:
        flip: bool [B].
        shift: int64 [B, 2], rows and columns, pixels.
        zoom: float32 [B, 2], height and width; above 1 shows more than the image, below 1 less.
        crop: float32 [B, 4], first row and column, height and width, shares of the image's.
        operation: int64 [B], of `training.data.trivial_augment.OPERATIONS`.
        strength: float32 [B], -1..1, of the operation.
        corruption: int64 [B], of `training.data.corruption.CORRUPTIONS`.
        severity: float32 [B], 0..1, of the corruption.
    """

    flip: Tensor
    shift: Tensor
    zoom: Tensor
    crop: Tensor
    operation: Tensor
    strength: Tensor
    corruption: Tensor
    severity: Tensor

    def share(self, part: slice, device: torch.device) -> Draws:
        """The draws of some of the images, on ``device``."""
        return Draws(*(getattr(self, f.name)[part].to(device, non_blocking=True) for f in fields(self)))


def draw(config: TrainConfig, count: int) -> Draws:
    """Draw for ``count`` images what ``config`` asks for."""
    flip = torch.rand(count) < (0.5 if config.flip else 0.0)
    shift = torch.randint(-config.crop_padding, config.crop_padding + 1, (count, 2))
    zoom = 1 + (torch.rand(count, 2) * 2 - 1) * config.zoom
    operation, strength = torch.zeros(count, dtype=torch.int64), torch.zeros(count)
    # Drawn only where it is used: runs without it keep their sequence.
    if config.trivial_augment:
        operation = torch.randint(len(OPERATIONS), (count,))
        strength = (torch.rand(count) * 2 - 1) * config.trivial_augment
    corruption, severity = torch.zeros(count, dtype=torch.int64), torch.zeros(count)
    if config.corruption:
        corruption = torch.randint(1, len(CORRUPTIONS), (count,)) * (torch.rand(count) < config.corruption)
        severity = torch.rand(count)
    crop = (
        draw_crops(count, config.random_crop) if config.random_crop else torch.tensor([0.0, 0, 1, 1]).repeat(count, 1)
    )
    return Draws(flip, shift, zoom, crop, operation, strength, corruption, severity)


def draw_crops(count: int, smallest: float) -> Tensor:
    """Draw crops of an even area and an even logarithm of the ratio of their sides (Szegedy et al. 2015).

    Args:
        count: images.
        smallest: area, as a share of the image's.

    Returns:
        float32 [count, 4], as `Draws.crop`.
    """
    area = smallest + (1 - smallest) * torch.rand(count)
    stretch = (RATIO ** ((torch.rand(count) - 0.5) / 2)).clamp(
        area.sqrt(), 1 / area.sqrt()
    )  # no side longer than the image's
    sides = torch.stack([area.sqrt() * stretch, area.sqrt() / stretch], dim=1)
    return torch.cat([torch.rand(count, 2) * (1 - sides), sides], dim=1)


def flip_and_shift(images: Tensor, draws: Draws) -> Tensor:
    """Mirror and move images in one gather; what moves in is the image reflected at its edge.

    Args:
        images: uint8 [B, H, W, 3].
        draws: of the same B; shifts are smaller than H and W.

    Returns:
        uint8 [B, H, W, 3]: row i shows row ``i + shift`` of the image, columns likewise, mirrored after the move.
    """
    height, width = images.shape[1:3]
    rows = reflect(torch.arange(height, device=images.device) + draws.shift[:, :1], height)
    columns = reflect(torch.arange(width, device=images.device) + draws.shift[:, 1:], width)
    columns = torch.where(draws.flip[:, None], columns.flip(1), columns)
    batch = torch.arange(len(images), device=images.device)
    return images[batch[:, None, None], rows[:, :, None], columns[:, None, :]]


def reflect(index: Tensor, size: int) -> Tensor:
    """Fold indices at most ``size - 1`` outside 0..size-1 back in, without repeating the edge."""
    index = index.abs()
    return torch.where(index >= size, 2 * (size - 1) - index, index)


def crop(pixels: Tensor, draws: Draws) -> Tensor:
    """Enlarge a part of each image to all of it, bilinear.

    Args:
        pixels: float [B, 3, H, W].
        draws: of the same B.
    """
    theta = pixels.new_zeros(len(pixels), 2, 3)
    (top, left), (height, width) = draws.crop[:, :2].T, draws.crop[:, 2:].T
    theta[:, 0, 0], theta[:, 0, 2] = width, 2 * left + width - 1
    theta[:, 1, 1], theta[:, 1, 2] = height, 2 * top + height - 1
    return _sample(pixels, theta)


def zoom(pixels: Tensor, draws: Draws) -> Tensor:
    """Zoom height and width independently about the centre, bilinear, edges reflected (Keras' ``RandomZoom``).

    Args:
        pixels: float [B, 3, H, W].
        draws: of the same B.
    """
    theta = pixels.new_zeros(len(pixels), 2, 3)
    theta[:, 0, 0] = draws.zoom[:, 1]
    theta[:, 1, 1] = draws.zoom[:, 0]
    return _sample(pixels, theta)


def _sample(pixels: Tensor, theta: Tensor) -> Tensor:
    """float [B, 3, H, W] where an affine map, float [B, 2, 3] of coordinates -1..1, leads; edges reflected."""
    # A matrix product, which autocast would round to eight bits: up to a fifth of a pixel of 64.
    with torch.autocast(pixels.device.type, enabled=False):
        grid = F.affine_grid(theta, list(pixels.shape), align_corners=False)
    return F.grid_sample(pixels, grid, mode="bilinear", padding_mode="reflection", align_corners=False)


def draw_mix(config: TrainConfig, size: int) -> Tensor | None:
    """Draw mixup (Zhang et al. 2018) or CutMix (Yun et al. 2019) for one batch, or nothing.

    Args:
        config: alphas of the two and how often a batch is mixed; where both are on, each gets half of these batches.
        size: height and width of the pixels that will be mixed.

    Returns:
        float32 [size, size], the neighbour's share in each pixel: one number for mixup, a box of ones for CutMix. A
        tensor and no number, since `torch.compile` would compile anew for every number.
    """
    methods = [(alpha, cut) for alpha, cut in ((config.mixup, False), (config.cutmix, True)) if alpha > 0]
    if not methods or torch.rand(()).item() >= config.mix_probability:
        return None
    alpha, cut = methods[int(torch.randint(len(methods), ()).item())]
    own_share = torch.distributions.Beta(alpha, alpha).sample().item()
    if not cut:
        return torch.full((size, size), 1 - own_share)
    side = (1 - own_share) ** 0.5
    top, left = (torch.rand(2) * (1 - side)).tolist()
    weight = torch.zeros(size, size)
    weight[round(top * size) : round((top + side) * size), round(left * size) : round((left + side) * size)] = 1
    return weight


def mix(pixels: Tensor, weight: Tensor) -> Tensor:
    """Mix each image with the one before it in the batch (of this process, where there are several).

    Args:
        pixels: float [B, 3, H, W].
        weight: float [H, W], the neighbour's share, of which the mean is its share in the target.
    """
    return pixels.lerp(pixels.roll(1, 0), weight.to(pixels.dtype))


def mixed_cross_entropy(logits: Tensor, labels: Tensor, weight: Tensor | None, smoothing: float) -> Tensor:
    """Mean cross-entropy of images mixed by ``weight``, the targets mixed in the same shares.

    Args:
        logits: float [B, K].
        labels: int64 [B].
        weight: what `mix` took; None where nothing was mixed.
        smoothing: label smoothing.
    """
    own = F.cross_entropy(logits, labels, label_smoothing=smoothing)
    if weight is None:
        return own
    return own.lerp(F.cross_entropy(logits, labels.roll(1, 0), label_smoothing=smoothing), weight.mean())
