"""Kinds of files that decoders get wrong, each against the right value."""

import struct

import numpy as np
import pytest
from PIL import Image

from imaging.decoder import decode_image
from imaging.errors import UnsupportedFormat
from imaging.formats import read_header
from tests.imaging.files import Pixels, encode, pixels, planar_tiff, png_of
from tests.imaging.hand_made import DATA

SIZE = (32, 32)
ARRAY = pixels()
WHITE = [255, 255, 255]


def decode(data: bytes, size: tuple[int, int] = SIZE) -> Pixels:
    return decode_image(data, size=size, max_pixels=1_000_000)


def sample(name: str) -> Pixels:
    data = (DATA / name).read_bytes()
    header = read_header(data, max_pixels=1_000_000)
    return decode(data, (header.height, header.width))


# One transparent value in a PNG


def test_the_transparent_grey_of_two_bits_is_white() -> None:
    values = np.asarray(Image.open(DATA / "grey2_transparent_1.png"))  # 0, 85, 170 and 255; transparent is the second
    expected = np.where(values == 85, 255, values)
    np.testing.assert_array_equal(sample("grey2_transparent_1.png"), np.repeat(expected[..., None], 3, axis=2))
    assert (values == 85).mean() > 0.5


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_a_transparent_grey_of_few_bits_is_white(bits: int) -> None:
    peak = 2**bits - 1
    row = b"\0" + np.packbits([1] * bits + [0] * bits).tobytes()  # white, then black
    for transparent, expected in ((0, [255, 255]), (peak, [255, 0]), (peak | 0x100, [255, 0])):
        decoded = decode(png_of(2, 1, bits, 0, row, struct.pack(">H", transparent)), (1, 2))
        assert decoded[0].tolist() == [[level] * 3 for level in expected]


def deep_png(values: np.ndarray, transparent: tuple[int, int, int]) -> bytes:
    """A PNG of RGB uint16 [H, W, 3] with a transparent value."""
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    return png_of(values.shape[1], values.shape[0], 16, 2, rows, struct.pack(">HHH", *transparent))


def test_a_transparent_colour_of_sixteen_bits_is_compared_on_all_of_them() -> None:
    colour = (0x1234, 0x5678, 0x9ABC)
    near = [(0x1235, 0x5678, 0x9ABC), (0x1234, 0x5679, 0x9ABC), (0x1234, 0x5678, 0x9ABD), (0x1334, 0x5678, 0x9ABC)]
    decoded = decode(deep_png(np.array([[colour, *near]], np.uint16), colour), (1, 5))
    assert decoded[0, 0].tolist() == WHITE
    assert decoded[0, 1:].tolist() == [[value >> 8 for value in values] for values in near]


# BMP


def bmp_with_alpha(alpha: int) -> bytes:
    """A BMP of 32 bits whose header names a mask for alpha."""
    pixel = np.dstack([ARRAY[::-1, :, ::-1], np.full(SIZE, alpha, np.uint8)]).astype(np.uint8)
    masks = struct.pack("<4I", 0xFF0000, 0xFF00, 0xFF, 0xFF000000)
    info = struct.pack("<IiiHHIIiiII", 56, 32, 32, 1, 32, 3, 0, 0, 0, 0, 0) + masks
    return b"BM" + struct.pack("<IHHI", 70 + 4096, 0, 0, 70) + info + pixel.tobytes()


def test_a_bmp_whose_alpha_is_0_everywhere_is_opaque() -> None:
    np.testing.assert_array_equal(decode(bmp_with_alpha(0)), ARRAY)


def test_a_bmp_with_an_alpha_is_put_on_white() -> None:
    expected = np.round((ARRAY.astype(float) * 51 + 255.0 * 204) / 255)
    np.testing.assert_array_equal(decode(bmp_with_alpha(51)), expected)


# Frames that are smaller than their screen


def test_what_a_gif_frame_leaves_open_is_white() -> None:
    decoded = sample("gif_frame_smaller_than_screen.gif")
    inside = np.zeros(SIZE, bool)
    (left, upper, right, lower) = read_header(
        (DATA / "gif_frame_smaller_than_screen.gif").read_bytes(), max_pixels=10_000
    ).frame or (0, 0, 0, 0)
    inside[upper:lower, left:right] = True
    assert 0 < inside.sum() < 1024
    assert (decoded[~inside] == 255).all()
    assert (decoded[inside] < 255).any()


