"""TrivialAugment against Pillow, image by image, and against what each movement means."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor

from training.config import TrainConfig
from training.data import augment
from training.data.trivial_augment import OPERATIONS, trivial_augment


def smooth_images(count: int, height: int = 24, width: int = 32) -> Tensor:
    """uint8 [count, height, width, 3] without hard edges, of which interpolation makes much."""
    small = np.random.default_rng(0).integers(0, 256, (count, 5, 6, 3), dtype=np.uint8)
    large = [Image.fromarray(each).resize((width, height), Image.Resampling.BICUBIC) for each in small]
    return torch.from_numpy(np.stack([np.asarray(each) for each in large]))


def apply(images: Tensor, name: str, strength: float) -> Tensor:
    count = len(images)
    return trivial_augment(images, torch.full((count,), OPERATIONS.index(name)), torch.full((count,), strength))


PILLOW: dict[str, Callable[[Image.Image, float], Image.Image]] = {
    "brightness": lambda image, s: ImageEnhance.Brightness(image).enhance(1 + 0.99 * s),
    "colour": lambda image, s: ImageEnhance.Color(image).enhance(1 + 0.99 * s),
    "contrast": lambda image, s: ImageEnhance.Contrast(image).enhance(1 + 0.99 * s),
    "sharpness": lambda image, s: ImageEnhance.Sharpness(image).enhance(1 + 0.99 * s),
    "posterize": lambda image, s: ImageOps.posterize(image, 8 - round(6 * abs(s))),
    "solarize": lambda image, s: ImageOps.solarize(image, round(256 * (1 - abs(s)))),
    "autocontrast": lambda image, s: ImageOps.autocontrast(image),
}


@pytest.mark.parametrize("strength", [-1.0, -0.4, 0.0, 0.7, 1.0])
@pytest.mark.parametrize("name", PILLOW)
def test_levels_change_as_pillow_changes_them(name: str, strength: float) -> None:
    images = smooth_images(4)
    found = apply(images, name, strength).numpy()
    for image, result in zip(images.numpy(), found, strict=True):
        expected = np.asarray(PILLOW[name](Image.fromarray(image), strength)).astype(float)
        inner = (slice(1, -1), slice(1, -1))  # Pillow does not blur the outermost pixels
        # Pillow rounds what is blended before it blends, and the threshold.
        level = 256 if name == "solarize" else 2.5
        difference = np.abs(result - expected)[inner]
        assert difference.max() <= level
        assert difference.mean() < 1


def test_the_identity_and_a_strength_of_nothing_change_nothing() -> None:
    images = smooth_images(2)
    assert torch.equal(apply(images, "identity", 0.9), images.float())
    for name in set(OPERATIONS) - {"autocontrast"}:
        torch.testing.assert_close(apply(images, name, 0.0), images.float(), atol=0.02, rtol=0)


def test_a_flat_channel_has_no_contrast_to_stretch() -> None:
    flat = torch.full((1, 6, 6, 3), 77, dtype=torch.uint8)
    assert torch.equal(apply(flat, "autocontrast", 0.5), flat.float())


def test_translations_move_by_their_share_of_the_side() -> None:
    images = smooth_images(2)
    right = apply(images, "translate_x", 0.25)  # shows what lies 0.25 * 32 columns further
    torch.testing.assert_close(right[:, :, :24], images[:, :, 8:].float(), atol=0.01, rtol=0)
    down = apply(images, "translate_y", -0.25)
    torch.testing.assert_close(down[:, 6:], images[:, :18].float(), atol=0.01, rtol=0)


def test_a_large_image_moves_by_at_most_32_pixels() -> None:
    images = smooth_images(2, 96, 128)
    right = apply(images, "translate_x", 1.0)
    torch.testing.assert_close(right[:, :, :96], images[:, :, 32:].float(), atol=0.05, rtol=0)
    down = apply(images, "translate_y", -1.0)
    torch.testing.assert_close(down[:, 32:], images[:, :64].float(), atol=0.05, rtol=0)


def test_a_quarter_turn() -> None:
    images = smooth_images(2, 32, 32)
    turned = apply(images, "rotate", 90 / 135)
    torch.testing.assert_close(turned, images.float().rot90(1, (1, 2)), atol=0.05, rtol=0)


def test_shears_move_each_row_in_proportion_to_its_distance_from_the_centre() -> None:
    columns = torch.arange(33.0).expand(1, 33, 33)[..., None].expand(-1, -1, -1, 3)  # brightness is the column
    sheared = apply(columns, "shear_x", 0.3)[0, :, 16, 0]
    torch.testing.assert_close(sheared, 16 + 0.99 * 0.3 * (torch.arange(33.0) - 16), atol=0.01, rtol=0)
    rows = columns.transpose(1, 2)
    sheared = apply(rows, "shear_y", 0.3)[0, 16, :, 0]
    torch.testing.assert_close(sheared, 16 + 0.99 * 0.3 * (torch.arange(33.0) - 16), atol=0.01, rtol=0)


def test_each_image_gets_its_own_operation() -> None:
    count = len(OPERATIONS)
    images = smooth_images(count)
    strength = torch.linspace(-1, 1, count)
    together = trivial_augment(images, torch.arange(count), strength)
    for i, name in enumerate(OPERATIONS):
        torch.testing.assert_close(together[i], apply(images[i : i + 1], name, strength[i].item())[0])
    assert together.min() > -1e-3  # interpolation rounds
    assert together.max() < 255.001


@pytest.mark.parametrize("name", OPERATIONS)
def test_autocast_rounds_nothing(name: str) -> None:
    images = smooth_images(2)
    with torch.autocast("cpu", torch.bfloat16):
        found = apply(images, name, 0.6)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, apply(images, name, 0.6), atol=1e-3, rtol=0)


def test_what_is_drawn() -> None:
    torch.manual_seed(0)
    draws = augment.draw(TrainConfig(trivial_augment=0.5), 13_000)
    counts = torch.bincount(draws.operation, minlength=len(OPERATIONS))
    assert counts.shape == (len(OPERATIONS),)
    assert counts.min() > 850
    assert draws.strength.abs().max() <= 0.5
    assert draws.strength.min() < -0.49
    assert draws.strength.max() > 0.49


def test_runs_without_it_keep_their_sequence() -> None:
    """What they draw after it must not move: a run of before goes on as it began."""

    def drawn(strength: float) -> float:
        torch.manual_seed(0)
        draws = augment.draw(TrainConfig(trivial_augment=strength), 8)
        assert strength or not draws.operation.any()
        return torch.rand(()).item()

    torch.manual_seed(0)
    torch.rand(8), torch.randint(0, 1, (8, 2)), torch.rand(8, 2)
    before = torch.rand(()).item()
    assert drawn(0.0) == before
    assert drawn(1.0) != drawn(0.0)
