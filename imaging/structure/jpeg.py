"""JPEG: segments, the pixels in scans behind the last of them."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from simplejpeg import decode_jpeg

from imaging.errors import ImageTooCostly, TruncatedImage, UnsupportedFormat
from imaging.structure import orientation
from imaging.structure.header import Header, check_count

SOI: Final = b"\xff\xd8"
EOI: Final = b"\xff\xd9"
SCAN: Final = b"\xff\xda"
# As libjpeg looks for one: past junk, past any number of 0xFF.
MARKER: Final = re.compile(rb"\xff([^\xff\0])")
# Within a scan there may be restarts, too.
MARKER_IN_SCAN: Final = re.compile(rb"\xff([^\xff\0\x01\xd0-\xd7])")
# The marker, its length and the number of channels: the marker alone also occurs in films behind a phone's images.
SCAN_HEAD: Final = re.compile(rb"\xff\xda\0(?:\x08\x01|\x0a\x02|\x0c\x03|\x0e\x04)")

WITHOUT_LENGTH: Final = frozenset({0x01, *range(0xD0, 0xD9)})
FRAMES: Final = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
# Arithmetic coding and lossless JPEG are libjpeg-turbo's to decode; hierarchical files are nobody's.
UNSUPPORTED_FRAMES: Final = frozenset({0xC5, 0xC6, 0xC7, 0xCB, 0xCD, 0xCE, 0xCF})
HUFFMAN_FRAMES: Final = frozenset({0xC0, 0xC1, 0xC2})
END, START_OF_SCAN, APP0, APP1, APP14 = 0xD9, 0xDA, 0xE0, 0xE1, 0xEE
TABLES: Final = frozenset({0xC4, 0xCC, 0xDB, 0xDD})
BEHIND_SCANS: Final = TABLES | {START_OF_SCAN, 0xDC, 0xFE, *range(0xE0, 0xF0)}

MAX_SEGMENTS: Final = 5000  # extended XMP and depth maps take hundreds of 64 KiB each
MAX_TABLE_BYTES: Final = 1 << 16  # twenty times what four tables of each kind take
# A progressive JPEG comes in scans, each a pass over all pixels, which an empty one costs too. Encoders make about ten.
MAX_SCANS: Final = 100
MAX_CHEAP_SEGMENTS: Final = 64
ALL_COEFFICIENTS: Final = (1 << 64) - 1


@dataclass(slots=True)
class JpegHeader(Header):
    """What a JPEG says before its pixels.

    Attributes:
        sampling: horizontal and vertical factor of each channel.
        has_end: whether the end of the image is marked. Where it is not, `is_whole` tells if its pixels are there.
    """

    sampling: tuple[tuple[int, int], ...] = ()
    has_end: bool = True


def read_header(data: bytes) -> JpegHeader:
    """Walk the segments before the first scan; behind it only where the file does not end as a JPEG does.

    Raises:
        TruncatedImage, UnsupportedFormat, ImageTooCostly
    """
    view = memoryview(data)
    parts: list[bytes | memoryview] = [SOI]
    frame: tuple[int, memoryview] | None = None
    exif = xmp = b""
    segments = table_bytes = 0
    for code, start, body, end in walk(data):
        segments += 1
        if code == START_OF_SCAN:
            break
        if code in TABLES:
            table_bytes += end - start
            parts.append(view[start:end])
        elif code in FRAMES:
            if frame is None:
                frame = code, view[body:end]
            parts.append(view[start:end])
        elif (code == APP0 and data.startswith(b"JFIF\0", body)) or (code == APP14 and data.startswith(b"Adobe", body)):
            parts.append(view[start:end])
        elif code == APP1 and not exif and data.startswith(orientation.EXIF_PREFIX, body):
            exif = data[body:end]
        elif code == APP1 and not xmp and data.startswith(b"http://ns.adobe.com/xap/1.0/\0", body):
            xmp = data[body:end]
    if frame is None:
        raise TruncatedImage("The JPEG image is damaged: it has no frame before its first scan.")
    if table_bytes > MAX_TABLE_BYTES:
        raise ImageTooCostly("The JPEG's tables take more than 64 KiB, which no encoder makes; save it again.")
    check_scans(data)
    turned = orientation.chosen(orientation.of_exif(exif), orientation.of_xmp(xmp))
    kind, header = frame[0], read_frame(*frame)
    header.orientation = turned
    header.parts = parts
    if data.endswith(EOI) and data.find(SOI, start) < 0:  # else its end may be another image's
        parts.append(view[start:])
    else:
        image_end, header.has_end = find_end(data, start)
        parts += [view[start:image_end]] if header.has_end else [data[start:image_end].rstrip(b"\0"), EOI]
    if kind in HUFFMAN_FRAMES and segments <= MAX_CHEAP_SEGMENTS and header.has_end:
        header.passes = max(data.count(SCAN), 1)
    return header


def walk(data: bytes) -> Iterator[tuple[int, int, int, int]]:
    """Yield code, start, start of the body and end of each segment up to the first scan's head.

    Raises:
        TruncatedImage: the file ends before a scan begins.
        ImageTooCostly: there are too many segments.
    """
    position, count = len(SOI), 0
    while found := MARKER.search(data, position):
        code = found[1][0]
        position = body = found.end()
        if code in WITHOUT_LENGTH:
            pass
        elif code == END:
            break
        else:
            position += int.from_bytes(data[body : body + 2], "big")
            if position < body + 2 or position > len(data):
                break
            yield code, body - 2, body + 2, position
            if code == START_OF_SCAN:
                return
        count += 1
        check_count(count, MAX_SEGMENTS, "segments")
    raise TruncatedImage("The JPEG image is truncated or damaged: it ends before its pixels begin.")


def read_frame(code: int, body: memoryview) -> JpegHeader:
    """Read the size and the channels from a frame's head."""
    channels = body[5] if len(body) > 5 else 0
    if len(body) < 6 + 3 * channels or not channels:
        raise TruncatedImage("The JPEG image is damaged: its frame can't be read.")
    bits, height, width = body[0], int.from_bytes(body[1:3], "big"), int.from_bytes(body[3:5], "big")
    if bits != 8:
        raise UnsupportedFormat(f"JPEG with {bits} bits a channel is not supported; send one with 8.")
    if code in UNSUPPORTED_FRAMES:
        raise UnsupportedFormat("Hierarchical and lossless JPEG are not supported; send a baseline or progressive one.")
    if channels not in (1, 3, 4):
        raise UnsupportedFormat(f"JPEG with {channels} channels is not supported; send one with 1, 3 or 4.")
    if not width or not height:
        raise TruncatedImage(f"The JPEG image is damaged: its header announces {width} x {height} pixels.")
    sampling = tuple((factors >> 4, factors & 15) for factors in body[7 : 6 + 3 * channels : 3])
    if any(0 in factors for factors in sampling):
        raise TruncatedImage("The JPEG image is damaged: its channels have no samples.")
    return JpegHeader("JPEG", width, height, [], sampling=sampling)


