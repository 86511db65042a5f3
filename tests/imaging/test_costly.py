"""Files of few pixels that cost a decoder seconds or gigabytes: refused by their structure, or as cheap as any."""

import random
import struct
import zlib
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from imaging.decoder import decode
from imaging.errors import ImageError, ImageTooCostly, TruncatedImage
from imaging.formats import is_cheap, read_header
from imaging.structure import gif, jpeg, png, tiff, webp
from tests.imaging.files import Pixels, all_files, encode, pixels
from tests.imaging.test_metadata import chunk

ARRAY = pixels()
JPEG, PNG, GIF, WEBP = (encode(ARRAY, name) for name in ("JPEG", "PNG", "GIF", "WEBP"))
HEADER_END = 33  # of a PNG
MANY = 100_000
MAX_PIXELS = 50_000_000
IMAGE = 13 + 3 * 256  # where the first block of a GIF lies


def decoded(data: bytes) -> Pixels:
    return decode(read_header(data, max_pixels=MAX_PIXELS), size=(32, 32))


def segment(code: int, body: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, code, len(body) + 2) + body


def bmp(width: int, height: int, compression: int, data: bytes) -> bytes:
    bits = {0: 8, 1: 8, 2: 4}[compression]
    info = struct.pack("<IiiHHIIiiII", 40, width, height, 1, bits, compression, 0, 0, 0, 0, 0)
    palette = bytes(range(256)) * (4 if bits == 8 else 1)
    palette = palette[: 4 << bits]
    return b"BM" + struct.pack("<IHHI", 0, 0, 0, 54 + len(palette)) + info + palette + data


def tiff_of(tags: dict[int, int | tuple[int, bytes]], data: bytes = b"") -> bytes:
    """A TIFF of numbers, and of lists of SHORT (count, bytes); `data` begins at 2048."""
    behind = 2048 + len(data)
    entries, lists = b"", b""
    for tag, value in sorted(tags.items()):
        if isinstance(value, int):
            entries += struct.pack("<HHII", tag, 4, 1, value)
        else:
            entries += struct.pack("<HHII", tag, 3, value[0], behind + len(lists))
            lists += value[1]
    return (struct.pack("<2sHIH", b"II", 42, 8, len(tags)) + entries).ljust(2048, b"\0") + data + lists


GREY = {256: 16, 257: 16, 258: 8, 259: 8, 262: 1, 277: 1}
TILE = zlib.compress(bytes(7040 * 7040))


def strips(count: int) -> bytes:
    return tiff_of({**GREY, 259: 1, 273: (count, bytes(2 * count)), 278: 1})


REFUSED: dict[str, Callable[[], bytes]] = {
    "TIFF, one tile of 7040 x 7040 for 16 x 16": lambda: tiff_of(
        GREY | {322: 7040, 323: 7040, 324: 2048, 325: len(TILE)}, TILE
    ),
    "TIFF, tiles that libtiff sees and Pillow does not": lambda: tiff_of(
        GREY | {273: 2048, 278: 16, 322: 7040, 323: 7040, 324: 2048, 325: len(TILE)}, TILE
    ),
    "TIFF, more strips than anybody writes": lambda: strips(tiff.MAX_PIECES + 1),
    "TIFF, a row in each of many strips": lambda: tiff_of(GREY | {257: tiff.MAX_PIECES + 1, 278: 1, 273: 2048}),
    "TIFF, a pixel in each of many tiles": lambda: tiff_of(GREY | {256: 200, 257: 200, 322: 1, 323: 1, 324: 2048}),
    "TIFF, strips that share their bytes": lambda: tiff_of(
        GREY | {257: 1000, 278: 1, 273: (1000, bytes(2000)), 279: (1000, b"\xff" * 2000)}
    ),
    "TIFF, very many tags": lambda: struct.pack("<2sHIH", b"II", 42, 8, 65535) + bytes(12 * 65535),
    "TIFF, very many bits": lambda: tiff_of(GREY | {258: (1 << 20, bytes(2 << 20)), 273: 2048}),
    "TIFF, very many scans of a JPEG": lambda: tiff_of(GREY | {259: 7, 273: 2048}, b"\xff\xda\0\x08\x01" * 101),
    "BMP, run lengths of 8 bits": lambda: bmp(49_999_999, 1, 1, b"\1\1\0\0\0\1"),
    "BMP, run lengths of 4 bits": lambda: bmp(1, 49_999_999, 2, b"\1\1\0\0\0\1"),
    "BMP, very many empty rows": lambda: bmp(1024, 1024, 1, b"\0\0" * (1 << 22)),
    "JPEG, empty segments": lambda: JPEG[:2] + segment(0xFE, b"") * MANY + JPEG[2:],
    "JPEG, small segments of EXIF": lambda: JPEG[:2] + segment(0xE1, b"Exif\0\0II*\0") * MANY + JPEG[2:],
    "JPEG, restarts before its scan": lambda: JPEG[:2] + b"\xff\xd0" * MANY + JPEG[2:],
    "JPEG, tables": lambda: JPEG[:2] + segment(0xDB, bytes(65 * 1000)) * 2 + JPEG[2:],
    "JPEG, scans": lambda: with_scans(101),
    "JPEG, segments behind its scan, and no end": lambda: JPEG[:-2] + segment(0xFE, b"") * MANY,
    "PNG, empty chunks": lambda: PNG[:HEADER_END] + chunk(b"IDAT", b"") * MANY + PNG[HEADER_END:],
    "GIF, blocks of a comment": lambda: GIF[:IMAGE] + b"!\xfe" + b"\1a" * MANY + b"\0" + GIF[IMAGE:],
    "GIF, empty comments": lambda: GIF[:IMAGE] + b"!\xfe\0" * MANY + GIF[IMAGE:],
    "GIF, junk": lambda: GIF[:IMAGE] + bytes(MANY) + GIF[IMAGE:],
    "WebP, chunks": lambda: webp_with(b"ABCD\0\0\0\0" * MANY),
}


