"""Corruptions against Pillow, image by image, and against what each of them means."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from torch import Tensor

from tests.training.data.test_trivial_augment import smooth_images
from training.config import TrainConfig
from training.data import augment
from training.data.corruption import (
    CORRUPTIONS,
    MAX_BLUR,
    MAX_NOISE,
    MAX_QUALITY,
    MIN_BLUR,
    MIN_QUALITY,
    corrupt,
)


def apply(images: Tensor, name: str, severity: float) -> Tensor:
    count = len(images)
    return corrupt(images, torch.full((count,), CORRUPTIONS.index(name)), torch.full((count,), severity))


def each_by_pillow(images: Tensor, change: object) -> Tensor:
    assert callable(change)
    return torch.from_numpy(np.stack([np.asarray(change(Image.fromarray(each.numpy()))) for each in images])).float()


def as_jpeg(image: Image.Image, quality: int) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Image.open(file)


@pytest.mark.parametrize("quality", [40, 60, 75, 95])
@pytest.mark.parametrize("shape", [(32, 32), (24, 40), (21, 35)])
def test_jpeg_is_what_pillow_decodes_of_its_own_file(quality: int, shape: tuple[int, int]) -> None:
    texture = torch.randint(-30, 31, (16, *shape, 1), generator=torch.Generator().manual_seed(0))
    images = (smooth_images(16, *shape) + texture).clamp(0, 255).to(torch.uint8)
    expected = each_by_pillow(images, lambda image: as_jpeg(image, quality))
    severity = (MAX_QUALITY - quality) / (MAX_QUALITY - MIN_QUALITY)
    error = (apply(images, "jpeg", severity) - expected).abs()
    # libjpeg enlarges chroma by another filter, and rounds to whole levels.
    assert error.mean() < 3
    assert error.mean() < 0.6 * (images - expected).abs().mean()


def test_grey_is_pillows_luma_in_all_channels() -> None:
    images = smooth_images(8)
    expected = each_by_pillow(images, lambda image: image.convert("L").convert("RGB"))
    assert (apply(images, "greyscale", 0.5) - expected).abs().max() <= 1


@pytest.mark.parametrize("sigma", [0.5, 1.0, MAX_BLUR])
def test_blur_is_near_pillows_gaussian(sigma: float) -> None:
    images = smooth_images(8)
    images[:, 10:14, 10:14] = 255
    expected = each_by_pillow(images, lambda image: image.filter(ImageFilter.GaussianBlur(sigma)))
    error = (apply(images, "blur", (sigma - MIN_BLUR) / (MAX_BLUR - MIN_BLUR)) - expected).abs()
    # Pillow approximates a Gaussian by boxes.
    assert error.mean() < 0.5 * (images - expected).abs().mean()


def test_blur_keeps_the_mean_of_an_image_of_one_colour() -> None:
    images = torch.full((2, 9, 12, 3), 77, dtype=torch.uint8)
    torch.testing.assert_close(apply(images, "blur", 1.0), images.float(), rtol=0, atol=1e-3)


@pytest.mark.parametrize("severity", [0.25, 1.0])
def test_noise_has_its_standard_deviation(severity: float) -> None:
    torch.manual_seed(0)
    images = torch.full((16, 32, 32, 3), 128, dtype=torch.uint8)
    difference = apply(images, "noise", severity) - 128
    assert difference.std().item() == pytest.approx(MAX_NOISE * severity, rel=0.02)
    assert difference.mean().abs() < 0.5


@pytest.mark.parametrize("name", CORRUPTIONS[1:])
@pytest.mark.parametrize("severity", [0.0, 1.0])
def test_levels_stay_within_0_and_255(name: str, severity: float) -> None:
    images = torch.randint(0, 2, (8, 32, 32, 3), dtype=torch.uint8) * 255
    changed = apply(images, name, severity)
    assert changed.dtype == torch.float32
    assert changed.min() >= -1e-3
    assert changed.max() <= 255 + 1e-3


def test_each_image_has_its_own() -> None:
    count = len(CORRUPTIONS)
    images, severity = smooth_images(count), torch.linspace(0.2, 1, count)
    torch.manual_seed(0)
    together = corrupt(images, torch.arange(count), severity)
    assert torch.equal(together[0], images[0].float())
    for i, name in enumerate(CORRUPTIONS):
        torch.manual_seed(0)
        alone = apply(images[i : i + 1], name, severity[i].item())
        torch.testing.assert_close(together[i : i + 1], alone)


def test_autocast_changes_nothing() -> None:
    images = smooth_images(8)
    plain = apply(images, "jpeg", 0.4)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(apply(images, "jpeg", 0.4), plain)


def test_a_share_is_drawn_and_each_corruption_as_often() -> None:
    torch.manual_seed(0)
    draws = augment.draw(TrainConfig(corruption=0.4), 20_000)
    shares = torch.bincount(draws.corruption, minlength=len(CORRUPTIONS)) / 20_000
    assert shares[0].item() == pytest.approx(0.6, abs=0.02)
    for share in shares[1:].tolist():
        assert share == pytest.approx(0.1, abs=0.01)
    assert 0 <= draws.severity.min() < 0.01
    assert 0.99 < draws.severity.max() <= 1


def test_without_it_the_other_draws_are_as_before() -> None:
    torch.manual_seed(0)
    without = augment.draw(TrainConfig(trivial_augment=1.0, crop_padding=4), 8)
    torch.manual_seed(0)
    within = augment.draw(TrainConfig(trivial_augment=1.0, crop_padding=4, corruption=0.5), 8)
    for name in ("flip", "shift", "zoom", "operation", "strength"):
        assert torch.equal(getattr(without, name), getattr(within, name))
    assert not without.corruption.any()
