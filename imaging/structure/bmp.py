"""BMP: a header, perhaps a palette, and rows."""

from typing import Final

from imaging.errors import ImageTooCostly, TruncatedImage
from imaging.structure.header import Header

HEADER_SIZES: Final = frozenset({12, 16, 40, 52, 56, 64, 108, 124})
OLD_HEADER_SIZE: Final = 12
RUN_LENGTHS: Final = frozenset({1, 2})  # compressions, of 8 and of 4 bits
# Pillow decodes run lengths in Python, and fills rows pixel by pixel.
MAX_RUN_LENGTH_PIXELS: Final = 1 << 20


def read_header(data: bytes) -> Header:
    """Read the header.

    Raises:
        TruncatedImage: it is not whole.
        ImageTooCostly: the pixels are many, and in run lengths.
    """
    header_size = int.from_bytes(data[14:18], "little")
    if len(data) < 14 + header_size:
        raise TruncatedImage("The BMP image is truncated: it ends within its header.")
    if header_size == OLD_HEADER_SIZE:
        width, height = int.from_bytes(data[18:20], "little"), int.from_bytes(data[20:22], "little")
    else:
        width = int.from_bytes(data[18:22], "little", signed=True)
        height = abs(int.from_bytes(data[22:26], "little", signed=True))  # below 0: from top to bottom
    if width <= 0 or not height:
        raise TruncatedImage(f"The BMP image is damaged: its header announces {width} x {height} pixels.")
    compression = int.from_bytes(data[30:34], "little") if header_size >= 40 else 0
    if compression in RUN_LENGTHS and max(width * height, len(data) // 4) > MAX_RUN_LENGTH_PIXELS:
        raise ImageTooCostly(
            f"A BMP in run lengths may have at most {MAX_RUN_LENGTH_PIXELS} pixels; save it without compression."
        )
    return Header("BMP", width, height, [data])
