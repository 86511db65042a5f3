"""Every format and pixel format against the pixels it was made from."""

import pickle
import struct
import subprocess
import sys
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from imaging.decoder import decode_image
from imaging.errors import UnsupportedFormat
from imaging.resize import Crop, Filter
from tests.imaging.files import Pixels, all_files, encode, lossless_files, pixels, planar_tiff, png_of

ROOT = Path(__file__).parents[2]
SIZE = (32, 32)
ARRAY = pixels()


def decode(data: bytes, size: tuple[int, int] = SIZE, *, crop: Crop = "center", resample: Filter = "bicubic") -> Pixels:
    return decode_image(data, size=size, max_pixels=1_000_000, crop=crop, resample=resample)


@pytest.mark.parametrize("name", lossless_files(ARRAY))
def test_lossless_formats_give_the_pixels_they_were_made_from(name: str) -> None:
    decoded = decode(lossless_files(ARRAY)[name])
    assert decoded.dtype == np.uint8
    assert decoded.flags.c_contiguous
    np.testing.assert_array_equal(decoded, ARRAY)


@pytest.mark.parametrize("name", ["JPEG", "JPEG progressive", "WEBP lossy", "TIFF JPEG"])
def test_lossy_formats_give_what_pillow_gives_and_that_is_near(name: str) -> None:
    data = all_files(ARRAY)[name]
    decoded = decode(data)
    np.testing.assert_array_equal(decoded, np.asarray(Image.open(BytesIO(data)).convert("RGB")))
    assert np.abs(decoded.astype(int) - ARRAY).mean() < 6


def test_images_are_read_where_no_file_can_be_opened_any_more() -> None:
    """As when all are connections; in a process that has read no image yet, for what Pillow imports it keeps."""
    array = pixels(64, 64)
    files = [*all_files(array).values(), encode(array, "MPO", save_all=True, append_images=[Image.fromarray(array)])]
    program = """
import pickle, resource, sys
from imaging.decoder import decode_image
files = pickle.load(sys.stdin.buffer)
resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))
for file in files:
    decode_image(file, size=(32, 32), max_pixels=10_000)
"""
    read = subprocess.run(
        [sys.executable, "-c", program], input=pickle.dumps(files), capture_output=True, check=False, cwd=ROOT
    )
    assert read.returncode == 0, read.stderr.decode()


def test_gif_gives_its_first_frame() -> None:
    red, blue = Image.new("RGB", SIZE, (255, 0, 0)), Image.new("RGB", SIZE, (0, 0, 255))
    decoded = decode(encode(red, "GIF", save_all=True, append_images=[blue]))
    np.testing.assert_array_equal(decoded, np.asarray(red))


def test_multi_page_tiff_and_animated_webp_give_their_first_frame() -> None:
    first, second = Image.fromarray(ARRAY), Image.new("RGB", SIZE)
    for options in ({"format": "TIFF"}, {"format": "WEBP", "lossless": True}):
        file = BytesIO()
        first.save(file, save_all=True, append_images=[second], **options)
        np.testing.assert_array_equal(decode(file.getvalue()), ARRAY)


# Pixel formats


def test_grey() -> None:
    grey = ARRAY[..., 0]
    np.testing.assert_array_equal(decode(encode(grey, "PNG")), np.repeat(grey[..., None], 3, axis=2))


def test_one_bit() -> None:
    bits = Image.fromarray((ARRAY[..., 0] > 127).astype(np.uint8) * 255).convert("1", dither=Image.Dither.NONE)
    for file_format in ("PNG", "BMP", "TIFF"):
        decoded = decode(encode(bits, file_format))
        np.testing.assert_array_equal(decoded[..., 1], np.where(ARRAY[..., 0] > 127, 255, 0))


def test_palette() -> None:
    palette = Image.fromarray(ARRAY).quantize(16)
    for file_format in ("PNG", "BMP", "GIF", "TIFF"):
        np.testing.assert_array_equal(decode(encode(palette, file_format)), np.asarray(palette.convert("RGB")))


