"""TIFF: a list of tags says where strips or tiles of pixels lie.

The decoder gets a list of its own, appended to the file, with the tags that pixels need.
"""

import struct
from typing import Final

import numpy as np

from imaging.errors import ImageTooCostly, TruncatedImage, UnsupportedFormat
from imaging.structure import jpeg, orientation
from imaging.structure.directory import MAX_TAGS, Directory, read_directory
from imaging.structure.header import Header, check_count

WIDTH: Final = 256
HEIGHT: Final = 257
BITS: Final = 258
COMPRESSION: Final = 259
PHOTOMETRIC: Final = 262
STRIP_OFFSETS: Final = 273
SAMPLES: Final = 277
ROWS_PER_STRIP: Final = 278
STRIP_BYTES: Final = 279
PLANES: Final = 284
TILE_WIDTH: Final = 322
TILE_HEIGHT: Final = 323
TILE_OFFSETS: Final = 324
TILE_BYTES: Final = 325
EXTRA_SAMPLES: Final = 338
SUBSAMPLING: Final = 530
XMP: Final = 700
LISTS: Final = frozenset({STRIP_OFFSETS, STRIP_BYTES, TILE_OFFSETS, TILE_BYTES})

# Beside what is named here: fill order, options of CCITT's codes, predictor, colours of a palette, sample format,
# tables and offsets of JPEG, and what YCbCr means.
NEEDED: Final = LISTS | frozenset(
    {WIDTH, HEIGHT, BITS, COMPRESSION, PHOTOMETRIC, SAMPLES, ROWS_PER_STRIP, PLANES, TILE_WIDTH, TILE_HEIGHT}
    | {EXTRA_SAMPLES, SUBSAMPLING}
    | {266, 292, 293, 317, 320, 339, 347, 512, 513, 514, 515, 519, 520, 521, 529, 531, 532, 0xBC01}
)
UNCOMPRESSED: Final = 1
JPEG_COMPRESSIONS: Final = frozenset({6, 7})
COMPRESSIONS: Final = JPEG_COMPRESSIONS | {UNCOMPRESSED, 2, 3, 4, 5, 8, 32771, 32773, 32809, 32946, 34676, 34677}
RARE_COMPRESSIONS: Final = frozenset({34925, 50000, 50001})  # LZMA, Zstandard, WebP: as libtiff was built
RGB, YCBCR = 2, 6
ALPHAS: Final = {False: ([2],), True: ([1], [2])}  # extra samples, by whether it is compressed; 1: multiplied by it
CHANNELS: Final = {0: 1, 1: 1, RGB: 3, 5: 4}  # by photometric interpretation: grey either way, RGB, CMYK

MAX_PIECES: Final = 16_384  # strips or tiles: each costs Pillow about 10 us
MAX_VALUES: Final = 3 << 16  # of another tag: the colours of a palette of 16 bits
# A tile may reach over the image's edge, and a small image lie in one tile of the usual size.
SPARE_PIXELS: Final = 1 << 20
MAX_EXCESS: Final = 4  # times the image's pixels


def read_header(data: bytes) -> Header:
    """Walk the first list of tags.

    Raises:
        TruncatedImage, UnsupportedFormat, ImageTooCostly
    """
    if data.startswith(b"MM\0+"):
        raise UnsupportedFormat("BigTIFF is decoded in little-endian byte order alone; save the image as a plain TIFF.")
    try:
        directory = read_directory(data)
        check_count(directory.count, MAX_TAGS, "tags")
        return read_tags(directory)
    except ValueError as error:
        raise TruncatedImage("The TIFF image is truncated or damaged: its tags can't be read.") from error


def read_tags(directory: Directory) -> Header:
    """Check what the tags announce; ValueError where they are damaged."""
    width, height = directory.first(WIDTH), directory.first(HEIGHT)
    compression = directory.first(COMPRESSION, UNCOMPRESSED)
    if not width or not height or width < 0 or height < 0:
        raise ValueError
    if compression not in COMPRESSIONS | RARE_COMPRESSIONS:
        raise UnsupportedFormat(f"TIFF with compression {compression} is not supported; use LZW or deflate.")
    for tag, entry in directory.entries.items():
        if tag in NEEDED and entry.start + entry.size > len(directory.data):
            raise ValueError
        if tag in NEEDED and tag not in LISTS:
            check_count(entry.count, MAX_VALUES, "values of a tag")
    if compression not in JPEG_COMPRESSIONS:
        check_layout(directory, is_compressed=compression != UNCOMPRESSED)
    pieces = check_pieces(directory, width, height)
    if compression != UNCOMPRESSED:
        check_bytes(directory)
    if compression in JPEG_COMPRESSIONS:
        jpeg.check_scans(directory.data, pieces)
    xmp = directory.entries.get(XMP)
    packet = directory.data[xmp.start : xmp.start + xmp.size] if xmp else b""
    turned = orientation.chosen(directory.first(orientation.ORIENTATION), orientation.of_xmp(packet))
    return Header("TIFF", width, height, with_needed_tags(directory), turned)


