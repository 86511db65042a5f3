"""What is no image, too large or damaged, and what clients are told."""

import re
import warnings

import numpy as np
import pytest
from PIL import Image

from imaging.decoder import decode_image
from imaging.errors import ImageError, NotAnImage, TooManyPixels, TruncatedImage, UnsupportedFormat
from imaging.formats import read_header
from tests.imaging.files import Pixels, all_files, encode, pixels, png_announcing

SIZE = (32, 32)
ARRAY = pixels()


def decode(data: bytes) -> Pixels:
    return decode_image(data, size=SIZE, max_pixels=1_000_000)


@pytest.mark.parametrize(
    "data", [b"", b"hello, I am no image", b"BMW is a car maker", b"RIFF\0\0\0\0WAVEfmt ", b"\0" * 99]
)
def test_other_bytes_are_no_image(data: bytes) -> None:
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
        read_header(png_announcing(*size), max_pixels=1_000_000)


def test_images_at_the_limit_pass() -> None:
    assert read_header(png_announcing(1000, 1000), max_pixels=1_000_000).pixels == 1_000_000


@pytest.mark.parametrize("lossless", [True, False])
@pytest.mark.parametrize("alpha", [True, False])
def test_webp_pixels_are_counted_in_each_of_its_variants(lossless: bool, alpha: bool) -> None:
    image = Image.fromarray(pixels(20, 30))
    if alpha:
        image.putalpha(128)
    data = encode(image, "WEBP", lossless=lossless)
    assert read_header(data, max_pixels=600).pixels == 600
    with pytest.raises(TooManyPixels, match="30 x 20"):
        read_header(data, max_pixels=599)


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
        read_header(data, max_pixels=1_000_999)
    with pytest.raises(TruncatedImage):
        decode_image(data, size=SIZE, max_pixels=1_001_000)


def test_a_variant_that_is_not_decoded_is_not_called_damaged() -> None:
    twelve_bits = re.sub(rb"(\xff\xc0\0.)\x08", rb"\1" + b"\x0c", encode(ARRAY, "JPEG"), count=1, flags=re.DOTALL)
    with pytest.raises(UnsupportedFormat, match="12 bits"):
        decode(twelve_bits)


def test_nothing_but_image_errors_and_no_warning_for_garbage_after_each_signature() -> None:
    rng = np.random.default_rng(0)
    signatures = [data[:24] for data in all_files(ARRAY).values()]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for signature in signatures:
            for _ in range(20):
                with pytest.raises(ImageError):
                    decode(signature + rng.bytes(200))