@pytest.mark.parametrize(("file_format", "options"), [("TIFF", {}), ("JPEG", {"quality": 100, "subsampling": 0})])
def test_cmyk_is_converted_and_not_inverted(file_format: str, options: dict[str, object]) -> None:
    ink = np.zeros((32, 32, 4), np.uint8)
    ink[:16, :, 0], ink[16:, :, 3] = 255, 128  # cyan above, half black below
    decoded = decode(encode(Image.fromarray(ink, "CMYK"), file_format, **options))
    expected = (255 - ink[..., :3].astype(int)) * (255 - ink[..., 3:]) / 255
    np.testing.assert_allclose(decoded, expected, atol=0 if file_format == "TIFF" else 3, rtol=0)


def test_sixteen_bit_grey_is_scaled_and_not_clipped() -> None:
    values = np.linspace(0, 65535, 32 * 32).astype(np.uint16).reshape(SIZE)
    expected = np.round(values / 257).astype(np.uint8)
    for file_format in ("PNG", "TIFF"):
        decoded = decode(encode(Image.fromarray(values), file_format))
        np.testing.assert_array_equal(decoded, np.repeat(expected[..., None], 3, axis=2))


def test_sixteen_bit_grey_tiff_with_white_as_zero() -> None:
    values = np.full(SIZE, 65535, np.uint16)
    decoded = decode(encode(Image.fromarray(values), "TIFF", tiffinfo={262: 0}))
    assert decoded.max() == 0


def test_sixteen_bit_grey_with_a_transparent_value() -> None:
    values = np.full(SIZE, 1000, np.uint16)
    values[0, 0] = 2000
    decoded = decode(encode(Image.fromarray(values), "PNG", transparency=1000))
    assert decoded[0, 0].tolist() == [8, 8, 8]
    assert decoded[1, 1].tolist() == [255, 255, 255]


@pytest.mark.parametrize("file_format", ["PNG", "WEBP", "TIFF"])
def test_alpha_is_put_on_white(file_format: str) -> None:
    alpha = np.arange(32 * 32).reshape(32, 32, 1) % 256
    options = {"lossless": True, "exact": True} if file_format == "WEBP" else {}
    rgba = Image.fromarray(np.concatenate([ARRAY, alpha.astype(np.uint8)], axis=2))
    expected = np.round((ARRAY.astype(float) * alpha + 255.0 * (255 - alpha)) / 255)
    np.testing.assert_array_equal(decode(encode(rgba, file_format, **options)), expected)


def test_grey_with_alpha_is_put_on_white() -> None:
    image = Image.merge("LA", [Image.new("L", SIZE, 0), Image.new("L", SIZE, 51)])
    assert set(decode(encode(image, "PNG")).ravel().tolist()) == {204}


@pytest.mark.parametrize("mode", ["L", "RGB", "P", "1"])
def test_a_transparent_colour_is_put_on_white(mode: str) -> None:
    image = Image.new("RGB", SIZE, (0, 0, 0)).convert(mode)
    transparency: object = (0, 0, 0) if mode == "RGB" else 0
    data = encode(image, "PNG", transparency=transparency)
    assert "transparency" in Image.open(BytesIO(data)).info
    assert decode(data).min() == 255


