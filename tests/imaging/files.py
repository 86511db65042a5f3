"""Real image files for the service's tests, built with Pillow."""

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
    """An image file's bytes."""
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
    """The same image in each format, the lossy ones included."""
    return lossless_files(array) | {
        "JPEG": encode(array, "JPEG", quality=95),
        "JPEG progressive": encode(array, "JPEG", progressive=True),
        "WEBP lossy": encode(array, "WEBP", quality=95),
        "GIF": encode(array, "GIF"),
        "TIFF JPEG": encode(array, "TIFF", compression="jpeg"),
    }


def png_announcing(width: int, height: int) -> bytes:
    """A PNG of 60 bytes whose header announces an image of any size."""
    return png_of(width, height, 8, 2, b"")


def png_of(width: int, height: int, bits: int, colour: int, rows: bytes, transparent: bytes = b"") -> bytes:
    """A PNG of a depth that Pillow does not write: rows as the format packs them, each behind a 0, and its tRNS."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0))
    if transparent:
        header += chunk(b"tRNS", transparent)
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def planar_tiff(
    array: NDArray[np.uint8] | NDArray[np.uint16],
    compressed: bool,
    order: str = "<",
    *,
    photometric: int | None = None,
    extra: tuple[int, ...] | None = None,
) -> bytes:
    """A TIFF of [height, width, channels] with a plane for each channel, which Pillow does not write.

    Without more it is grey, RGB, or RGB with an alpha.
    """
    height, width, channels = array.shape
    extra = (2,) if extra is None and channels == 4 else extra or ()
    if photometric is None:
        photometric = 2 if channels > 1 else 1
    planes = [plane.astype(array.dtype.newbyteorder(order)).tobytes() for plane in np.moveaxis(array, 2, 0)]
    if compressed:
        planes = [zlib.compress(plane) for plane in planes]
    lists = 8 + 2 + 12 * (11 if extra else 10) + 4  # where what does not fit into an entry begins
    values = (4 + 4) * channels * (channels > 1) + 2 * channels * (channels > 2)
    begins = np.cumsum([lists + values, *map(len, planes)])[:-1].tolist()
    entries, behind = b"", b""
    for tag, kind, numbers in (
        (256, "H", [width]),
        (257, "H", [height]),
        (258, "H", [8 * array.itemsize] * channels),
        (259, "H", [8 if compressed else 1]),
        (262, "H", [photometric]),
        (273, "I", begins),
        (277, "H", [channels]),
        (278, "H", [height]),
        (279, "I", [len(plane) for plane in planes]),
        (284, "H", [2]),  # planes
        *([(338, "H", extra)] if extra else []),
    ):
        data = struct.pack(f"{order}{len(numbers)}{kind}", *numbers)
        entries += struct.pack(order + "HHI", tag, 3 if kind == "H" else 4, len(numbers))
        entries += data.ljust(4, b"\0") if len(data) <= 4 else struct.pack(order + "I", lists + len(behind))
        behind += data if len(data) > 4 else b""
    head = struct.pack(order + "2sHIH", b"II" if order == "<" else b"MM", 42, 8, 11 if extra else 10)
    return head + entries + bytes(4) + behind + b"".join(planes)
