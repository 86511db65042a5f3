"""Images out of distribution: seeded, of the right size, and what each kind promises."""

from __future__ import annotations

import numpy as np
import pytest

from training.out_of_distribution import ALTERED, COUNT, out_of_distribution


def known(count: int, size: int) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


@pytest.mark.parametrize("size", [1, 8, 32, 50])
@pytest.mark.parametrize("count", [1, 100])
def test_every_kind_has_images_of_the_models_size(size: int, count: int) -> None:
    kinds = out_of_distribution(known(count, size))
    assert kinds.keys() > set(ALTERED)
    for kind, images in kinds.items():
        assert images.shape == (min(count, COUNT) if kind in ALTERED else COUNT, size, size, 3)
        assert images.dtype == np.uint8


def test_the_seed_decides() -> None:
    images = known(3, 16)
    first, again, other = (out_of_distribution(images, seed) for seed in (0, 0, 1))
    assert all(np.array_equal(first[kind], again[kind]) for kind in first)
    assert not any(np.array_equal(first[kind], other[kind]) for kind in ("noise", "one colour", "stripes", "text"))


def test_what_each_kind_promises() -> None:
    images = known(20, 32)
    kinds = out_of_distribution(images)
    colours = {kind: [len(np.unique(image.reshape(-1, 3), axis=0)) for image in kinds[kind]] for kind in kinds}
    assert set(colours["one colour"]) == {1}
    assert set(colours["stripes"]) == {2}
    assert min(colours["text"]) > 2  # smooth letters on paper
    assert min(colours["noise"]) > 1000
    np.testing.assert_array_equal(kinds["upside down"], np.rot90(images, 2, axes=(1, 2)))


def test_a_corner_is_a_ninth_of_the_image() -> None:
    # Each quadrant of one grey: only one of them is to be seen afterwards.
    quadrants = np.zeros((30, 30, 30, 3), np.uint8)
    quadrants[:, 15:], quadrants[:, :, 15:] = 90, quadrants[:, :, 15:] + 60
    for image in out_of_distribution(quadrants)["enlarged corner"]:
        assert len(np.unique(image)) == 1
