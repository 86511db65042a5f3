"""Random masks that cover parts of an image, and the heat map that the model's answers to them make.

RISE (Petsiuk et al. 2018, arXiv:1806.07421): it needs the model's output alone, so it holds for every model folder. How
it was chosen: docs/experiments/explanations.md. Shape letters: R masks, G and K rows and columns of the grid on which
masks and map are drawn, H and W of the image.
"""

from functools import lru_cache
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Pixels = NDArray[np.uint8]
Grid = NDArray[np.float32]

METHOD: Final = "rise"
RUNS: Final = 128  # masks; more make a smoother map
CELLS: Final = 6  # of a mask, along each side; each is covered or not
COVERED: Final = 0.5  # share of them that is
MAX_GRID: Final = 16  # rows or columns
SEED: Final = 0  # the same image has the same map


def grid_of(size: tuple[int, int]) -> tuple[int, int]:
    """Return (G, K) for an image of (H, W)."""
    return min(MAX_GRID, size[0]), min(MAX_GRID, size[1])


@lru_cache(maxsize=4)
def rise_masks(grid: tuple[int, int], runs: int = RUNS, cells: int = CELLS) -> Grid:
    """Draw coarse masks, enlarged smoothly and shifted by a part of a cell: float32 [R, G, K], 1 is covered."""
    random = np.random.default_rng(SEED)
    masks = np.empty((runs, *grid), np.float32)
    height, width = ((n * (cells + 1)) // cells for n in grid)
    for mask in masks:
        coarse = (random.random((cells + 1, cells + 1)) < COVERED).astype(np.float32)
        fine = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BILINEAR))
        top, left = random.integers(0, height - grid[0] + 1), random.integers(0, width - grid[1] + 1)
        mask[:] = fine[top : top + grid[0], left : left + grid[1]]
    return masks


def mean_colour(image: Pixels) -> Pixels:
    """Return what stands where an image, uint8 [H, W, 3], is covered: its mean colour, in an image of that shape."""
    colour: Pixels = image.mean((0, 1), keepdims=True).round().astype(np.uint8)
    return np.broadcast_to(colour, image.shape)


def cover(image: Pixels, fill: Pixels, masks: Grid) -> Pixels:
    """Blend an image and its filling, uint8 [H, W, 3] both, by masks, [R, G, K]: uint8 [R, H, W, 3], contiguous."""
    (height, width), (rows, columns) = image.shape[:2], masks.shape[1:]
    by_row, by_column = np.arange(height) * rows // height, np.arange(width) * columns // width
    weights = masks[:, by_row[:, None], by_column, None]
    covered: Pixels = (image + weights * (fill.astype(np.float32) - image)).round().astype(np.uint8, order="C")
    return covered


def heat_map(masks: Grid, drops: NDArray[np.float32]) -> Grid:
    """Return how much more the probability falls where a cell is covered than where it is not: float32 [G, K].

    Args:
        masks: [R, G, K].
        drops: [R], of the probability under each mask.
    """
    covered = np.tensordot(drops, masks, 1) / masks.sum(axis=0)
    kept = np.tensordot(drops, 1 - masks, 1) / (1 - masks).sum(axis=0)
    difference: Grid = (covered - kept).astype(np.float32)
    return difference
