"""Bytes of an image file to uint8 [H, W, 3] RGB at the size that a model takes.

Two steps, so that a caller can decide between them where the second one runs:

    read_header    walks the structure: the format, the limits, everything that needs no pixels (`imaging.formats`)
    decode         unpacks the pixels, turns them upright, puts them on white, resizes

Nothing is normalised here: that is part of the model's graph. Colour profiles are ignored, in training too.
"""

import re
from io import BytesIO
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import BmpImagePlugin, GifImagePlugin, Image, JpegImagePlugin, PngImagePlugin, TiffImagePlugin, WebPImagePlugin
from PIL.ImageFile import ImageFile

from imaging.errors import ImageError, TruncatedImage, UnsupportedFormat
from imaging.fast_jpeg import decode_exact_jpeg
from imaging.formats import read_header
from imaging.pixels import clear_colour, clear_outside, drop_empty_alpha, to_rgb, upright
from imaging.resize import Crop, Filter, resize
from imaging.structure import jpeg
from imaging.structure.header import Format, Header

# Pillow would look for them with the first image. Where no file can be opened any more by then, it would never know
# the formats, and good images would be called damaged.
PLUGINS: Final[dict[Format, type[ImageFile]]] = {
    "JPEG": JpegImagePlugin.JpegImageFile,
    "PNG": PngImagePlugin.PngImageFile,
    "WEBP": WebPImagePlugin.WebPImageFile,
    "BMP": BmpImagePlugin.BmpImageFile,
    "GIF": GifImagePlugin.GifImageFile,
    "TIFF": TiffImagePlugin.TiffImageFile,
}

# A JPEG decoder can halve an image up to three times for next to nothing. At this factor above the target, Pillow's
# documentation calls the result indistinguishable from resizing the whole image.
REDUCING_GAP: Final = 3

# How Pillow says that it has no decoder for a variant; all else that it raises is about damage.
NO_DECODER: Final = re.compile("unsupported|not yet supported|unknown pixel mode|unknown raw mode", re.IGNORECASE)

BITS_PER_SAMPLE: Final = 258
PLANAR_CONFIGURATION: Final = 284
PNG_BIT_DEPTH: Final = 24  # where it stands in the file


def decode_image(
    data: bytes, *, size: tuple[int, int], max_pixels: int, crop: Crop = "center", resample: Filter = "bicubic"
) -> NDArray[np.uint8]:
    """Decode a file in one step, by the shortest way; see `read_header` and `decode`."""
    if size[0] * size[1] <= max_pixels and (exact := decode_exact_jpeg(data, size)) is not None:
        return exact
    return decode(read_header(data, max_pixels=max_pixels), size=size, crop=crop, resample=resample)


def decode(
    header: Header, *, size: tuple[int, int], crop: Crop = "center", resample: Filter = "bicubic"
) -> NDArray[np.uint8]:
    """Decode the pixels behind a header and bring them to one size.

    Args:
        header: what `read_header` returned; of an animation only the first frame is decoded.
        size: (H, W) of the result.
        crop: see `resize.resize`. An image of exactly this size is passed through untouched.
        resample: likewise.

    Returns:
        uint8 [H, W, 3], RGB, 0..255, read-only.

    Raises:
        TruncatedImage: the file ends too early or its content is damaged.
        UnsupportedFormat: there is no decoder for this variant, or its values have no defined range.
    """
    try:
        if isinstance(header, jpeg.JpegHeader) and not header.has_end and not jpeg.is_whole(header):
            raise TruncatedImage(damaged(header.format))
        image = load(header, size)
        turned = upright(image, header.orientation)
        if turned is not image:
            image.close()  # a large one: its pixels go at once
        rgb = resize(to_rgb(turned), size, crop=crop, resample=resample)
        return np.frombuffer(rgb.tobytes(), np.uint8).reshape(*size, 3)
    except (ImageError, MemoryError):
        raise
    except Exception as error:  # whatever a decoder raises on these bytes, the bytes are to blame
        if NO_DECODER.search(str(error)):
            raise UnsupportedFormat(
                f"This variant of {header.format} is not supported ({error}); save the image as JPEG or PNG."
            ) from error
        raise TruncatedImage(damaged(header.format)) from error


def load(header: Header, size: tuple[int, int]) -> Image.Image:
    """Decode the pixels as they lie in the file; a JPEG that is far larger than `size` comes shrunk."""
    data = header.essential()
    image = PLUGINS[header.format](BytesIO(data))
    if isinstance(header, jpeg.JpegHeader) and image.size != size[::-1]:
        divisor = jpeg.reduction(header, REDUCING_GAP * max(size))
        image.draft(None, (header.width // divisor, header.height // divisor))
    elif isinstance(image, TiffImagePlugin.TiffImageFile):
        read_planes_of_16_bits(image)
    elif header.format == "PNG":
        apply_transparent_value(image, data)
    image.load()
    if header.format == "BMP":
        drop_empty_alpha(image)
    if image.mode.startswith("I;16"):
        return to_rgb(image)  # before it is turned: the file's tags, which say the range, are gone then
    return clear_outside(to_rgb(image), header.frame) if header.frame else image


def read_planes_of_16_bits(image: TiffImagePlugin.TiffImageFile) -> None:
    """Have uncompressed planes of 16 bits read as that; Pillow takes their bytes for pixels."""
    tags = image.tag_v2
    if tags.get(PLANAR_CONFIGURATION) != 2 or image.use_load_libtiff or max(tags.get(BITS_PER_SAMPLE, (1,))) != 16:
        return
    depth = ";16L" if tags.prefix == b"II" else ";16B"
    for index, tile in enumerate(image.tile):
        assert isinstance(tile.args, tuple)
        channel, *rest = tile.args
        image.tile[index] = tile._replace(args=(f"{channel}{depth}", *rest))


def apply_transparent_value(image: ImageFile, data: bytes) -> None:
    """Compare a PNG's transparent value as the format has it: Pillow brings its pixels to 8 bits, and not this."""
    value, bits = image.info.get("transparency"), data[PNG_BIT_DEPTH]
    peak = (1 << bits) - 1
    if image.mode == "L" and isinstance(value, int):
        image.info["transparency"] = (value & peak) * 255 // peak
    elif image.mode == "RGB" and isinstance(value, tuple) and bits == 8:
        image.info["transparency"] = tuple(level & peak for level in value)
    elif image.mode == "RGB" and isinstance(value, tuple):
        low = PLUGINS["PNG"](BytesIO(data))
        low.tile = [tile._replace(args="RGB;16L") for tile in low.tile]  # which takes the second byte of each value
        low.load()
        image.load()
        clear_colour(image, low, value)
        del image.info["transparency"]


def damaged(name: Format) -> str:
    """Return the sentence about an image that can't be decoded. Of TIFF there are more variants than decoders."""
    variant = ", or of a variant that is not decoded here" if name == "TIFF" else ""
    return f"The {name} image is truncated or damaged{variant}."
