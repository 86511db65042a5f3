"""What is no picture, too large or damaged, and what clients are told."""

import random
import re
import struct
import warnings

import numpy as np
import pytest
from PIL import Image

from imaging.decoder import open_picture, to_array
from service.engine.metadata import ResizePolicy
from service.errors import NotAnImage, ServiceError, TooManyPixels, TruncatedImage, UnsupportedFormat
from tests.imaging.files import Pixels, all_files, encode, pixels, planar_tiff, png_announcing

SIZE = (32, 32)
ARRAY = pixels()


def decode(data: bytes) -> Pixels:
    return to_array(open_picture(data, max_pixels=1_000_000), size=SIZE, resize=ResizePolicy())


@pytest.mark.parametrize(
    "data", [b"", b"hello, I am no picture", b"BMW is a car maker", b"RIFF\0\0\0\0WAVEfmt ", b"\0" * 99]
)
def test_other_bytes_are_no_picture(data: bytes) -> None:
    with pytest.raises(NotAnImage, match="JPEG, PNG, WebP"):
        decode(data)


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (encode(ARRAY, "AVIF"), "AVIF"),
        (b"\0\0\0\x18ftypheic\0\0\0\0", "HEIF"),
        (encode(ARRAY, "JPEG2000"), "JPEG 2000"),
        (encode(ARRAY, "ICO"), "ICO"),
        (b"%PDF-1.7", "PDF"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "SVG"),
        (b"8BPS\0\1", "PSD"),
    ],
)
def test_known_formats_that_are_not_decoded_are_named(data: bytes, name: str) -> None:
    with pytest.raises(UnsupportedFormat, match=name):
        decode(data)


@pytest.mark.parametrize("name", all_files(ARRAY))
@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_truncated_files_are_an_error(name: str) -> None:
    data = all_files(pixels(64, 64))[name]
    for fraction in (0.3, 0.6, 0.9):
        with pytest.raises(TruncatedImage):
            decode(data[: int(len(data) * fraction)])


@pytest.mark.parametrize("size", [(1001, 1000), (100_000, 100_000), (2**31 - 1, 2**31 - 1)])
def test_too_many_pixels_are_refused_from_the_header(size: tuple[int, int]) -> None:
    with pytest.raises(TooManyPixels, match="1000000"):
        open_picture(png_announcing(*size), max_pixels=1_000_000)


def test_pictures_at_the_limit_pass() -> None:
    assert open_picture(png_announcing(1000, 1000), max_pixels=1_000_000).size == (1000, 1000)


@pytest.mark.parametrize("lossless", [True, False])
@pytest.mark.parametrize("alpha", [True, False])
def test_webp_pixels_are_counted_in_each_of_its_variants(lossless: bool, alpha: bool) -> None:
    image = Image.fromarray(pixels(20, 30))
    if alpha:
        image.putalpha(128)
    data = encode(image, "WEBP", lossless=lossless)
    assert open_picture(data, max_pixels=600).size == (30, 20)
    with pytest.raises(TooManyPixels, match="30 x 20"):
        open_picture(data, max_pixels=599)


@pytest.mark.parametrize(
    "chunk",
    [
        b"VP8X\x0a\0\0\0\0\0\0\0\xe7\x03\0\xe8\x03\0",
        b"VP8L\x0a\0\0\0\x2f" + (1000 - 1 | 1001 - 1 << 14).to_bytes(4, "little") + b"\0",
        b"VP8 \x0a\0\0\0\0\0\0\x9d\x01\x2a\xe8\x03\xe9\x03",
    ],
)
def test_webp_pixels_are_counted_before_its_decoder_is_made(chunk: bytes) -> None:
    data = b"RIFF\x16\0\0\0WEBP" + chunk  # which can't be opened: only its header is there
    with pytest.raises(TooManyPixels, match="1000 x 1001"):
        open_picture(data, max_pixels=1_000_999)
    with pytest.raises(TruncatedImage):
        open_picture(data, max_pixels=1_001_000)


def test_a_tiff_with_gigantic_tiles_is_refused() -> None:
    entries = {256: 32, 257: 32, 258: 8, 259: 5, 262: 1, 277: 1, 322: 60_000, 323: 60_000, 324: 8, 325: 100}
    directory = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in entries.items())
    data = b"II*\0" + struct.pack("<IH", 8, len(entries)) + directory + bytes(200)
    with pytest.raises(TooManyPixels, match="60000 x 60000"):
        open_picture(data, max_pixels=1_000_000)


def test_a_tiff_whose_planes_pillow_reads_wrongly_is_refused() -> None:
    sixteen_bits = ARRAY.astype(np.uint16) * 257
    with pytest.raises(UnsupportedFormat, match="PlanarConfiguration"):
        decode(planar_tiff(sixteen_bits, compressed=False))


def test_a_picture_whose_header_is_beyond_the_decoder_may_be_of_a_variant() -> None:
    twelve_bits = re.sub(rb"(\xff\xc0\0.)\x08", rb"\1" + b"\x0c", encode(ARRAY, "JPEG"), count=1, flags=re.DOTALL)
    with pytest.raises(TruncatedImage, match="or of a variant that is not decoded here"):
        decode(twelve_bits)


def test_nothing_but_service_errors_and_no_warning_for_garbage_after_each_signature() -> None:
    rng = np.random.default_rng(0)
    signatures = [data[:24] for data in all_files(ARRAY).values()]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for signature in signatures:
            for _ in range(20):
                with pytest.raises(ServiceError):
                    decode(signature + rng.bytes(200))


def with_scans(scans: int) -> bytes:
    """A progressive JPEG whose last scan is there so often."""
    data = encode(pixels(40, 60), "JPEG", progressive=True)
    scan = data[data.rindex(b"\xff\xda") : -2]
    return data[:-2] + scan * (scans - data.count(b"\xff\xda")) + data[-2:]


def test_a_jpeg_of_very_many_scans_would_hold_a_thread_for_seconds() -> None:
    assert open_picture(with_scans(100), max_pixels=10_000).size == (60, 40)
    with pytest.raises(UnsupportedFormat, match="more than 100 scans"):
        open_picture(with_scans(101), max_pixels=10_000)


def test_what_looks_like_scans_in_a_film_behind_a_picture_is_none() -> None:
    film = random.Random(0).randbytes(2**24)
    assert film.count(b"\xff\xda") > 200
    assert open_picture(encode(pixels(40, 60), "JPEG") + film, max_pixels=10_000).size == (60, 40)
