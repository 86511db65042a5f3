"""Training and service each read picture files themselves: from the same file they must get the same pixels."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, TiffImagePlugin

from service import images
from service.artifact import ResizePolicy
from training.dataset import DataError
from training.pictures import read_picture, read_pictures, resize_pictures

RANDOM = np.random.default_rng(0)
COLOUR = Image.fromarray(RANDOM.integers(0, 256, (24, 31, 3), dtype=np.uint8))
ALPHA = Image.fromarray(RANDOM.integers(0, 256, (24, 31, 4), dtype=np.uint8))
DEEP = Image.fromarray(RANDOM.integers(0, 65536, (24, 31), dtype=np.uint16))


def exif(orientation: int) -> Image.Exif:
    metadata = Image.Exif()
    metadata[0x0112] = orientation
    return metadata


def tags(values: dict[int, int]) -> TiffImagePlugin.ImageFileDirectory_v2:
    directory = TiffImagePlugin.ImageFileDirectory_v2()
    for tag, value in values.items():
        directory[tag] = value
    return directory


def animation(path: Path) -> None:
    COLOUR.save(path, save_all=True, append_images=[COLOUR.rotate(180)])


FILES: dict[str, Callable[[Path], object]] = {
    "colour.png": COLOUR.save,
    "colour.jpg": COLOUR.save,
    "colour.webp": COLOUR.save,
    "colour.bmp": COLOUR.save,
    "colour.tif": COLOUR.save,
    "animated.gif": animation,
    "bits.png": COLOUR.convert("1").save,
    "grey.png": COLOUR.convert("L").save,
    "palette.png": COLOUR.quantize(16).save,
    "palette-transparent.png": lambda path: COLOUR.quantize(16).save(path, transparency=3),
    "palette-alpha.png": lambda path: COLOUR.quantize(16).save(path, transparency=bytes(range(0, 256, 16))),
    "alpha.png": ALPHA.save,
    "alpha.webp": lambda path: ALPHA.save(path, lossless=True),
    "alpha.tif": ALPHA.save,
    "grey-alpha.png": ALPHA.convert("LA").save,
    "colour-key.png": lambda path: COLOUR.save(path, transparency=COLOUR.getpixel((3, 4))),
    "cmyk.jpg": COLOUR.convert("CMYK").save,
    "cmyk.tif": COLOUR.convert("CMYK").save,
    "deep.png": DEEP.save,
    "deep-transparent.png": lambda path: DEEP.save(path, transparency=DEEP.getpixel((3, 4))),
    "deep.tif": DEEP.save,
    "deep-white-is-zero.tif": lambda path: DEEP.save(path, tiffinfo=tags({262: 0})),
    "turned-deep.png": lambda path: DEEP.save(path, exif=exif(6)),
    "turned-deep.tif": lambda path: DEEP.save(path, tiffinfo=tags({274: 8, 262: 0})),
    "turned.webp": lambda path: COLOUR.save(path, exif=exif(5), lossless=True),
    "turned.tif": lambda path: COLOUR.save(path, tiffinfo=tags({274: 3})),
    "damaged-exif.png": lambda path: COLOUR.save(path, exif=b"Exif\0\0MM\0*\xff\xff\xff\xff"),
    **{f"turned-{way}.png": lambda path, way=way: COLOUR.save(path, exif=exif(way)) for way in range(1, 9)},
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("size", [24, 13, 40])
def test_training_reads_what_the_service_reads(tmp_path: Path, name: str, size: int) -> None:
    path = tmp_path / name
    FILES[name](path)
    opened = images.open_picture(path.read_bytes(), max_pixels=10_000)
    served = images.to_array(opened, size=(size, size), resize=ResizePolicy())
    read = read_picture(path, size)
    assert read.dtype == np.uint8
    assert read.std() > 10
    np.testing.assert_array_equal(read, served)


def test_deep_levels_are_scaled_not_clipped(tmp_path: Path) -> None:
    levels = np.array([[0, 128], [129, 65535]], np.uint16)
    Image.fromarray(levels).save(tmp_path / "deep.png")
    assert read_picture(tmp_path / "deep.png", 2)[..., 0].tolist() == [[0, 0], [1, 255]]


@pytest.mark.parametrize("mode", ["I", "F"])
def test_pixels_without_a_range_are_refused(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "values.tif"
    Image.new(mode, (8, 8), 7).save(path)
    with pytest.raises(DataError, match=r"values\.tif: .* \(32-bit pixel values have no defined range"):
        read_picture(path, 8)


def test_pictures_come_in_the_order_asked_for(tmp_path: Path) -> None:
    paths = [tmp_path / f"{index}.png" for index in range(50)]
    for index, path in enumerate(paths):
        Image.new("RGB", (2, 2), (index, 0, 0)).save(path)
    assert read_pictures(paths[::-1], 2, "pictures")[:, 0, 0, 0].tolist() == list(range(50))[::-1]


def test_arrays_are_resized_as_files_are(tmp_path: Path) -> None:
    pixels = RANDOM.integers(0, 256, (3, 12, 12, 3), dtype=np.uint8)
    Image.fromarray(pixels[1]).save(tmp_path / "a.png")
    np.testing.assert_array_equal(resize_pictures(pixels, 7)[1], read_picture(tmp_path / "a.png", 7))
    assert resize_pictures(pixels, 12) is pixels
