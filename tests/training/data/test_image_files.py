"""What training reads from files of a folder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from imaging.resize import resize_images
from training.data import image_files
from training.data.dataset import DataError
from training.data.image_files import read_image, read_images

PATTERN = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)


def read_one(folder: Path) -> np.ndarray:
    """The folder's only image, uint8 [8, 8, 3]."""
    (path,) = folder.iterdir()
    return read_image(path, 8)


@pytest.mark.parametrize("name", ["a.png", "a.bmp", "a.tif", "a.webp"])
def test_a_image_of_the_right_size_passes_untouched(tmp_path: Path, name: str) -> None:
    Image.fromarray(PATTERN).save(tmp_path / name, **({"lossless": True} if name == "a.webp" else {}))
    np.testing.assert_array_equal(read_one(tmp_path), PATTERN)


@pytest.mark.parametrize("size", [(20, 10), (10, 20)])
def test_another_size_is_cropped_to_its_centre(tmp_path: Path, size: tuple[int, int]) -> None:
    # Grey in the centred square, white around it: of the white only a trace comes over the edges.
    pixels = np.full((size[1], size[0], 3), 255, np.uint8)
    top, left = (size[1] - 10) // 2, (size[0] - 10) // 2
    pixels[top : top + 10, left : left + 10] = 90
    Image.fromarray(pixels).save(tmp_path / "a.png")
    np.testing.assert_allclose(read_one(tmp_path), 90, atol=6)


def test_another_size_is_resized_by_the_bicubic_filter(tmp_path: Path) -> None:
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (20, 30, 3), dtype=np.uint8))
    image.save(tmp_path / "a.png")
    expected = image.resize((8, 8), Image.Resampling.BICUBIC, box=(5, 0, 25, 20))
    np.testing.assert_array_equal(read_one(tmp_path), np.asarray(expected))


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1), (7, 8), (9, 8)])
def test_any_size_is_brought_to_the_right_one(tmp_path: Path, size: tuple[int, int]) -> None:
    Image.new("RGB", size, (10, 20, 30)).save(tmp_path / "a.png")
    read = read_one(tmp_path)
    assert read.shape == (8, 8, 3)
    assert (read == (10, 20, 30)).all()


def test_exif_orientation_is_honoured(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright: turn by 90 degrees clockwise
    Image.fromarray(PATTERN).save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(read_one(tmp_path), np.rot90(PATTERN, -1))


def test_transparency_stands_on_white(tmp_path: Path) -> None:
    pixels = np.dstack([PATTERN, np.full((8, 8), 255, np.uint8)])
    pixels[0, 0, 3] = 0
    pixels[0, 1] = (0, 100, 200, 127)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    read = read_one(tmp_path)
    assert read[0, 0].tolist() == [255, 255, 255]
    np.testing.assert_allclose(read[0, 1], [128, 178, 228], atol=1)
    np.testing.assert_array_equal(read[1:], PATTERN[1:])


def test_a_transparent_palette_stands_on_white(tmp_path: Path) -> None:
    image = Image.new("P", (8, 8), 1)
    image.putpalette([200, 0, 0, 0, 100, 50])
    image.putpixel((0, 0), 0)
    image.save(tmp_path / "a.png", transparency=0)
    read = read_one(tmp_path)
    assert read[0, 0].tolist() == [255, 255, 255]
    assert read[4, 4].tolist() == [0, 100, 50]


def test_sixteen_bits_are_scaled(tmp_path: Path) -> None:
    levels = np.full((8, 8), 65535, np.uint16)
    levels[0, :4] = [0, 257, 128, 32768]
    Image.fromarray(levels).save(tmp_path / "a.png")
    read = read_one(tmp_path)
    assert read[0, :, 0].tolist() == [0, 1, 0, 128, 255, 255, 255, 255]
    assert (read == read[..., :1]).all()


@pytest.mark.parametrize("mode", ["1", "L", "LA", "CMYK"])
def test_other_modes_become_rgb(tmp_path: Path, mode: str) -> None:
    name = "a.tif" if mode == "CMYK" else "a.png"
    Image.new("RGB", (8, 8), "white").convert(mode).save(tmp_path / name)
    assert (read_one(tmp_path) == 255).all()


def test_the_first_frame_of_an_animation_is_taken(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert read_one(tmp_path)[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize("mode", ["I", "F"])
def test_pixels_without_a_range_are_refused(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "values.tif"
    Image.new(mode, (8, 8), 7).save(path)
    with pytest.raises(DataError, match=r"values\.tif: .* \(32-bit pixel values have no defined range"):
        read_image(path, 8)


def test_images_come_in_the_order_asked_for(tmp_path: Path) -> None:
    paths = [tmp_path / f"{index}.png" for index in range(50)]
    for index, path in enumerate(paths):
        Image.new("RGB", (2, 2), (index, 0, 0)).save(path)
    assert read_images(paths[::-1], 2, "images")[0][:, 0, 0, 0].tolist() == list(range(50))[::-1]


def test_arrays_are_resized_as_files_are(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (3, 12, 12, 3), dtype=np.uint8)
    Image.fromarray(pixels[1]).save(tmp_path / "a.png")
    np.testing.assert_array_equal(resize_images(pixels, 7)[1], read_image(tmp_path / "a.png", 7))
    assert resize_images(pixels, 12) is pixels


def test_an_image_of_too_many_pixels_is_told_from_a_damaged_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "large.png"
    Image.new("L", (40, 30)).save(path)
    monkeypatch.setattr(image_files, "MAX_PIXELS", 500)
    with pytest.raises(DataError, match=r"large\.png: .*40 x 30 = 1200 pixels; at most 500 are allowed"):
        read_image(path, 8)
