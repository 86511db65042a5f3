"""Masks and maps. The reference is a model whose answer is known for every cover."""

import numpy as np
import pytest

from service.explanation.masks import RUNS, cover, grid_of, heat_map, mean_colour, rise_masks


@pytest.mark.parametrize("size", [(32, 32), (4, 6), (1, 1), (224, 160)])
def test_masks_cover_every_cell_and_are_the_same_each_time(size: tuple[int, int]) -> None:
    masks = rise_masks(grid_of(size))
    assert masks.shape == (RUNS, *grid_of(size))
    assert masks.dtype == np.float32
    assert masks.min() >= 0
    assert masks.max() <= 1
    assert (masks.sum(axis=0) > 0).all()
    assert np.array_equal(masks, rise_masks.__wrapped__(grid_of(size)))


def test_a_cover_changes_what_it_covers_and_nothing_else() -> None:
    image = np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8)
    masks = np.zeros((2, 16, 16), np.float32)
    masks[1, 4, 8] = 1
    nothing, one = cover(image, mean_colour(image), masks)
    assert np.array_equal(nothing, image)
    region = np.zeros((32, 48), bool)
    region[8:10, 24:27] = True
    assert np.array_equal(one[region], mean_colour(image)[region])
    assert np.array_equal(one[~region], image[~region])


def test_the_map_is_highest_where_the_one_cell_lies_that_matters() -> None:
    masks = rise_masks((16, 16))
    drops = masks[:, 5, 11] * np.float32(0.5)
    found = heat_map(masks, drops)
    assert found.shape == grid_of((32, 32))
    row, column = np.unravel_index(found.argmax(), found.shape)
    assert abs(row - 5) <= 1
    assert abs(column - 11) <= 1
    assert found.max() > 4 * abs(np.median(found))
