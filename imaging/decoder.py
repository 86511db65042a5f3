"""Bytes of a picture file to uint8 [H, W, 3] RGB at the size that the model's metadata asks for.

Two steps, so that a caller can decide between them where the second one runs:

    open_picture   reads the header: the format, the limits, everything that needs no pixels
    to_array       decodes, turns upright, puts on white, resizes

Nothing is normalised here: that is part of the model's graph. Colour profiles are ignored, as they were in training.
"""

import re
from io import BytesIO
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import (
    ExifTags,
    Image,
    ImageOps,
    MpoImagePlugin,  # noqa: F401 - as below
    TiffImagePlugin,
    WebPImagePlugin,  # noqa: F401 - registers itself; without it Pillow imports all its forty plugins at the first WebP
)

from service.engine.metadata import ResizePolicy
from service.errors import NotAnImage, ServiceError, TooManyPixels, TruncatedImage, UnsupportedFormat

# Pillow imports its plugins with the first picture. Where no file can be opened any more by then, it would never know
# the formats, and good pictures would be called damaged.
Image.preinit()

FILTERS: Final = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
    "box": Image.Resampling.BOX,
}

TRANSPOSITIONS: Final = {  # EXIF orientation -> what makes the picture upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# Where a picture can carry an orientation, by the name of Pillow's info key. TIFF is turned by Pillow itself.
ORIENTATION_KEYS: Final = frozenset({"exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif"})

BMP_HEADER_SIZES: Final = frozenset({12, 16, 40, 52, 56, 64, 108, 124})

# A JPEG decoder can halve a picture up to three times for next to nothing. At this factor above the target, Pillow's
# documentation calls the result indistinguishable from resizing the whole picture.
REDUCING_GAP: Final = 3

# A progressive JPEG comes in scans, each a pass over all pixels, which an empty one costs too. Encoders make about ten.
JPEG_SCAN: Final = b"\xff\xda"
MOST_JPEG_SCANS: Final = 100
# The marker, its length and the number of channels: the marker alone also occurs in films behind a phone's pictures.
JPEG_SCAN_HEAD: Final = re.compile(rb"\xff\xda\0(?:\x08\x01|\x0a\x02|\x0c\x03|\x0e\x04)")

WHITE: Final = (255, 255, 255)


def open_picture(data: bytes, *, max_pixels: int) -> Image.Image:
    """Read a picture's header without decoding its pixels.

    Args:
        data: a whole JPEG, PNG, WebP, BMP, GIF or TIFF file.
        max_pixels: largest width times height that is admitted.

    Raises:
        NotAnImage: the bytes are no picture.
        UnsupportedFormat: they are one in another format or variant, or a JPEG of very many scans.
        TooManyPixels: the header announces more than `max_pixels`.
        TruncatedImage: the header is damaged or incomplete.
    """
    name = sniff(data)
    if name == "JPEG" and has_many_scans(data):
        raise UnsupportedFormat(f"The JPEG has more than {MOST_JPEG_SCANS} scans, which no encoder makes.")
    if name == "WEBP":
        check_pixels(webp_size(data), max_pixels)  # its decoder allocates the canvas when it is opened
    try:
        image = Image.open(BytesIO(data), formats=(name,))
        check_pixels(image.size, max_pixels)
        if isinstance(image, TiffImagePlugin.TiffImageFile):
            # libtiff allocates whole tiles, and a small picture may announce a gigantic one.
            check_pixels((image.tag_v2.get(322, 1), image.tag_v2.get(323, 1)), max_pixels)
            check_planes(image)
        elif name == "PNG":
            scale_transparency(image, bits=data[24])
    except (ServiceError, MemoryError):
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise TooManyPixels(f"The picture has more than the {max_pixels} pixels that are allowed.") from error
    except Exception as error:  # whatever a parser raises on these bytes, the bytes are to blame
        raise TruncatedImage(f"{damaged(name, is_header=True)} Its header can't be read.") from error
    return image


def to_array(image: Image.Image, *, size: tuple[int, int], resize: ResizePolicy) -> NDArray[np.uint8]:
    """Decode an opened picture and bring it to the model's input size.

    Args:
        image: what `open_picture` returned; only its first frame is read. It is of no use afterwards.
        size: (H, W) of the result.
        resize: crop and filter for pictures of other sizes. One of exactly this size is passed through untouched.

    Returns:
        uint8 [H, W, 3], RGB, 0..255, read-only.

    Raises:
        TruncatedImage: the file ends too early or its content is damaged.
        UnsupportedFormat: a pixel format without a defined range (32-bit integer, floating point).
    """
    height, width = size
    name = image.format
    try:
        if name in ("JPEG", "MPO") and image.size != (width, height):
            reach = REDUCING_GAP * max(size)
            image.draft(None, (reach, reach))
        image.load()
        turned = upright(image)
        if turned is not image:
            image.close()  # a large one: its pixels go at once
        rgb = to_rgb(turned)
        if rgb.size != (width, height):
            rgb = resized(rgb, (width, height), resize)
        return np.frombuffer(rgb.tobytes(), np.uint8).reshape(height, width, 3)
    except (ServiceError, MemoryError):
        raise
    except Exception as error:  # as above
        raise TruncatedImage(damaged(name)) from error


def damaged(name: str | None, *, is_header: bool = False) -> str:
    """Return the sentence about a picture that can't be decoded.

    Of TIFF there are more variants than decoders; of others too, as JPEG of 12 bits, but that shows in the header.
    """
    variant = ", or of a variant that is not decoded here" if name == "TIFF" or is_header else ""
    return f"The {name} picture is truncated or damaged{variant}."


def sniff(data: bytes) -> str:
    """Return Pillow's name of the format that the first bytes announce."""
    head = data[:16]
    if head.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if head.startswith((b"GIF87a", b"GIF89a")):
        return "GIF"
    if head.startswith(b"RIFF") and head[8:12] == b"WEBP":
        return "WEBP"
    if head.startswith(b"BM") and int.from_bytes(data[14:18], "little") in BMP_HEADER_SIZES:
        return "BMP"
    if head.startswith((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")):
        return "TIFF"
    if other := other_format(head):
        raise UnsupportedFormat(f"{other} is not supported; send a JPEG, PNG, WebP, BMP, GIF or TIFF file.")
    raise NotAnImage()


def other_format(head: bytes) -> str | None:
    """Name a format that people send and that is not decoded here, for a better sentence than "not a picture"."""
    if head[4:8] == b"ftyp":
        return "AVIF" if head[8:12] in (b"avif", b"avis") else "HEIF, or a video,"
    signatures = {
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
    return next((name for signature, name in signatures.items() if head.startswith(signature)), None)


def has_many_scans(data: bytes) -> bool:
    """Whether a JPEG would take its decoder for seconds, however small it is."""
    return data.count(JPEG_SCAN) > MOST_JPEG_SCANS and len(JPEG_SCAN_HEAD.findall(data)) > MOST_JPEG_SCANS


def webp_size(data: bytes) -> tuple[int, int]:
    """Width and height that a WebP file's first chunk announces; (0, 0) where it announces none."""
    chunk = data[12:30]
    if chunk.startswith(b"VP8X"):
        return int.from_bytes(chunk[12:15], "little") + 1, int.from_bytes(chunk[15:18], "little") + 1
    if chunk.startswith(b"VP8L"):
        bits = int.from_bytes(chunk[9:13], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    return int.from_bytes(chunk[14:16], "little") & 0x3FFF, int.from_bytes(chunk[16:18], "little") & 0x3FFF


def check_pixels(size: tuple[int, int], max_pixels: int) -> None:
    """Raise TooManyPixels when width times height exceeds the limit."""
    width, height = size
    if width * height > max_pixels:
        raise TooManyPixels(
            f"The picture has {width} x {height} = {width * height} pixels; at most {max_pixels} are allowed."
        )


def check_planes(image: TiffImagePlugin.TiffImageFile) -> None:
    """Raise UnsupportedFormat for planes of 16 bits that are not compressed: Pillow takes their bytes for pixels."""
    tags = image.tag_v2
    if tags.get(284) == 2 and tags.get(259, 1) == 1 and max(tags.get(258, (1,))) > 8:
        raise UnsupportedFormat(
            "A TIFF of 16 bits with a plane for each channel (PlanarConfiguration 2) is decoded only if compressed; "
            "send it compressed, or with the channels of each pixel together."
        )


def scale_transparency(image: Image.Image, bits: int) -> None:
    """Bring a PNG's transparent value to the 8 bits to which Pillow brings its pixels, and not this."""
    transparent = image.info.get("transparency")
    if image.mode == "L" and bits in (2, 4) and isinstance(transparent, int):
        image.info["transparency"] = transparent * 255 // ((1 << bits) - 1)
    elif image.mode == "RGB" and bits == 16 and isinstance(transparent, tuple):
        image.info["transparency"] = tuple(value >> 8 for value in transparent)


def upright(image: Image.Image) -> Image.Image:
    """Turn and mirror a loaded picture as its EXIF or XMP orientation says."""
    if ORIENTATION_KEYS.isdisjoint(image.info):
        return image
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # damaged metadata does not make a picture unreadable: it is taken as it lies
        return image
    method = TRANSPOSITIONS.get(orientation)
    return image if method is None else image.transpose(method)


def to_rgb(image: Image.Image) -> Image.Image:
    """Bring any pixel format to 8-bit RGB: transparency on white, 16 bits scaled and not clipped."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I;16"):
        return grey16_to_rgb(image)
    if image.mode in ("I", "F"):
        raise UnsupportedFormat("32-bit pixel values have no defined range; send 8 or 16 bits a channel.")
    if image.has_transparency_data:
        return on_white(image)
    return image.convert("RGB")


def on_white(image: Image.Image) -> Image.Image:
    """Composite a picture with any kind of transparency on white."""
    rgba = image if image.mode == "RGBA" else image.convert("RGBA")  # which would copy it
    canvas = Image.new("RGB", rgba.size, WHITE)
    canvas.paste(rgba, mask=rgba)
    return canvas


def grey16_to_rgb(image: Image.Image) -> Image.Image:
    """Bring 16-bit grey (mode I;16*) to 8 bits."""
    return Image.fromarray(scaled_to_8_bits(image)).convert("RGB")


def scaled_to_8_bits(image: Image.Image) -> NDArray[np.uint8]:
    """Scale 16-bit grey, rounded; Pillow's own conversion clips at 255."""
    values = np.asarray(image).astype(np.uint32)
    bits, inverted = 16, False
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        bits, inverted = image.tag_v2.get(258, (16,))[0], image.tag_v2.get(262) == 0
    peak = (1 << bits) - 1
    transparent = image.info.get("transparency")
    hidden = values == transparent if isinstance(transparent, int) else None
    values *= 255  # in place: each step's array would take four bytes a pixel
    values += peak // 2
    values //= peak
    grey = values.astype(np.uint8)
    if inverted:
        np.subtract(255, grey, out=grey)
    if hidden is not None:
        grey[hidden] = 255
    return grey


def resized(image: Image.Image, size: tuple[int, int], resize: ResizePolicy) -> Image.Image:
    """Bring an RGB picture to size = (W, H); both ways average over all source pixels when shrinking."""
    method = FILTERS[resize.filter]
    if resize.crop == "center":
        return ImageOps.fit(image, size, method)
    return image.resize(size, method)
