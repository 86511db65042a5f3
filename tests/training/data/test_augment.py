"""Augmentation against NumPy, image by image; what the draws are; mixed images and their targets."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from training.config import TrainConfig
from training.data import augment
from training.data.augment import Draws
from training.state import seed_step

CPU = torch.device("cpu")


def random_images(count: int, height: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, height, width, 3), dtype=torch.uint8, generator=generator)


def draws_of(count: int, **changes: Tensor) -> Draws:
    """Draws that change nothing, but for what is given."""
    nothing = {
        "flip": torch.zeros(count, dtype=torch.bool),
        "shift": torch.zeros(count, 2, dtype=torch.int64),
        "zoom": torch.ones(count, 2),
        "crop": torch.tensor([0.0, 0, 1, 1]).repeat(count, 1),
        "operation": torch.zeros(count, dtype=torch.int64),
        "strength": torch.zeros(count),
        "corruption": torch.zeros(count, dtype=torch.int64),
        "severity": torch.zeros(count),
    }
    return Draws(**(nothing | changes))


# --- flip and shift


@pytest.mark.parametrize(("height", "width", "reach"), [(8, 8, 3), (8, 8, 7), (5, 9, 4), (1, 1, 0)])
def test_flip_and_shift_are_a_crop_of_the_reflected_image(height: int, width: int, reach: int) -> None:
    shifts = [(row, column) for row in range(-reach, reach + 1) for column in range(-reach, reach + 1)] * 2
    flips = [index % 2 == 1 for index in range(len(shifts) // 2)] + [
        index % 2 == 0 for index in range(len(shifts) // 2)
    ]
    images = random_images(len(shifts), height, width)
    draws = draws_of(len(shifts), flip=torch.tensor(flips), shift=torch.tensor(shifts))
    moved = augment.flip_and_shift(images, draws)
    assert moved.dtype == torch.uint8
    for image, flip, (row, column), result in zip(images.numpy(), flips, shifts, moved.numpy(), strict=True):
        padded = np.pad(image, ((reach, reach), (reach, reach), (0, 0)), mode="reflect")
        expected = padded[reach + row :, reach + column :][:height, :width]
        np.testing.assert_array_equal(result, expected[:, ::-1] if flip else expected)


# --- crops


def test_a_crop_is_the_enlarged_part_of_the_image() -> None:
    pixels = torch.rand(3, 3, 12, 12)
    whole, quarter, wide = (
        torch.tensor([0.0, 0, 1, 1]),
        torch.tensor([0.5, 0.25, 0.5, 0.5]),
        torch.tensor([0.25, 0, 0.5, 1]),
    )
    cropped = augment.crop(pixels, draws_of(3, crop=torch.stack([whole, quarter, wide])))
    torch.testing.assert_close(cropped[0], pixels[0])
    for image, result, (rows, columns) in (
        (pixels[1], cropped[1], (slice(6, 12), slice(3, 9))),
        (pixels[2], cropped[2], (slice(3, 9), slice(0, 12))),
    ):
        wanted = torch.nn.functional.interpolate(image[None, :, rows, columns], size=12, mode="bilinear")[0]
        torch.testing.assert_close(result[:, 2:-2, 2:-2], wanted[:, 2:-2, 2:-2])


def test_crops_lie_in_the_image_and_keep_what_they_have_to() -> None:
    seed_step(0)
    crops = augment.draw(TrainConfig(random_crop=0.25), 5000).crop
    top, left, height, width = crops.T
    area = height * width
    assert crops.min() >= 0
    assert (top + height).max() <= 1 + 1e-6
    assert (left + width).max() <= 1 + 1e-6
    assert 0.25 - 1e-6 <= area.min() < 0.26
    assert area.max() > 0.99
    ratio = height / width
    assert 0.75 - 1e-4 <= ratio.min() < 0.77
    assert 1.3 < ratio.max() <= 4 / 3 + 1e-4
    assert augment.draw(TrainConfig(), 2).crop.tolist() == [[0, 0, 1, 1]] * 2


# --- zoom


def keras_coordinate(coordinate: NDArray[np.float64], size: int) -> NDArray[np.float64]:
    """Where TensorFlow's ImageProjectiveTransformV3 reads for fill mode "reflect" (dcba|abcd|dcba)."""
    period = 2 * size
    low = np.where(coordinate < -size, coordinate + period, -coordinate - 1)
    high = np.where(coordinate >= size, period - coordinate - 1, coordinate)
    mapped = np.where(coordinate < 0, low, np.where(coordinate > size - 1, high, coordinate))
    return np.clip(mapped, 0, size - 1)


