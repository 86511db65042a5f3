"""PNG: chunks, of which pixels need five kinds."""

import zlib
from collections.abc import Iterator
from typing import Final

from imaging.errors import TruncatedImage
from imaging.structure import orientation
from imaging.structure.header import Header, check_count

SIGNATURE: Final = b"\x89PNG\r\n\x1a\n"
NEEDED: Final = frozenset({b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"})
TEXTS: Final = frozenset({b"tEXt", b"zTXt", b"iTXt"})
# Where ImageMagick and exiftool keep EXIF: in the chunk of its own, or as text of three lines and hexadecimal.
EXIF: Final = b"eXIf"
EXIF_TEXT: Final = b"Raw profile type exif"
XMP_TEXT: Final = b"XML:com.adobe.xmp"
MAX_TEXT_BYTES: Final = 1 << 16  # unpacked; an orientation stands near the beginning

MAX_CHUNKS: Final = 20_000  # 33 MB in chunks of 1.6 KB
MAX_CHEAP_CHUNKS: Final = 64
TRUE_COLOUR: Final = 2


def read_header(data: bytes) -> Header:
    """Walk the chunks.

    Raises:
        TruncatedImage: there is no header, or no pixels behind it.
        ImageTooCostly: there are too many chunks.
    """
    view = memoryview(data)
    parts: list[bytes | memoryview] = [SIGNATURE]
    metadata: dict[bytes, bytes] = {}
    seen: set[bytes] = set()
    chunks = 0
    for name, start, end in walk(data):
        chunks += 1
        if name in NEEDED:
            if name == b"IDAT" or name not in seen:
                parts.append(view[start:end])
            seen.add(name)
            if name == b"IEND":
                break
        else:
            key = metadata_key(data, name, start)
            if key and key not in metadata and is_whole(view[start:end]):
                metadata[key] = data[start:end]
    if b"IDAT" not in seen or data[12:16] != b"IHDR" or len(parts[1]) != 25:
        raise TruncatedImage("The PNG image is truncated or damaged: it ends before its pixels begin.")
    width, height = int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")
    if not width or not height:
        raise TruncatedImage(f"The PNG image is damaged: its header announces {width} x {height} pixels.")
    header = Header("PNG", width, height, parts, read_orientation(metadata))
    if chunks <= MAX_CHEAP_CHUNKS:
        has_key = b"tRNS" in seen and data[24:26] == bytes((16, TRUE_COLOUR))
        header.passes = 2 if has_key else 1
    return header


def walk(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Yield name, start and end of each chunk; of a last one that is cut off, as much as there is."""
    position, count = len(SIGNATURE), 0
    while position + 8 <= len(data):
        end = position + 12 + int.from_bytes(data[position : position + 4], "big")
        yield data[position + 4 : position + 8], position, min(end, len(data))
        position = end
        count += 1
        check_count(count, MAX_CHUNKS, "chunks")


def metadata_key(data: bytes, name: bytes, start: int) -> bytes | None:
    """Return which metadata with an orientation a chunk holds; None: none."""
    if name == EXIF:
        return EXIF
    if name in TEXTS:
        return next((key for key in (EXIF_TEXT, XMP_TEXT) if data.startswith(key + b"\0", start + 8)), None)
    return None


def read_orientation(metadata: dict[bytes, bytes]) -> int:
    """Read an image's orientation from chunks by what they hold."""
    exif = xmp = None
    if EXIF in metadata:
        exif = orientation.of_exif(metadata[EXIF][8:-4])
    elif EXIF_TEXT in metadata:
        exif = of_exif_text(unpacked(metadata[EXIF_TEXT]))
    if XMP_TEXT in metadata:
        xmp = orientation.of_xmp(unpacked(metadata[XMP_TEXT]))
    return orientation.chosen(exif, xmp)


def is_whole(chunk: memoryview) -> bool:
    """Whether a chunk has the checksum that stands behind it."""
    return len(chunk) >= 12 and zlib.crc32(chunk[4:-4]) == int.from_bytes(chunk[-4:], "big")


def unpacked(chunk: bytes) -> bytes:
    """Return the beginning of a chunk's text; b"" where it can't be unpacked."""
    name = chunk[4:8]
    _, _, text = chunk[8:-4].partition(b"\0")
    if name == b"iTXt":
        is_packed, text = text[:1] == b"\1", text[2:].split(b"\0", 2)[-1]
    else:
        is_packed, text = name == b"zTXt", text[1:] if name == b"zTXt" else text
    if not is_packed:
        return text
    try:
        return zlib.decompressobj().decompress(text, MAX_TEXT_BYTES)
    except zlib.error:
        return b""


def of_exif_text(text: bytes) -> int | None:
    """Return the orientation in EXIF that is written as hexadecimal."""
    digits = b"".join(text.split(b"\n")[3:])
    try:
        return orientation.of_exif(bytes.fromhex(digits[: len(digits) // 2 * 2].decode("ascii")))
    except ValueError:
        return None
