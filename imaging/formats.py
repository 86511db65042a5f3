"""Which format a file has, and what it says before its pixels: the checks that need no decoder."""

from collections.abc import Callable, Collection
from typing import Final

from imaging.errors import FORMATS, ImageError, NotAnImage, TooManyPixels, UnsupportedFormat
from imaging.structure import bmp, gif, jpeg, png, tiff, webp
from imaging.structure.header import Format, Header

WALKERS: Final[dict[Format, Callable[[bytes], Header]]] = {
    "JPEG": jpeg.read_header,
    "PNG": png.read_header,
    "WEBP": webp.read_header,
    "BMP": bmp.read_header,
    "GIF": gif.read_header,
    "TIFF": tiff.read_header,
}

# What people send and what is not decoded here, for a better sentence than "not an image".
OTHER_FORMATS: Final = {
    b"\0\0\0\x0cJXL ": "JPEG XL",
    b"\xff\x0a": "JPEG XL",
    b"\0\0\0\x0cjP": "JPEG 2000",
    b"8BPS": "Photoshop's PSD",
    b"\0\0\1\0": "ICO",
    b"%PDF": "PDF",
    b"<svg": "SVG",
    b"<?xml": "SVG, or other XML,",
    b"v/1\1": "OpenEXR",
}


def read_header(data: bytes, *, max_pixels: int, formats: Collection[Format] = tuple(WALKERS)) -> Header:
    """Read what a file says before its pixels; decodes nothing, and takes time linear in the bytes.

    Args:
        data: a whole JPEG, PNG, WebP, BMP, GIF or TIFF file.
        max_pixels: largest width times height that is admitted.
        formats: those that are accepted.

    Raises:
        NotAnImage: the bytes are no image.
        UnsupportedFormat: they are one in another format or variant, or in a format that is not accepted.
        TooManyPixels: the header announces more than `max_pixels`.
        TruncatedImage: the structure is damaged or incomplete.
        ImageTooCostly: the structure would take a decoder far longer than the pixels account for.
    """
    name = sniff(data)
    if name not in formats:
        raise UnsupportedFormat(f"{name} is not accepted here; send one of: {', '.join(formats)}.")
    header = WALKERS[name](data)
    if header.pixels > max_pixels:
        raise TooManyPixels(
            f"The image has {header.width} x {header.height} = {header.pixels} pixels; "
            f"at most {max_pixels} are allowed."
        )
    return header


def is_cheap(header: Header, *, max_pixels: int) -> bool:
    """Whether decoding is bounded by the structure that was walked, so that it needs no process of its own.

    True for JPEG and PNG of few parts whose pixels, times the passes over them, are at most `max_pixels`.
    """
    return header.passes is not None and header.passes * header.pixels <= max_pixels


def is_image(data: bytes) -> bool:
    """Whether the first bytes announce an image, of a format that is decoded here or of another; text is none."""
    if b"\0" not in data:
        return False
    try:
        sniff(data)
    except NotAnImage:
        return False
    except ImageError:
        return True
    return True


def sniff(data: bytes) -> Format:
    """Return the format that the first bytes announce.

    Raises:
        NotAnImage, UnsupportedFormat
    """
    head = data[:16]
    if head.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if head.startswith(png.SIGNATURE):
        return "PNG"
    if head.startswith((b"GIF87a", b"GIF89a")):
        return "GIF"
    if head.startswith(b"RIFF") and head[8:12] == b"WEBP":
        return "WEBP"
    if head.startswith(b"BM") and int.from_bytes(data[14:18], "little") in bmp.HEADER_SIZES:
        return "BMP"
    if head.startswith((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")):
        return "TIFF"
    if other := other_format(head):
        raise UnsupportedFormat(f"{other} is not supported; save the image as a {FORMATS} file.")
    raise NotAnImage()


def other_format(head: bytes) -> str | None:
    """Name a format that is not decoded here."""
    if head[4:8] == b"ftyp":
        return "AVIF" if head[8:12] in (b"avif", b"avis") else "HEIF, or a video,"
    return next((name for signature, name in OTHER_FORMATS.items() if head.startswith(signature)), None)