def with_scans(scans: int) -> bytes:
    """A progressive JPEG whose last scan is there so often."""
    data = encode(pixels(40, 60), "JPEG", progressive=True)
    scan = data[data.rindex(b"\xff\xda") : -2]
    return data[:-2] + scan * (scans - data.count(b"\xff\xda")) + data[-2:]


def webp_with(chunks: bytes) -> bytes:
    """An extended WebP with more chunks."""
    data = encode(ARRAY, "WEBP", exif=b"Exif\0\0II*\0") + chunks
    return data[:4] + struct.pack("<I", len(data) - 8) + data[8:]


@pytest.mark.parametrize("name", REFUSED)
def test_a_structure_that_costs_far_more_than_its_pixels_is_refused(name: str) -> None:
    with pytest.raises(ImageTooCostly, match=r"save it|far larger|more bytes"):
        read_header(REFUSED[name](), max_pixels=MAX_PIXELS)


BOMB = zlib.compress(bytes(1 << 20))
TAGS = struct.pack("<2sHIH", b"II", 42, 8, 4000) + struct.pack("<HHII", 700, 1, 60_000, 100) * 4000
HARMLESS: dict[str, Callable[[], bytes]] = {
    "JPEG, full segments of EXIF": lambda: JPEG[:2] + segment(0xE1, b"Exif\0\0" + bytes(65_000)) * 200 + JPEG[2:],
    "JPEG, EXIF whose tags share their bytes": lambda: JPEG[:2] + segment(0xE1, b"Exif\0\0" + TAGS) + JPEG[2:],
    "JPEG, profiles": lambda: JPEG[:2] + segment(0xE2, b"ICC_PROFILE\0\1\1" + bytes(65_000)) * 200 + JPEG[2:],
    "JPEG, segments behind its end": lambda: JPEG + segment(0xFE, b"") * MANY,
    "PNG, thousands of profiles": lambda: PNG[:HEADER_END] + chunk(b"iCCP", b"x\0\0" + BOMB) * 3500 + PNG[HEADER_END:],
    "PNG, packed text": lambda: PNG[:HEADER_END] + chunk(b"zTXt", b"k\0\0" + BOMB) * 28 + PNG[HEADER_END:],
    "PNG, packed EXIF": lambda: (
        PNG[:HEADER_END] + chunk(b"zTXt", b"Raw profile type exif\0\0" + BOMB) * 3500 + PNG[HEADER_END:]
    ),
    "GIF, comments": lambda: GIF[:IMAGE] + b"!\xfe" + (b"\xff" + bytes(255)) * 10_000 + b"\0" + GIF[IMAGE:],
    "WebP, chunks": lambda: webp_with(b"ABCD\0\0\0\0" * 10_000),
}


@pytest.mark.parametrize("name", HARMLESS)
def test_metadata_never_reaches_the_decoder(name: str) -> None:
    """Of what is passed over, nothing is in the file that Pillow gets; WebP's decoder takes it as it comes."""
    header = read_header(HARMLESS[name](), max_pixels=MAX_PIXELS)
    plain = {"JPEG": JPEG, "PNG": PNG, "GIF": GIF, "WEBP": WEBP}[header.format]
    if header.format != "WEBP":
        assert len(header.essential()) <= len(plain)
    np.testing.assert_array_equal(decode(header, size=(32, 32)), decoded(plain))


def test_files_at_the_limits_are_read() -> None:
    many = 15 * 1024
    assert read_header(strips(tiff.MAX_PIECES), max_pixels=MAX_PIXELS).pixels == 256
    assert decoded(JPEG[:2] + segment(0xFE, b"") * (jpeg.MAX_SEGMENTS - 20) + JPEG[2:]).shape == (32, 32, 3)
    assert decoded(PNG[:HEADER_END] + chunk(b"IDAT", b"") * (png.MAX_CHUNKS - 20) + PNG[HEADER_END:]).any()
    assert decoded(GIF[:IMAGE] + b"!\xfe\0" * (gif.MAX_BLOCKS - 20) + GIF[IMAGE:]).any()
    assert many < webp.MAX_CHUNKS
    assert read_header(with_scans(100), max_pixels=10_000).pixels == 60 * 40


