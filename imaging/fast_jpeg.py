"""The most frequent image, a JPEG of the model's own size, decoded by libjpeg-turbo without Pillow's way around it.

Pillow parses every marker in Python: 78 us for an image of 32 x 32, against 13 here, where a whole request costs about
200. The pixels are the same, bit for bit (`tests/imaging/test_fast_jpeg.py`), since both decode with libjpeg-turbo.
"""

from typing import Final

import numpy as np
from numpy.typing import NDArray
from simplejpeg import decode_jpeg, decode_jpeg_header

START: Final = b"\xff\xd8\xff"
# What may hold an orientation: EXIF and XMP, which Pillow reads.
EXIF: Final = b"Exif\0"
XMP: Final = b"ns.adobe.com"
SCAN: Final = b"\xff\xda"
MAX_SCANS: Final = 20  # each a pass over all pixels
COLOURS: Final = frozenset({"YCbCr", "Gray"})


def decode_exact_jpeg(data: bytes, size: tuple[int, int]) -> NDArray[np.uint8] | None:
    """Decode a JPEG that needs nothing else.

    Args:
        data: any bytes.
        size: (H, W).

    Returns:
        uint8 [H, W, 3], RGB, 0..255; None for all that is not a whole colour or grey JPEG of this size, of few scans,
        without metadata that could turn it: `imaging.decoder` knows what it is, or what is wrong with it.
    """
    if not data.startswith(START) or EXIF in data or XMP in data or data.count(SCAN) > MAX_SCANS:
        return None
    try:
        height, width, colours, _ = decode_jpeg_header(data)
        if (height, width) != size or colours not in COLOURS:
            return None
        pixels: NDArray[np.uint8] = decode_jpeg(data, "RGB")
    except Exception:  # whatever it raises: Pillow decodes it all the same, or has the sentence for it
        return None
    return pixels
