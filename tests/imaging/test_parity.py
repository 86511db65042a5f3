"""Training and service each read picture files themselves: from the same file they must get the same pixels."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, TiffImagePlugin

from imaging import decoder as images
from service.engine.metadata import ResizePolicy
from training.data.dataset import DataError
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


# --- what that is

PATTERN = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)


def read_one(folder: Path) -> np.ndarray:
    """The folder's only picture, uint8 [8, 8, 3]."""
    (path,) = folder.iterdir()
    return read_picture(path, 8)


@pytest.mark.parametrize("name", ["a.png", "a.bmp", "a.tif", "a.webp"])
def test_a_picture_of_the_right_size_passes_untouched(tmp_path: Path, name: str) -> None:
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
    picture = Image.fromarray(np.random.default_rng(1).integers(0, 256, (20, 30, 3), dtype=np.uint8))
    picture.save(tmp_path / "a.png")
    expected = picture.resize((8, 8), Image.Resampling.BICUBIC, box=(5, 0, 25, 20))
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
    picture = Image.new("P", (8, 8), 1)
    picture.putpalette([200, 0, 0, 0, 100, 50])
    picture.putpixel((0, 0), 0)
    picture.save(tmp_path / "a.png", transparency=0)
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


def test_a_picture_of_too_many_pixels_is_told_from_a_damaged_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "large.png"
    Image.new("L", (40, 30)).save(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)  # Pillow refuses what has twice as many
    with pytest.raises(DataError, match=r"large\.png: this picture is too large to be read \(.*1200 pixels\)"):
        read_picture(path, 8)