@pytest.mark.parametrize("transparent", [False, True])
def test_a_gif_frame_lies_where_it_says(transparent: bool) -> None:
    frame = Image.new("P", (8, 6), 1)
    frame.putpalette([9, 9, 9, 10, 20, 30])
    data = bytearray(encode(frame, "GIF", **({"transparency": 0} if transparent else {})))
    data[6:10] = struct.pack("<HH", *SIZE)
    at = data.index(b",", 13 + 6)
    data[at + 1 : at + 5] = struct.pack("<HH", 20, 5)
    decoded = decode(bytes(data))
    assert (decoded[5:11, 20:28] == (10, 20, 30)).all()
    decoded = decoded.copy()
    decoded[5:11, 20:28] = 255
    assert (decoded == 255).all()


def test_what_a_webp_frame_leaves_open_is_white() -> None:
    still = encode(np.full((8, 6, 3), (10, 20, 30), np.uint8), "WEBP", lossless=True)[12:]
    frame = b"".join(value.to_bytes(3, "little") for value in (20 // 2, 4 // 2, 6 - 1, 8 - 1, 100)) + b"\0" + still
    chunks = b"VP8X\x0a\0\0\0\x02\0\0\0" + bytes((31, 0, 0, 31, 0, 0)) + b"ANIM\x06\0\0\0\0\0\0\0\0\0"
    chunks += b"ANMF" + struct.pack("<I", len(frame)) + frame
    decoded = decode(b"RIFF" + struct.pack("<I", 4 + len(chunks)) + b"WEBP" + chunks).copy()
    assert (decoded[4:12, 20:26] == (10, 20, 30)).all()
    decoded[4:12, 20:26] = 255
    assert (decoded == 255).all()


# TIFF


def test_planes_of_sixteen_bits_are_read_as_that() -> None:
    decoded = sample("planar16.tif")
    data = (DATA / "planar16.tif").read_bytes()
    with Image.open(DATA / "planar16.tif") as image:
        places = image.tag_v2[273]
    planes = [np.frombuffer(data, "<u2", 32 * 32, place).reshape(SIZE) for place in places]
    np.testing.assert_array_equal(decoded, np.stack(planes, axis=2) >> 8)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("compressed", [False, True])
def test_planes_of_sixteen_bits_in_each_order_of_bytes(order: str, channels: int, compressed: bool) -> None:
    alpha = np.full((*SIZE, 1), 255, np.uint8)
    array = np.concatenate([ARRAY, alpha], axis=2)[..., :channels]
    decoded = decode(planar_tiff(array.astype(np.uint16) * 257, compressed, order))
    np.testing.assert_array_equal(decoded, np.repeat(array, 3, axis=2) if channels == 1 else array[..., :3])


# Variants without a decoder


def test_a_bmp_of_other_masks_is_unsupported() -> None:
    with pytest.raises(UnsupportedFormat, match="variant of BMP is not supported"):
        sample("bmp_masks_rgb.bmp")


def tiff_of(
    samples: int,
    bits: int,
    sample_format: int,
    photometric: int,
    extra: int | None,
    orientation: int = 1,
    fill: bytes = b"\0",
) -> bytes:
    """An uncompressed TIFF of 8 x 8 pixels whose tags say what its samples are."""
    tags = {256: 8, 257: 8, 259: 1, 262: photometric, 273: 512, 274: orientation, 277: samples, 278: 8}
    tags |= {} if extra is None else {338: extra}
    entries = [struct.pack("<HHIHH", tag, 3, 1, value, 0) for tag, value in tags.items()]
    lists = {258: bits, 339: sample_format}
    place = 8 + 2 + 12 * (len(tags) + len(lists)) + 4
    behind = b""
    for tag, value in lists.items():
        packed = struct.pack(f"<{samples}H", *[value] * samples)
        raw = packed.ljust(4, b"\0") if len(packed) <= 4 else struct.pack("<I", place + len(behind))
        behind += packed if len(packed) > 4 else b""
        entries.append(struct.pack("<HHI", tag, 3, samples) + raw)
    head = struct.pack("<2sHIH", b"II", 42, 8, len(entries)) + b"".join(sorted(entries)) + bytes(4) + behind
    return head.ljust(512, b"\0") + fill * (64 * samples * bits // 8)


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize(
    ("bits", "photometric", "fill", "grey"),
    [(12, 1, b"\xff", 255), (12, 1, b"\0", 0), (16, 0, b"\xff", 0), (16, 0, b"\0", 255)],
    ids=["white of 12 bits", "black of 12 bits", "black where white is 0", "white where white is 0"],
)
def test_the_range_of_a_deep_grey_holds_for_a_turned_one_too(
    bits: int, photometric: int, fill: bytes, grey: int, orientation: int
) -> None:
    decoded = decode(tiff_of(1, bits, 1, photometric, None, orientation, fill), (8, 8))
    assert (decoded == grey).all()


@pytest.mark.parametrize(
    ("samples", "bits", "sample_format", "photometric", "extra"),
    [(1, 16, 3, 1, None), (3, 16, 3, 2, None), (5, 8, 1, 5, 2), (2, 8, 1, 1, 1), (1, 64, 3, 1, None)],
    ids=["half-float", "half-float RGB", "CMYK with alpha", "grey with associated alpha", "double"],
)
def test_a_tiff_of_another_variant_is_unsupported_and_not_damaged(
    samples: int, bits: int, sample_format: int, photometric: int, extra: int | None
) -> None:
    with pytest.raises(UnsupportedFormat, match=r"not supported|no defined range"):
        decode(tiff_of(samples, bits, sample_format, photometric, extra))
    decode(tiff_of(1, 8, 1, 1, None))  # which has a decoder


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize(
    ("photometric", "channels", "extra"),
    [(2, 4, ()), (2, 5, (2, 0)), (1, 2, (2,)), (8, 3, ()), (6, 3, ()), (5, 5, (2,))],
    ids=["RGB and one more", "RGB with two more", "grey with alpha", "Lab", "YCbCr", "CMYK with alpha"],
)
def test_planes_that_pillow_mixes_up_are_unsupported(
    photometric: int, channels: int, extra: tuple[int, ...], compressed: bool
) -> None:
    array = np.random.default_rng(0).integers(0, 256, (*SIZE, channels), dtype=np.uint8)
    with pytest.raises(UnsupportedFormat, match=r"a plane for each channel|subsampled YCbCr"):
        decode(planar_tiff(array, compressed, photometric=photometric, extra=extra))


@pytest.mark.parametrize(("photometric", "channels", "extra"), [(2, 4, (0,)), (5, 5, (0,)), (1, 2, (0,)), (2, 4, (1,))])
def test_planes_beside_the_colours_are_read_where_they_are_compressed(
    photometric: int, channels: int, extra: tuple[int, ...]
) -> None:
    array = np.random.default_rng(0).integers(0, 256, (*SIZE, channels), dtype=np.uint8)
    if extra == (1,):
        array[..., 3] = 255
    colours = array[..., : channels - 1]
    decoded = decode(planar_tiff(array, compressed=True, photometric=photometric, extra=extra))
    modes = {1: "L", 2: "RGB", 5: "CMYK"}
    expected = Image.frombytes(modes[photometric], SIZE, colours.tobytes()).convert("RGB")
    np.testing.assert_array_equal(decoded, np.asarray(expected))
    with pytest.raises(UnsupportedFormat, match="a plane for each channel"):
        decode(planar_tiff(array, compressed=False, photometric=photometric, extra=extra))


def test_uncompressed_ycbcr_is_read_without_subsampling_alone() -> None:
    data = encode(Image.fromarray(ARRAY).convert("YCbCr"), "TIFF", tiffinfo={530: (1, 1)})
    assert np.abs(decode(data).astype(int) - ARRAY).max() <= 3
    at = data.index(struct.pack("<HHI", 530, 3, 2)) + 8
    with pytest.raises(UnsupportedFormat, match="subsampled YCbCr"):
        decode(data[:at] + struct.pack("<HH", 2, 2) + data[at + 4 :])


def test_grey_with_an_associated_alpha_is_unsupported() -> None:
    with pytest.raises(UnsupportedFormat, match="multiplied by its alpha"):
        sample("tiff_la_assoc.tif")


def test_a_tiff_of_an_unknown_compression_is_unsupported() -> None:
    data = bytearray(tiff_of(1, 8, 1, 1, None))
    at = data.index(struct.pack("<HHIH", 259, 3, 1, 1))
    data[at + 8 : at + 10] = struct.pack("<H", 34712)
    with pytest.raises(UnsupportedFormat, match="compression 34712 is not supported"):
        decode(bytes(data))


def test_big_endian_bigtiff_is_unsupported() -> None:
    with pytest.raises(UnsupportedFormat, match="little-endian"):
        decode(b"MM\0+\0\x08\0\0" + bytes(99))


def test_bigtiff_is_read() -> None:
    np.testing.assert_array_equal(decode(encode(ARRAY, "TIFF", big_tiff=True)), ARRAY)