def keras_zoom(image: NDArray[np.float64], height_zoom: float, width_zoom: float) -> NDArray[np.float64]:
    """Keras' RandomZoom of one image [H, W, C]: its zoom matrix, then bilinear interpolation."""
    axes = []
    for size, factor in zip(image.shape[:2], (height_zoom, width_zoom), strict=True):
        offset = (size - 1) / 2 * (1 - factor)
        position = keras_coordinate(factor * np.arange(size) + offset, size)
        below = np.floor(position).astype(int)
        axes.append((below, np.minimum(below + 1, size - 1), position - below))
    (top, bottom, y), (left, right, x) = axes
    y, x = y[:, None, None], x[None, :, None]
    upper = image[top][:, left] * (1 - x) + image[top][:, right] * x
    lower = image[bottom][:, left] * (1 - x) + image[bottom][:, right] * x
    return upper * (1 - y) + lower * y


@pytest.mark.parametrize(("height", "width"), [(8, 8), (7, 12), (64, 64)])
def test_zoom_is_that_of_keras(height: int, width: int) -> None:
    factors = [(1.2, 1.2), (0.8, 0.8), (1.2, 0.8), (0.83, 1.17), (1.0, 1.0), (1.99, 0.01), (1.4, 1.6)]
    images = np.random.default_rng(0).normal(size=(len(factors), height, width, 3))
    draws = draws_of(len(factors), zoom=torch.tensor(factors, dtype=torch.float64))
    zoomed = augment.zoom(torch.from_numpy(images).permute(0, 3, 1, 2), draws).permute(0, 2, 3, 1)
    for image, (height_zoom, width_zoom), result in zip(images, factors, zoomed.numpy(), strict=True):
        np.testing.assert_allclose(result, keras_zoom(image, height_zoom, width_zoom), atol=1e-9)


def test_zoom_is_not_rounded_by_autocast() -> None:
    torch.manual_seed(0)
    draws, pixels = augment.draw(TrainConfig(zoom=0.2), 4), torch.rand(4, 3, 64, 64)
    with torch.autocast("cpu", torch.bfloat16):
        zoomed = augment.zoom(pixels, draws)
    assert torch.equal(zoomed, augment.zoom(pixels, draws))


# --- draws


def test_draws_cover_what_is_asked_for() -> None:
    torch.manual_seed(0)
    draws = augment.draw(TrainConfig(flip=True, crop_padding=2, zoom=0.2), 4000)
    assert draws.flip.double().mean() == pytest.approx(0.5, abs=0.04)
    values, counts = draws.shift.unique(return_counts=True)
    assert values.tolist() == [-2, -1, 0, 1, 2]
    assert (counts - 1600).abs().max() < 200
    assert 0.8 <= draws.zoom.min() < 0.805
    assert 1.195 < draws.zoom.max() <= 1.2
    assert draws.zoom.mean() == pytest.approx(1, abs=0.01)
    # Rows and columns are drawn independently.
    assert abs(np.corrcoef(draws.zoom.T)[0, 1]) < 0.06
    assert abs(np.corrcoef(draws.shift.T)[0, 1]) < 0.06


def test_nothing_changes_when_all_is_off() -> None:
    draws = augment.draw(TrainConfig(flip=False, zoom=0, crop_padding=0), 6)
    images = random_images(6, 8, 8)
    assert torch.equal(augment.flip_and_shift(images, draws), images)
    pixels = torch.randn(6, 3, 8, 8)
    torch.testing.assert_close(augment.zoom(pixels, draws), pixels, atol=1e-5, rtol=0)
    assert augment.draw_mix(TrainConfig(), 8) is None


def test_a_step_draws_the_same_again_and_another_step_does_not() -> None:
    config = TrainConfig(crop_padding=4, zoom=0.2, mixup=0.2, mix_probability=1)

    def drawn(seed: int, step: int) -> list[Tensor]:
        seed_step(seed, step)
        draws = augment.draw(config, 16)
        weight = augment.draw_mix(config, 8)
        assert weight is not None
        return [draws.flip, draws.shift, draws.zoom, weight]

    again = zip(drawn(3, 5), drawn(3, 5), strict=True)
    assert all(torch.equal(a, b) for a, b in again)
    for other in (drawn(3, 6), drawn(4, 5)):
        assert not any(torch.equal(a, b) for a, b in zip(drawn(3, 5), other, strict=True))


