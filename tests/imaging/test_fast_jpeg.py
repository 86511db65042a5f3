"""The fast path of a JPEG against Pillow's: the same pixels, or none at all."""

from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from imaging.decoder import decode
from imaging.fast_jpeg import MAX_SCANS, SCAN, decode_exact_jpeg
from imaging.formats import read_header
from tests.imaging.files import Pixels, all_files, encode, pixels

ARRAY = pixels()
SIZE = ARRAY.shape[:2]


def by_pillow(data: bytes) -> Pixels:
    return decode(read_header(data, max_pixels=1_000_000), size=SIZE)


@pytest.mark.parametrize("quality", [1, 30, 75, 100])
@pytest.mark.parametrize("subsampling", [0, 1, 2])
@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("grey", [False, True])
def test_pixels_are_those_of_pillow(quality: int, subsampling: int, progressive: bool, grey: bool) -> None:
    array = ARRAY[..., 0] if grey else ARRAY
    data = encode(array, "JPEG", quality=quality, subsampling=subsampling, progressive=progressive)
    decoded = decode_exact_jpeg(data, SIZE)
    assert decoded is not None
    assert decoded.dtype == np.uint8
    assert decoded.flags.c_contiguous
    np.testing.assert_array_equal(decoded, by_pillow(data))


@pytest.mark.parametrize("sampling", [16 * horizontal + vertical for horizontal in range(5) for vertical in range(5)])
def test_no_sampling_of_colours_raises(sampling: int) -> None:
    """4:4:1 has no name in libjpeg-turbo's interface; Pillow decodes it."""
    data = bytearray(encode(ARRAY, "JPEG", subsampling=0))
    data[data.index(b"\xff\xc0") + 11] = sampling
    decoded = decode_exact_jpeg(bytes(data), SIZE)
    if decoded is not None:
        np.testing.assert_array_equal(decoded, by_pillow(bytes(data)))


def test_other_sizes_are_left_to_pillow() -> None:
    assert decode_exact_jpeg(encode(ARRAY, "JPEG"), (SIZE[0], SIZE[1] + 1)) is None


@pytest.mark.parametrize("key", ["exif", "xmp"])
def test_what_may_turn_the_image_is_left_to_pillow(key: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><tiff:Orientation xmlns:tiff="http://ns.adobe.com/tiff/1.0/">6</x>'
    data = encode(ARRAY, "JPEG", **{key: exif if key == "exif" else xmp})
    assert decode_exact_jpeg(data, SIZE) is None


def test_cmyk_is_left_to_pillow() -> None:
    assert decode_exact_jpeg(encode(Image.fromarray(ARRAY).convert("CMYK"), "JPEG"), SIZE) is None


@pytest.mark.parametrize("name", [name for name in all_files(ARRAY) if not name.startswith("JPEG")])
def test_other_formats_are_left_to_pillow(name: str) -> None:
    assert decode_exact_jpeg(all_files(ARRAY)[name], SIZE) is None


def test_damaged_ones_are_left_to_pillow() -> None:
    data = encode(ARRAY, "JPEG")
    for end in range(0, len(data) - 2, 7):
        assert decode_exact_jpeg(data[:end], SIZE) is None, end


def test_mutated_ones_give_the_pixels_of_pillow_or_none() -> None:
    """Where Pillow refuses, an image may come out all the same: libjpeg-turbo overlooks some damage in headers."""
    rng = np.random.default_rng(0)
    whole = np.frombuffer(encode(ARRAY, "JPEG"), np.uint8)
    equal = 0
    for _ in range(2000):
        mutated = whole.copy()
        mutated[rng.integers(0, len(whole), 2)] = rng.integers(0, 256, 2)
        data = mutated.tobytes()
        decoded = decode_exact_jpeg(data, SIZE)
        if decoded is None:
            continue
        try:
            image = Image.open(BytesIO(data), formats=("JPEG",))
            expected = np.asarray(image.convert("RGB"))
        except Exception:  # whatever Pillow raises: there is nothing to compare with
            continue
        np.testing.assert_array_equal(decoded, expected)
        equal += 1
    assert equal > 500


def test_those_of_many_scans_are_left_to_pillow() -> None:
    data = encode(ARRAY, "JPEG", progressive=True)
    few, many = (data + SCAN * (scans - data.count(SCAN)) for scans in (MAX_SCANS, MAX_SCANS + 1))
    assert decode_exact_jpeg(few, SIZE) is not None
    assert decode_exact_jpeg(many, SIZE) is None
