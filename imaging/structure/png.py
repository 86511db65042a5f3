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
# Where ImageMagick and exiftool keep EXIF in text: three lines, then hexadecimal.
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
    exif = xmp = exif_text = None
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
        elif name == b"eXIf" and exif is None and is_whole(view[start:end]):
            exif = orientation.of_exif(data[start + 8 : end - 4])
        elif name in TEXTS and is_whole(view[start:end]):
            keyword, _, text = data[start + 8 : end - 4].partition(b"\0")
            if keyword == EXIF_TEXT and exif_text is None:
                exif_text = of_exif_text(unpacked(name, text))
            elif keyword == XMP_TEXT and xmp is None:
                xmp = orientation.of_xmp(unpacked(name, text))
    if b"IDAT" not in seen or data[12:16] != b"IHDR" or len(parts[1]) != 25:
        raise TruncatedImage("The PNG image is truncated or damaged: it ends before its pixels begin.")
    width, height = int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")
    if not width or not height:
        raise TruncatedImage(f"The PNG image is damaged: its header announces {width} x {height} pixels.")
    turned = orientation.chosen(exif if exif is not None else exif_text, xmp)
    header = Header("PNG", width, height, parts, turned)
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


def is_whole(chunk: memoryview) -> bool:
    """Whether a chunk has the checksum that stands behind it."""
    return len(chunk) >= 12 and zlib.crc32(chunk[4:-4]) == int.from_bytes(chunk[-4:], "big")


def unpacked(name: bytes, text: bytes) -> bytes:
    """Return the beginning of the text behind a keyword and its zero; b"" where it can't be unpacked."""
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
