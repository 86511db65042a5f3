"""Corrupted images and near-duplicates, against Pillow and NumPy."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from training.near_duplicates import near_duplicates
from training.robustness import corrupted


def smooth_images(count: int, size: int, seed: int = 0) -> torch.Tensor:
    """uint8 [count, size, size, 3]: enlarged noise, which is as smooth as photographs are."""
    coarse = np.random.default_rng(seed).integers(0, 256, (count, 6, 6, 3), dtype=np.uint8)
    enlarged = [np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC)) for image in coarse]
    return torch.from_numpy(np.stack(enlarged))


def test_each_corruption_is_what_its_name_says() -> None:
    images = smooth_images(20, 32)
    found = dict(corrupted(images))
    pillow = [Image.fromarray(image.numpy()) for image in images]

    def largest_difference(name: str, reference: list[Image.Image], margin: int = 0) -> float:
        wanted = np.stack([np.asarray(image.convert("RGB")) for image in reference]).astype(int)
        difference = np.abs(found[name].numpy().astype(int) - wanted)
        return float(difference[:, margin : 32 - margin, margin : 32 - margin].max())

    def through_jpeg(image: Image.Image) -> Image.Image:
        file = io.BytesIO()
        image.save(file, "JPEG", quality=75)
        return Image.open(file)

    assert largest_difference("greyscale", [image.convert("L") for image in pillow]) <= 1
    assert largest_difference("JPEG of quality 75", [through_jpeg(image) for image in pillow]) <= 1
    blurred = [image.filter(ImageFilter.GaussianBlur(1)) for image in pillow]
    assert (
        largest_difference("blur of standard deviation 1 pixel", blurred, margin=3) <= 6
    )  # Pillow's is an approximation
    turned = [image.rotate(20, Image.Resampling.BICUBIC) for image in pillow]
    assert largest_difference("rotation by 20 degrees", turned, margin=8) <= 1
    noise = found["noise of standard deviation 20 levels"].double() - images.double()
    inside = (images > 80) & (images < 175)  # where nothing is cut off
    assert noise[inside].std().item() == pytest.approx(20, rel=0.05)


def test_corruptions_are_the_same_each_time() -> None:
    images = smooth_images(3, 8)
    state = torch.random.get_rng_state()
    first, second = dict(corrupted(images)), dict(corrupted(images))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("size", [8, 48])
def test_near_duplicates_are_found_by_their_correlation(size: int) -> None:
    trained = smooth_images(9, size)
    others = smooth_images(4, size, seed=1)
    brighter = (trained[2].float() * 0.8 + 40).to(torch.uint8)
    constant = torch.full_like(brighter, 7)
    images = torch.stack([trained[8], others[0], brighter, constant, trained[0].flip(1), *others[1:]])
    assert near_duplicates(images, trained).tolist() == [True, False, True, False, True, False, False, False]


def test_near_duplicates_against_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.near_duplicates.AT_ONCE", 3)
    trained = smooth_images(20, 8)
    share = torch.linspace(0, 1, 10)[:, None, None, None]
    images = (share * trained[:10] + (1 - share) * smooth_images(10, 8, seed=1)).to(torch.uint8)
    found = near_duplicates(images, trained)
    wanted = torch.zeros(len(images), dtype=torch.bool)
    for mirrored in (images, images.flip(2)):
        rows = [split.reshape(len(split), -1).numpy() for split in (mirrored, trained)]
        correlation = np.corrcoef(*rows)[: len(images), len(images) :]
        wanted |= torch.from_numpy((correlation >= 0.9).any(axis=1))
    assert found.tolist() == wanted.tolist()
    assert 0 < found.sum() < 10
