"""Metadata: what turns an image is read, all else is passed over, however large or damaged it is."""

import struct
import zlib
from io import BytesIO

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from imaging.decoder import decode_image
from imaging.errors import TruncatedImage
from imaging.formats import read_header
from imaging.structure import orientation
from tests.imaging.files import Pixels, encode, pixels
from tests.imaging.hand_made import DATA, exif

ARRAY = pixels(24, 32)
TURNED = np.rot90(ARRAY, -1)  # orientation 6
PNG = encode(ARRAY, "PNG")
HEADER_END = 33  # of a PNG
XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'


def decode(data: bytes) -> Pixels:
    header = read_header(data, max_pixels=10_000)
    size = (header.height, header.width) if header.orientation < 5 else (header.width, header.height)
    return decode_image(data, size=size, max_pixels=10_000)


def chunk(name: bytes, body: bytes, *, damaged: bool = False) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body) ^ damaged)


def with_chunk(*args: bytes, damaged: bool = False) -> bytes:
    return PNG[:HEADER_END] + chunk(*args, damaged=damaged) + PNG[HEADER_END:]


@pytest.mark.parametrize("name", ["png_ztxt_1048576.png", "png_ztxt_1048577.png", "png_iccp_1048577.png"])
def test_packed_metadata_of_any_size_is_passed_over(name: str) -> None:
    assert decode((DATA / name).read_bytes()).tolist() == [[[200, 30, 40]]]


@pytest.mark.parametrize(
    ("name", "body"),
    [
        (b"zTXt", b"k\0\0" + zlib.compress(bytes(2 << 20))),
        (b"iTXt", b"k\0\1\0\0\0" + zlib.compress(bytes(2 << 20))),
        (b"iCCP", b"k\0\0" + zlib.compress(bytes(2 << 20))),
        (b"tEXt", b"k\0" + bytes(2 << 20)),
        (b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(bytes(2 << 20))),
        (b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(bytes(2 << 20))),
        (b"eXIf", bytes(2 << 20)),
        (b"gAMA", b""),
        (b"acTL", b""),
    ],
)
@pytest.mark.parametrize("damaged", [False, True])
def test_any_chunk_that_pixels_do_not_need_is_passed_over(name: bytes, body: bytes, damaged: bool) -> None:
    np.testing.assert_array_equal(decode(with_chunk(name, body, damaged=damaged)), ARRAY)


def test_a_wrong_checksum_of_text_is_passed_over() -> None:
    assert decode((DATA / "png_crc_of_text.png").read_bytes()).tolist() == [[[200, 30, 40]]]


def test_a_wrong_checksum_of_what_pixels_need_is_damage() -> None:
    with pytest.raises(TruncatedImage):
        decode(with_chunk(b"tRNS", bytes(6), damaged=True))


# What turns an image


def profile(block: bytes) -> bytes:
    """EXIF as ImageMagick writes it into text."""
    return b"\nexif\n%8d\n" % len(block) + b"\n".join(block.hex().encode()[at : at + 72] for at in range(0, 999, 72))


EXIF = exif(6).tobytes()


@pytest.mark.parametrize(
    ("name", "body"),
    [
        (b"eXIf", EXIF.removeprefix(b"Exif\0\0")),
        (b"eXIf", EXIF),
        (b"tEXt", b"Raw profile type exif\0" + profile(EXIF)),
        (b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(profile(EXIF))),
        (b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP),
        (b"iTXt", b"XML:com.adobe.xmp\0\1\0en\0x\0" + zlib.compress(XMP)),
    ],
    ids=["eXIf", "eXIf with a prefix", "text", "packed text", "XMP", "packed XMP"],
)
def test_a_png_is_turned_by_each_place_for_an_orientation(name: bytes, body: bytes) -> None:
    np.testing.assert_array_equal(decode(with_chunk(name, body)), TURNED)
    np.testing.assert_array_equal(decode(with_chunk(name, body, damaged=True)), ARRAY)


def test_a_png_is_turned_by_what_stands_behind_its_pixels() -> None:
    np.testing.assert_array_equal(decode(PNG[:-12] + chunk(b"eXIf", EXIF) + PNG[-12:]), TURNED)


@pytest.mark.parametrize("name", ["JPEG", "WEBP"])
@pytest.mark.parametrize("key", ["exif", "xmp"])
def test_jpeg_and_webp_are_turned_by_exif_and_xmp(name: str, key: str) -> None:
    metadata = {key: EXIF if key == "exif" else XMP}
    options = {"lossless": True} if name == "WEBP" else {}
    data = encode(ARRAY, name, **options, **metadata)
    plain = np.asarray(Image.open(BytesIO(data)).convert("RGB"))
    np.testing.assert_array_equal(decode(data), np.rot90(plain, -1))


def test_tiff_is_turned_by_its_tag_and_by_xmp() -> None:
    np.testing.assert_array_equal(decode(encode(ARRAY, "TIFF", tiffinfo={274: 6})), TURNED)
    np.testing.assert_array_equal(decode(encode(ARRAY, "TIFF", tiffinfo={700: XMP})), TURNED)
    np.testing.assert_array_equal(decode(encode(ARRAY, "TIFF", tiffinfo={274: 1, 700: XMP})), ARRAY)


def test_exif_goes_before_xmp() -> None:
    data = PNG[:HEADER_END] + chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP) + PNG[HEADER_END:]
    upright = chunk(b"eXIf", exif(1).tobytes())
    np.testing.assert_array_equal(decode(data[:HEADER_END] + upright + data[HEADER_END:]), ARRAY)


@pytest.mark.parametrize("value", [0, 9, 65535])
def test_an_orientation_that_there_is_not_turns_nothing(value: int) -> None:
    np.testing.assert_array_equal(decode(with_chunk(b"eXIf", exif(value).tobytes())), ARRAY)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("kind", ["B", "H", "I"])
def test_an_orientation_of_any_whole_number(order: str, kind: str) -> None:
    number = {"B": 1, "H": 3, "I": 4}[kind]
    value = struct.pack(order + kind, 6).ljust(4, b"\0")
    block = struct.pack(order + "2sHIHHHI", b"II" if order == "<" else b"MM", 42, 8, 1, 0x0112, number, 1) + value
    assert orientation.of_exif(b"Exif\0\0" + block) == 6
    assert orientation.of_exif(block) == 6
    for end in range(len(block)):
        assert orientation.of_exif(block[:end]) in (None, 6), end


def test_every_cut_and_every_changed_byte_of_exif_is_no_error() -> None:
    for place in range(len(EXIF)):
        for byte in (0, 1, 0x7F, 0xFF):
            orientation.of_exif(EXIF[:place] + bytes((byte,)) + EXIF[place + 1 :])


def test_pillow_reads_the_same_orientation_from_its_own_files() -> None:
    info = PngImagePlugin.PngInfo()
    info.add_itxt("XML:com.adobe.xmp", XMP.decode())
    for way in range(1, 9):
        assert orientation.of_exif(exif(way).tobytes()) == way
        assert read_header(encode(ARRAY, "PNG", exif=exif(way)), max_pixels=10_000).orientation == way
    assert read_header(encode(ARRAY, "PNG", pnginfo=info), max_pixels=10_000).orientation == 6
