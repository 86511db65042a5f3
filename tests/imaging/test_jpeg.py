"""JPEG: shrunk by the decoder only where that mixes in nothing from beyond the edge, and files without their end."""

import struct
from io import BytesIO

import numpy as np
import pytest
from PIL import Image, ImageOps

from imaging.decoder import decode, decode_image
from imaging.errors import TruncatedImage
from imaging.formats import read_header
from imaging.structure import jpeg
from tests.imaging.files import Pixels, encode, pixels
from tests.imaging.hand_made import DATA

SIZE = (32, 32)
ARRAY = pixels(48, 64)


def read(data: bytes) -> jpeg.JpegHeader:
    header = read_header(data, max_pixels=10_000_000)
    assert isinstance(header, jpeg.JpegHeader)
    return header


def shrunk(data: bytes) -> Pixels:
    return decode_image(data, size=SIZE, max_pixels=10_000_000)


def of_full_decode(data: bytes) -> Pixels:
    """The reference: every pixel decoded, then cropped and resized by Pillow."""
    return np.asarray(ImageOps.fit(Image.open(BytesIO(data)).convert("RGB"), SIZE, Image.Resampling.BICUBIC))


def with_foreign_pixels(height: int, width: int, subsampling: int, seed: int = 0) -> bytes:
    """A JPEG whose last blocks go on with other pixels beyond its edge, as one that was cropped without loss."""
    high, wide = {0: (8, 8), 1: (8, 16), 2: (16, 16)}[subsampling]  # what a file holds is a multiple of
    full = pixels(-(-height // high) * high, -(-width // wide) * wide).copy()
    noise = np.random.default_rng(seed).integers(0, 256, full.shape, dtype=np.uint8)
    full[height:], full[:, width:] = noise[height:], noise[:, width:]
    data = bytearray(encode(full, "JPEG", quality=95, subsampling=subsampling))
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = struct.pack(">HH", height, width)
    return bytes(data)


def test_an_odd_side_gives_the_pixels_of_a_full_decode() -> None:
    data = (DATA / "jpeg_769.jpg").read_bytes()
    np.testing.assert_array_equal(shrunk(data), of_full_decode(data))


@pytest.mark.parametrize("size", [(193, 193), (385, 385), (769, 769), (601, 1003), (770, 776), (772, 772)])
def test_other_sides_are_near_a_full_decode(size: tuple[int, int]) -> None:
    data = encode(pixels(*size), "JPEG", quality=95)
    assert np.abs(shrunk(data).astype(int) - of_full_decode(data)).max() <= 2


@pytest.mark.parametrize("subsampling", [0, 1, 2])
@pytest.mark.parametrize("size", [(769, 769), (776, 776), (772, 784), (770, 800), (784, 776), (792, 1003), (800, 808)])
def test_what_lies_beyond_the_edge_changes_nothing(size: tuple[int, int], subsampling: int) -> None:
    one, other = (with_foreign_pixels(*size, subsampling, seed) for seed in (0, 1))
    for data in (one, other):
        np.testing.assert_allclose(shrunk(data).astype(int), of_full_decode(data), atol=4)
    if not subsampling and jpeg.reduction(read(one), 96) == 8:  # no block holds pixels of both kinds
        np.testing.assert_array_equal(shrunk(one), shrunk(other))


@pytest.mark.parametrize(
    ("size", "subsampling", "reach", "divisor"),
    [
        ((768, 768), 2, 96, 8),
        ((768, 768), 2, 97, 4),
        ((1080, 1920), 2, 96, 8),  # 1080 is no multiple of 16, but the colours of a block of 16 become two samples
        ((1080, 1920), 1, 96, 8),  # half as many samples across alone: 1920 is a multiple of 16
        ((1920, 1080), 1, 96, 4),
        ((772, 772), 2, 96, 4),
        ((770, 770), 2, 96, 2),
        ((769, 768), 2, 96, 1),
        ((191, 400), 2, 96, 1),
    ],
)
def test_the_decoder_shrinks_as_far_as_the_edge_allows(
    size: tuple[int, int], subsampling: int, reach: int, divisor: int
) -> None:
    data = encode(pixels(*size), "JPEG", subsampling=subsampling)
    assert jpeg.reduction(read(data), reach) == divisor


# Without the two bytes that mark the end

WAYS = [{}, {"progressive": True}, {"subsampling": 0}, {"optimize": True}]


def grey(array: Pixels) -> Pixels:
    return array[..., 0]


def cmyk(array: Pixels) -> Image.Image:
    return Image.fromarray(array).convert("CMYK")


@pytest.mark.parametrize("options", WAYS, ids=str)
@pytest.mark.parametrize("convert", [np.asarray, grey, cmyk])
@pytest.mark.parametrize(
    "behind",
    [
        b"",
        b"\xff",
        bytes(500),
        b"\xff" * 500,
        b"\r\n--boundary--\r\n",
        encode(pixels(), "JPEG"),
        encode(pixels(), "PNG"),
    ],
    ids=["nothing", "half of it", "zeros", "ones", "text", "a JPEG", "a PNG"],
)
def test_a_jpeg_without_its_end_is_whole_whatever_is_behind(options: dict, convert, behind: bytes) -> None:
    data = encode(convert(ARRAY), "JPEG", **options)
    assert data.endswith(jpeg.EOI)
    expected = decode(read(data), size=SIZE)
    np.testing.assert_array_equal(decode(read(data[:-2] + behind), size=SIZE), expected)


@pytest.mark.parametrize("options", WAYS, ids=str)
@pytest.mark.parametrize("behind", [b"", bytes(500), encode(pixels(), "PNG")], ids=["nothing", "zeros", "a PNG"])
def test_one_whose_pixels_are_not_all_there_is_truncated(options: dict, behind: bytes) -> None:
    data = encode(ARRAY, "JPEG", quality=90, **options)
    if behind.startswith(b"\x89"):
        behind = jpeg.SOI + behind  # else it is read as pixels, as it would be behind an end
    for missing in (3, 5, 20, 100, 300):
        with pytest.raises(TruncatedImage):
            decode(read(data[:-missing] + behind), size=SIZE)


def test_a_progressive_one_cut_between_two_scans_is_truncated() -> None:
    data = encode(ARRAY, "JPEG", progressive=True)
    last = data.rindex(jpeg.SCAN)
    tables = data.rindex(b"\xff\xc4", 0, last)
    for end in (last, tables):
        with pytest.raises(TruncatedImage):
            decode(read(data[:end]), size=SIZE)


def test_the_sample_without_its_end_is_read() -> None:
    data = (DATA / "jpeg_without_eoi.jpg").read_bytes()
    assert not data.endswith(jpeg.EOI)
    whole = np.asarray(Image.open(BytesIO(data + jpeg.EOI)))
    np.testing.assert_array_equal(decode_image(data, size=SIZE, max_pixels=10_000), whole)


def test_of_two_images_in_one_file_the_first_is_read() -> None:
    first, second = Image.fromarray(ARRAY), Image.fromarray(ARRAY[::-1])
    data = encode(first, "MPO", save_all=True, append_images=[second])
    np.testing.assert_array_equal(shrunk(data), of_full_decode(encode(first, "JPEG")))
