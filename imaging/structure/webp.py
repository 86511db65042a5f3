"""WebP: chunks in a RIFF container."""

from typing import Final

from imaging.errors import TruncatedImage
from imaging.structure import orientation
from imaging.structure.header import Header, check_count

MAX_CHUNKS: Final = 20_000  # of an animation: as many frames


def read_header(data: bytes) -> Header:
    """Walk the chunks.

    Raises:
        TruncatedImage: the first of them is no image, or ends early.
        ImageTooCostly: there are too many chunks.
    """
    width, height = size = canvas_size(data)
    if not width or not height:
        raise TruncatedImage("The WebP image is truncated or damaged: its header can't be read.")
    header = Header("WEBP", width, height, [data])
    if data[12:16] != b"VP8X":
        return header
    exif = xmp = b""
    position, count, has_frame = 12, 0, False
    while position + 8 <= len(data):
        name = data[position : position + 4]
        body = position + 8
        end = body + int.from_bytes(data[position + 4 : body], "little")
        if name == b"ANMF" and not has_frame:
            has_frame = True
            header.frame = frame_of(data[body : body + 12], size)
        elif name == b"EXIF" and not exif:
            exif = data[body:end]
        elif name == b"XMP " and not xmp:
            xmp = data[body:end]
        position = end + end % 2
        count += 1
        check_count(count, MAX_CHUNKS, "chunks")
    header.orientation = orientation.chosen(orientation.of_exif(exif), orientation.of_xmp(xmp))
    return header


def canvas_size(data: bytes) -> tuple[int, int]:
    """Width and height that a WebP file's first chunk announces; (0, 0) where it announces none."""
    chunk = data[12:30]
    if chunk.startswith(b"VP8X"):
        return int.from_bytes(chunk[12:15], "little") + 1, int.from_bytes(chunk[15:18], "little") + 1
    if chunk.startswith(b"VP8L"):
        bits = int.from_bytes(chunk[9:13], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    return int.from_bytes(chunk[14:16], "little") & 0x3FFF, int.from_bytes(chunk[16:18], "little") & 0x3FFF


def frame_of(chunk: bytes, size: tuple[int, int]) -> tuple[int, int, int, int] | None:
    """Return where a frame lies on the canvas; None where it fills it."""
    left, upper, wide, high = (int.from_bytes(chunk[place : place + 3], "little") for place in (0, 3, 6, 9))
    frame = (2 * left, 2 * upper, 2 * left + wide + 1, 2 * upper + high + 1)
    return None if frame == (0, 0, *size) else frame
