"""GIF: a screen, extensions, and frames on the screen, of which the first is decoded."""

from typing import Final

from imaging.errors import TruncatedImage
from imaging.structure.header import Header, check_count

SCREEN_SIZE: Final = 13
FRAME_SIZE: Final = 10
EXTENSION, FRAME, END, CONTROL = 0x21, 0x2C, 0x3B, 0xF9
MAX_BLOCKS: Final = 20_000  # of comments and the like, of up to 255 bytes each


def read_header(data: bytes) -> Header:
    """Walk the extensions before the first frame.

    Raises:
        TruncatedImage: there is no frame.
        ImageTooCostly: there are too many blocks before it.
    """
    view = memoryview(data)
    flags = data[10] if len(data) > 10 else 0
    position = begin = SCREEN_SIZE + (3 << (flags & 7) + 1 if flags & 0x80 else 0)
    control = view[:0]
    blocks = 0
    while position < len(data) and data[position] != END:
        blocks += 1
        check_count(blocks, MAX_BLOCKS, "blocks before its first frame")
        if data[position] == FRAME and position + FRAME_SIZE <= len(data):
            left, upper, wide, high = (
                int.from_bytes(data[place : place + 2], "little") for place in range(position + 1, position + 9, 2)
            )
            width = max(int.from_bytes(data[6:8], "little"), left + wide)
            height = max(int.from_bytes(data[8:10], "little"), upper + high)
            if not wide or not high:
                break
            frame = (left, upper, left + wide, upper + high)
            is_full = frame == (0, 0, width, height)
            parts: list[bytes | memoryview] = [view[:begin], control, view[position:]]
            return Header("GIF", width, height, parts, frame=None if is_full else frame)
        if data[position] != EXTENSION:
            position += 1
            continue
        start, position = position, position + 2
        while position < len(data) and (size := data[position]):
            position += 1 + size
            blocks += 1
            check_count(blocks, MAX_BLOCKS, "blocks before its first frame")
        position += 1
        if data[start + 1 : start + 2] == bytes((CONTROL,)):
            control = view[start:position]
    raise TruncatedImage("The GIF image is truncated or damaged: it has no frame.")
