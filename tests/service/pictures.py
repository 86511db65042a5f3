"""Real picture files for the service's tests, built with Pillow."""

import struct
import zlib
from io import BytesIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Pixels = NDArray[np.uint8]


def pixels(height: int = 32, width: int = 32, seed: int = 0) -> Pixels:
    """Smooth colour noise, uint8 [height, width, 3]."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    return np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))


def encode(image: Image.Image | Pixels, file_format: str, **options: object) -> bytes:
    """A picture file's bytes."""
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    file = BytesIO()
    image.save(file, file_format, **options)
    return file.getvalue()


def lossless_files(array: Pixels) -> dict[str, bytes]:
    """The same RGB pixels in each format that keeps them exactly."""
    return {
        "PNG": encode(array, "PNG"),
        "WEBP": encode(array, "WEBP", lossless=True),
        "BMP": encode(array, "BMP"),
        "TIFF": encode(array, "TIFF"),
        "TIFF LZW": encode(array, "TIFF", compression="tiff_lzw"),
        "TIFF deflate": encode(array, "TIFF", compression="tiff_adobe_deflate"),
    }


def all_files(array: Pixels) -> dict[str, bytes]:
    """The same picture in each format, the lossy ones included."""
    return lossless_files(array) | {
        "JPEG": encode(array, "JPEG", quality=95),
        "JPEG progressive": encode(array, "JPEG", progressive=True),
        "WEBP lossy": encode(array, "WEBP", quality=95),
        "GIF": encode(array, "GIF"),
        "TIFF JPEG": encode(array, "TIFF", compression="jpeg"),
    }


def png_announcing(width: int, height: int) -> bytes:
    """A PNG of 60 bytes whose header announces a picture of any size."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