def check_layout(directory: Directory, *, is_compressed: bool) -> None:
    """Raise UnsupportedFormat for what Pillow would take for other pixels without a word, or call damaged."""
    photometric = directory.first(PHOTOMETRIC, 0)
    if photometric == YCBCR and not is_compressed and directory.all(SUBSAMPLING).tolist() != [1, 1]:
        raise UnsupportedFormat("TIFF with subsampled YCbCr is decoded with compression alone; save it as RGB.")
    samples = directory.first(SAMPLES, 1)
    if directory.first(PLANES) != 2 or samples == 1:
        return
    extra = directory.all(EXTRA_SAMPLES).tolist()
    if photometric == RGB and extra in ALPHAS[is_compressed]:
        is_known = True
    else:
        is_known = not any(extra) if is_compressed else not extra
    if not is_known or samples != CHANNELS.get(photometric or 0, 0) + len(extra):
        raise UnsupportedFormat(
            "TIFF with a plane for each channel is decoded of RGB and CMYK, and with an alpha of RGB; "
            "save it with the channels of a pixel together."
        )


def check_pieces(directory: Directory, width: int, height: int) -> int:
    """Return how many strips or tiles hold the image; ImageTooCostly where their decoder would do far more."""
    across: int | None = width
    down = directory.first(ROWS_PER_STRIP, height)
    is_tiled = STRIP_OFFSETS not in directory.entries and TILE_OFFSETS in directory.entries
    if is_tiled or TILE_WIDTH in directory.entries:  # libtiff goes by the one, Pillow by the other
        across, down = directory.first(TILE_WIDTH, width), directory.first(TILE_HEIGHT, height)
        if across and down:
            check_tile(across, down, width, height)
    else:
        down = min(down or 0, height)
    if not across or not down or across < 0 or down < 0:
        raise ValueError
    planes = directory.first(SAMPLES, 1) if directory.first(PLANES) == 2 else 1
    pieces = -(-width // across) * -(-height // down) * max(planes or 1, 1)
    listed = max((entry.count for tag, entry in directory.entries.items() if tag in LISTS), default=0)
    check_count(max(pieces, listed), MAX_PIECES, "strips or tiles")
    return pieces


def check_bytes(directory: Directory) -> None:
    """Raise ImageTooCostly for pieces that share their bytes, which would be read again and again."""
    size = len(directory.data)
    for tag in (STRIP_BYTES, TILE_BYTES):
        if np.minimum(directory.all(tag).astype(np.uint64), np.uint64(size)).sum() > 2 * size:
            raise ImageTooCostly("The TIFF's strips or tiles have more bytes than the file has; save it again.")


def check_tile(across: int, down: int, width: int, height: int) -> None:
    """Raise ImageTooCostly for tiles that have far more pixels than the image: they are decoded as a whole."""
    decoded = -(-width // across) * across * -(-height // down) * down
    if decoded > MAX_EXCESS * width * height + SPARE_PIXELS:
        raise ImageTooCostly(
            f"The TIFF's tiles of {across} x {down} pixels are far larger than its image of {width} x {height}; "
            "save it again with smaller tiles."
        )


def with_needed_tags(directory: Directory) -> list[bytes | memoryview]:
    """Return the file with another list of tags behind it, to which its header points."""
    data, order = directory.data, directory.order
    needed = [entry.raw for tag, entry in directory.entries.items() if tag in NEEDED and entry.count]
    if (directory.first(SAMPLES) or 1) == 1:  # planes of one channel are none, and Pillow can't read them of 16 bits
        needed = [raw for raw in needed if struct.unpack_from(order + "H", raw)[0] != PLANES]
    padding = bytes(len(data) % 2)
    place = len(data) + len(padding)
    view = memoryview(data)
    if directory.is_big:
        tags = struct.pack(order + "Q", len(needed)) + b"".join(needed) + bytes(8)
        return [view[:8], struct.pack(order + "Q", place), view[16:], padding, tags]
    tags = struct.pack(order + "H", len(needed)) + b"".join(needed) + bytes(4)
    return [view[:4], struct.pack(order + "I", place), view[8:], padding, tags]