@pytest.mark.parametrize("bits", [2, 4])
def test_a_transparent_grey_of_few_bits_is_put_on_white(bits: int) -> None:
    values = np.arange(32 * 32).reshape(SIZE) % 2**bits
    packed = np.packbits(np.unpackbits(values.astype(np.uint8)[..., None], axis=2)[..., -bits:].reshape(32, -1), axis=1)
    rows = b"".join(b"\0" + row.tobytes() for row in packed)
    expected = np.where(values == 2, 255, values * 255 // (2**bits - 1))
    decoded = decode(png_of(32, 32, bits, 0, rows, struct.pack(">H", 2)))
    np.testing.assert_array_equal(decoded, np.repeat(expected[..., None], 3, axis=2))


def test_a_transparent_colour_of_sixteen_bits_is_put_on_white() -> None:
    values = ARRAY.astype(np.uint16) * 256 + 7
    values[0] = (0x1234, 0x5678, 0x9ABC)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    decoded = decode(png_of(32, 32, 16, 2, rows, struct.pack(">HHH", 0x1234, 0x5678, 0x9ABC)))
    assert decoded[0].min() == 255
    np.testing.assert_array_equal(decoded[1:], ARRAY[1:])


def test_transparent_gif_is_put_on_white() -> None:
    image = Image.new("P", SIZE, 1)
    image.putpalette([0, 0, 0, 10, 20, 30])
    assert decode(encode(image, "GIF", transparency=1)).min() == 255


@pytest.mark.parametrize(("dtype", "compressed"), [(np.uint8, False), (np.uint8, True), (np.uint16, True)])
def test_tiff_may_hold_a_plane_for_each_channel(dtype: type, compressed: bool) -> None:
    data = planar_tiff(ARRAY if dtype is np.uint8 else ARRAY.astype(np.uint16) * 257, compressed)
    np.testing.assert_array_equal(decode(data), ARRAY)


@pytest.mark.parametrize(
    ("mode", "dtype"), [("F", np.float32), ("I", np.int32)], ids=["floating point", "32-bit integer"]
)
def test_pixel_values_without_a_range_are_refused(mode: str, dtype: type) -> None:
    data = encode(Image.fromarray(np.ones(SIZE, dtype)), "TIFF")
    assert Image.open(BytesIO(data)).mode == mode
    with pytest.raises(UnsupportedFormat, match="32-bit"):
        decode(data)


def test_lab_is_converted() -> None:
    white = Image.new("LAB", SIZE, (255, 128, 128))
    assert decode(encode(white, "TIFF")).min() >= 253


# Orientation

TURNED_BACK = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
    8: lambda a: np.rot90(a, 1),
}


@pytest.mark.parametrize("orientation", TURNED_BACK)
@pytest.mark.parametrize("file_format", ["PNG", "WEBP", "TIFF"])
def test_exif_orientation_is_honoured(orientation: int, file_format: str) -> None:
    stored = pixels(24, 32)
    exif = Image.Exif()
    exif[0x0112] = orientation
    options: dict[str, object] = {"lossless": True} if file_format == "WEBP" else {}
    expected = TURNED_BACK[orientation](stored)
    decoded = decode(encode(stored, file_format, exif=exif, **options), size=expected.shape[:2])
    np.testing.assert_array_equal(decoded, expected)


def test_exif_orientation_of_a_jpeg_is_honoured() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encode(pixels(24, 32), "JPEG", exif=exif)
    upright = np.rot90(np.asarray(Image.open(BytesIO(data))), -1)
    np.testing.assert_array_equal(decode(data, size=(32, 24)), upright)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_damaged_exif_does_not_make_a_image_unreadable() -> None:
    data = encode(ARRAY, "PNG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    np.testing.assert_array_equal(decode(data), ARRAY)


# Size


@pytest.mark.parametrize("name", ["bilinear", "bicubic", "lanczos", "box"])
def test_larger_images_are_cropped_and_shrunk_as_the_metadata_says(name: str) -> None:
    array = pixels(90, 200)
    image = Image.fromarray(array)
    method = Image.Resampling[name.upper()]
    data = encode(array, "PNG")
    np.testing.assert_array_equal(
        decode(data, crop="center", resample=name), np.asarray(ImageOps.fit(image, SIZE, method))
    )
    np.testing.assert_array_equal(decode(data, crop="none", resample=name), np.asarray(image.resize(SIZE, method)))


def test_center_crop_looks_at_the_middle() -> None:
    array = np.zeros((32, 96, 3), np.uint8)
    array[:, 32:64] = 255
    assert decode(encode(array, "PNG"), crop="center", resample="box").min() == 255
    assert decode(encode(array, "PNG"), crop="none", resample="box").min() == 0


def test_smaller_images_are_enlarged() -> None:
    assert decode(encode(np.full((1, 1, 3), 7, np.uint8), "PNG")).tolist() == np.full((32, 32, 3), 7).tolist()


def test_height_and_width_are_not_confused() -> None:
    assert decode(encode(pixels(50, 50), "PNG"), size=(16, 48)).shape == (16, 48, 3)


def test_a_large_jpeg_shrinks_to_nearly_the_same_as_a_large_png() -> None:
    array = pixels(768, 1024)
    jpeg, png = decode(encode(array, "JPEG", quality=95)), decode(encode(array, "PNG"))
    assert np.abs(jpeg.astype(int) - png).max() <= 4
