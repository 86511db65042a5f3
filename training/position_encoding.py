"""Where a token stands, as numbers: Fourier features, and latents that start on a grid of regions."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def fourier_features(grid: int, bands: int) -> Tensor:
    """Fourier position features of a square grid (Perceiver paper, section 3.2).

    Frequencies are spaced evenly from 1 to the Nyquist frequency grid / 2.

    Returns:
        float32 [grid * grid, 2 * (2 * bands + 1)]: sines and cosines of each axis and the coordinates in -1..1.
    """
    axis = torch.linspace(-1, 1, grid) if grid > 1 else torch.zeros(1)
    position = torch.stack(torch.meshgrid(axis, axis, indexing="ij"), dim=-1).reshape(-1, 2)
    angle = math.pi * position[:, :, None] * torch.linspace(1, max(grid / 2, 1), bands)
    return torch.cat([angle.sin().flatten(1), angle.cos().flatten(1), position], dim=1)


def grid_position_bias(heads: int, num_latents: int, grid: int) -> Tensor:
    """Initial scores that give each latent a region of the image and each head a wider view than the last.

    Returns:
        float32 [heads, num_latents, grid * grid]: minus squared distance over twice the head's variance, at least -8.
    """
    side = math.isqrt(num_latents)

    def centres(count: int) -> Tensor:
        axis = (torch.arange(count) + 0.5) / count
        return torch.stack(torch.meshgrid(axis, axis, indexing="ij"), dim=-1).reshape(-1, 2)

    distance = torch.cdist(centres(side), centres(grid)).square()
    width = 0.5 / side * 2.0 ** torch.arange(heads)
    return (-distance / (2 * width[:, None, None].square())).clamp(min=-8.0)