def check_scans(data: bytes, pieces: int = 1) -> None:
    """Raise ImageTooCostly for so many scans that a decoder would take seconds, however small the image is."""
    most = MAX_SCANS * pieces
    if data.count(SCAN) > most and len(SCAN_HEAD.findall(data)) > most:
        raise ImageTooCostly(f"The JPEG has more than {MAX_SCANS} scans, which no encoder makes; save it again.")


def find_end(data: bytes, scan: int) -> tuple[int, bool]:
    """Return where the image ends, and whether that is marked.

    Args:
        data: the file.
        scan: where its first scan begins.
    """
    position, count = scan, 0
    while found := MARKER_IN_SCAN.search(data, position):
        code = found[1][0]
        if code == END:
            return found.end(), True
        if code not in BEHIND_SCANS:
            return found.start(), False  # another file, or anything
        position = found.end() + int.from_bytes(data[found.end() : found.end() + 2], "big")
        count += 1
        check_count(count, MAX_SEGMENTS, "segments")
    return len(data), False


def is_whole(header: JpegHeader) -> bool:
    """Whether all pixels of a JPEG are there, whose end is not marked; takes as long as decoding it."""
    file = header.essential()
    if not has_all_coefficients(file, len(header.sampling)):
        return False
    try:
        decode_jpeg(file, "CMYK" if len(header.sampling) == 4 else "RGB")
    except ValueError as error:
        # Other bytes behind the last scan: that is whole. Where it is not, the decoder meets the marker within it.
        return "extraneous bytes before marker 0xd9" in str(error)
    return True


def has_all_coefficients(file: bytes, channels: int) -> bool:
    """Whether the heads of the scans announce every coefficient of every channel, to its last bit."""
    known: dict[int, int] = {}
    position = 0
    while (position := file.find(SCAN, position)) >= 0:
        count = file[position + 4] if position + 4 < len(file) else 0
        body = file[position + 5 : position + 8 + 2 * count]
        position += 2
        if len(body) < 3 + 2 * count:
            continue
        first, last, bit = body[-3], body[-2], body[-1] & 15
        if not bit and first <= last < 64:
            for channel in body[0 : 2 * count : 2]:
                known[channel] = known.get(channel, 0) | ((1 << last + 1) - (1 << first))
    return sum(bits == ALL_COEFFICIENTS for bits in known.values()) >= channels


def reduction(header: JpegHeader, reach: int) -> int:
    """Return by how much the decoder can shrink a JPEG without mixing in what lies beyond its edge: 8, 4, 2 or 1.

    The file holds whole blocks, and what an encoder put into the last of them beyond the image's edge is its own
    affair. A pixel of the shrunk image must not be a mean of both.

    Args:
        header: of the file.
        reach: pixels that both sides must have afterwards, at least.
    """
    for divisor in (8, 4, 2):
        if min(header.width, header.height) // divisor < reach:
            continue
        if all(is_cut_between_samples(header, factors, 8 // divisor) for factors in header.sampling):
            return divisor
    return 1


def is_cut_between_samples(header: JpegHeader, factors: tuple[int, int], base: int) -> bool:
    """Whether the image's edge lies between two samples of a channel when a block becomes `base` samples wide.

    libjpeg keeps more samples of a channel that has fewer of them, where that saves enlarging it afterwards.
    """
    most_x, most_y = max(x for x, _ in header.sampling), max(y for _, y in header.sampling)
    (x, y), samples = factors, base
    while samples < 8 and (most_x * base) % (x * samples * 2) == 0 and (most_y * base) % (y * samples * 2) == 0:
        samples *= 2
    remainders = header.width * x * samples % (8 * most_x), header.height * y * samples % (8 * most_y)
    return remainders == (0, 0)