def test_shares_of_a_batch_make_up_its_draws() -> None:
    draws = augment.draw(TrainConfig(crop_padding=4, zoom=0.2), 16)
    parts = [draws.share(slice(start, start + 4), CPU) for start in range(0, 16, 4)]
    for name in ("flip", "shift", "zoom"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(draws, name))


# --- mixing


def drawn_weights(**changes: object) -> list[Tensor | None]:
    torch.manual_seed(0)
    config = TrainConfig.model_validate(changes)
    return [augment.draw_mix(config, 16) for _ in range(400)]


def is_box(weight: Tensor) -> bool:
    """Ones in a rectangle, zeros elsewhere."""
    rows, columns = weight.amax(1), weight.amax(0)
    return torch.equal(weight, torch.outer(rows, columns)) and bool(((weight == 0) | (weight == 1)).all())


def test_mixup_draws_one_share_for_all_pixels() -> None:
    weights = drawn_weights(mixup=1.0, mix_probability=1)
    assert all(weight is not None and weight.min() == weight.max() for weight in weights)
    shares = torch.tensor([float(weight[0, 0]) for weight in weights if weight is not None])
    assert shares.mean() == pytest.approx(0.5, abs=0.06)
    assert shares.var() == pytest.approx(1 / 12, abs=0.015)  # Beta(1, 1) is uniform


def test_cutmix_draws_boxes() -> None:
    weights = [weight for weight in drawn_weights(cutmix=1.0, mix_probability=1) if weight is not None]
    assert len(weights) == 400
    assert all(is_box(weight) for weight in weights)
    areas = torch.tensor([float(weight.mean()) for weight in weights])
    assert areas.mean() == pytest.approx(0.5, abs=0.06)
    # The box lies anywhere: on the whole its rows and columns are covered alike, corners least.
    covered = torch.stack(weights).mean(0)
    assert covered[0, 0] > 0.1
    torch.testing.assert_close(covered, covered.flip(0, 1), atol=0.12, rtol=0)


def test_batches_are_mixed_as_often_as_asked_for() -> None:
    assert sum(weight is not None for weight in drawn_weights(mixup=1.0, mix_probability=0.25)) / 400 == pytest.approx(
        0.25, abs=0.07
    )
    assert all(weight is None for weight in drawn_weights(mixup=1.0, cutmix=1.0, mix_probability=0))
    both = [weight for weight in drawn_weights(mixup=1.0, cutmix=1.0, mix_probability=1) if weight is not None]
    assert sum(is_box(weight) for weight in both) / 400 == pytest.approx(0.5, abs=0.08)


def test_cutmix_takes_the_box_from_the_image_before() -> None:
    pixels = torch.randn(4, 3, 16, 16)
    weight = torch.zeros(16, 16)
    weight[2:7, 9:16] = 1
    mixed = augment.mix(pixels, weight)
    for i in range(4):
        expected = pixels[i].clone()
        expected[:, 2:7, 9:16] = pixels[i - 1][:, 2:7, 9:16]
        assert torch.equal(mixed[i], expected)


def test_mixup_adds_the_shares() -> None:
    pixels = torch.randn(4, 3, 16, 16)
    mixed = augment.mix(pixels, torch.full((16, 16), 0.3))
    torch.testing.assert_close(mixed, 0.7 * pixels + 0.3 * pixels[[3, 0, 1, 2]])


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_is_cross_entropy_with_mixed_targets(smoothing: float) -> None:
    logits, labels = torch.randn(5, 4, dtype=torch.float64), torch.tensor([0, 3, 1, 1, 2])
    weight = torch.zeros(16, 16, dtype=torch.float64)
    weight[:4, :8] = 1  # an eighth of the image
    one_hot = np.eye(4)[labels]
    targets = 7 / 8 * one_hot + 1 / 8 * np.roll(one_hot, 1, axis=0)
    log_p = logits.log_softmax(-1).numpy()

    def expected(targets: NDArray[np.float64]) -> float:
        smooth = (1 - smoothing) * targets + smoothing / 4
        return float(-(smooth * log_p).sum(axis=1).mean())

    assert augment.mixed_cross_entropy(logits, labels, weight, smoothing).item() == pytest.approx(expected(targets))
    assert augment.mixed_cross_entropy(logits, labels, None, smoothing).item() == pytest.approx(expected(one_hot))