def test_a_small_image_may_lie_in_one_tile_of_the_usual_size() -> None:
    tile = np.zeros((512, 512), np.uint8)
    tile[:16, :16] = 200
    packed = zlib.compress(tile.tobytes())
    data = tiff_of(GREY | {322: 512, 323: 512, 324: 2048, 325: len(packed)}, packed)
    assert (decoded(data) == 200).all()


@pytest.mark.parametrize("kind", [1, 3, 4, 8])
def test_numbers_of_bytes_may_have_any_type(kind: int) -> None:
    packed = zlib.compress(bytes([200]) * 256)
    data = tiff_of(GREY | {273: 2048, 279: len(packed)}, packed + bytes(1000))
    entry = struct.pack("<HHI", 279, 4, 1)
    assert (decoded(data.replace(entry, struct.pack("<HHI", 279, kind, 1))) == 200).all()


@pytest.mark.parametrize("name", ["TIFF", "TIFF LZW", "TIFF JPEG"])
def test_tiffs_in_strips_of_a_row_are_read(name: str) -> None:
    options = {"TIFF": {}, "TIFF LZW": {"compression": "tiff_lzw"}, "TIFF JPEG": {"compression": "jpeg"}}[name]
    array = pixels(200, 32)
    data = encode(array, "TIFF", strip_size=32 * 3 * 8, **options)
    assert np.abs(decode(read_header(data, max_pixels=10_000), size=(200, 32)).astype(int) - array).mean() < 6


def test_what_looks_like_scans_in_a_film_behind_an_image_is_none() -> None:
    film = random.Random(0).randbytes(2**24)
    assert film.count(b"\xff\xda") > 200
    assert read_header(encode(pixels(40, 60), "JPEG") + film, max_pixels=10_000).pixels == 60 * 40


# Cheap: what needs no process of its own


@pytest.mark.parametrize("name", all_files(ARRAY))
def test_only_jpeg_and_png_are_cheap(name: str) -> None:
    header = read_header(all_files(ARRAY)[name], max_pixels=10_000)
    assert is_cheap(header, max_pixels=65_536) is name.startswith(("JPEG", "PNG"))


def test_a_large_one_is_not_cheap() -> None:
    for name in ("JPEG", "PNG"):
        header = read_header(encode(ARRAY, name), max_pixels=10_000)
        assert is_cheap(header, max_pixels=1024)
        assert not is_cheap(header, max_pixels=1023)


def test_each_scan_of_a_jpeg_counts() -> None:
    data = encode(ARRAY, "JPEG", progressive=True)
    header = read_header(data, max_pixels=10_000)
    assert header.passes == data.count(jpeg.SCAN) > 5
    assert is_cheap(header, max_pixels=1024 * header.passes)
    assert not is_cheap(header, max_pixels=1024 * header.passes - 1)


@pytest.mark.parametrize(
    "data",
    [
        JPEG[:2] + segment(0xFE, b"") * 64 + JPEG[2:],
        JPEG[:-2],  # whether its pixels are there takes a decoder
        JPEG.replace(b"\xff\xc0", b"\xff\xc9"),  # arithmetic coding
        PNG[:HEADER_END] + chunk(b"IDAT", b"") * 64 + PNG[HEADER_END:],
    ],
    ids=["segments", "no end", "arithmetic", "chunks"],
)
def test_unusual_structures_are_not_cheap(data: bytes) -> None:
    assert not is_cheap(read_header(data, max_pixels=10_000), max_pixels=MAX_PIXELS)


def test_the_walk_reads_no_pixels() -> None:
    """A header is all there is: no walker unpacks what lies behind."""
    assert read_header(PNG[: PNG.index(b"IDAT") + 5], max_pixels=10_000).pixels == 1024
    with pytest.raises(TruncatedImage):
        decoded(PNG[: PNG.index(b"IDAT") + 5])


@pytest.mark.parametrize("name", all_files(ARRAY))
def test_a_walker_raises_nothing_but_its_errors_at_whatever_is_cut_or_changed(name: str) -> None:
    data = all_files(ARRAY)[name]
    rng = random.Random(name)
    for _ in range(400):
        changed = bytearray(data[: rng.randrange(len(data)) if rng.random() < 0.3 else None])
        for _ in range(rng.randrange(4)):
            if changed:
                changed[rng.randrange(min(len(changed), 700))] = rng.choice((0, 1, 127, 128, 255, rng.randrange(256)))
        try:
            header = read_header(bytes(changed), max_pixels=MAX_PIXELS)
        except ImageError:
            continue
        assert header.essential()
        assert 0 < header.pixels <= MAX_PIXELS


def test_large_images_of_each_kind_are_not_costly() -> None:
    large = np.zeros((3000, 2000, 3), np.uint8)
    for name in ("JPEG", "PNG", "BMP", "TIFF", "GIF"):
        assert read_header(encode(large, name), max_pixels=MAX_PIXELS).pixels == large.size // 3
    packed = encode(Image.fromarray(large), "TIFF", compression="tiff_lzw")
    assert read_header(packed, max_pixels=MAX_PIXELS).pixels == large.size // 3
