"""Any pixel format to 8-bit RGB: upright, transparency on white, 16 bits scaled and not clipped."""

from functools import reduce
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageChops, TiffImagePlugin

from imaging.errors import UnsupportedFormat

TRANSPOSITIONS: Final = {  # EXIF orientation -> what makes the image upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
BITS_PER_SAMPLE: Final = 258
PHOTOMETRIC: Final = 262
WHITE: Final = (255, 255, 255)


def upright(image: Image.Image, orientation: int) -> Image.Image:
    """Turn and mirror a loaded image as its orientation says; 1: return it as it is."""
    method = TRANSPOSITIONS.get(orientation)
    return image if method is None else image.transpose(method)


def to_rgb(image: Image.Image) -> Image.Image:
    """Bring a loaded image to mode RGB.

    Raises:
        UnsupportedFormat: 32 bits a channel, which have no defined range, or grey multiplied by its alpha.
    """
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I;16"):
        return Image.fromarray(scale_to_8_bits(image)).convert("RGB")
    if image.mode in ("I", "F"):
        raise UnsupportedFormat("32-bit pixel values have no defined range; send 8 or 16 bits a channel.")
    if image.mode == "La":
        raise UnsupportedFormat("Grey that is multiplied by its alpha is not supported; send RGB with alpha.")
    if image.has_transparency_data:
        return on_white(image)
    return image.convert("RGB")


def on_white(image: Image.Image) -> Image.Image:
    """Composite an image with any kind of transparency on white."""
    rgba = image if image.mode == "RGBA" else image.convert("RGBA")  # which would copy it
    canvas = Image.new("RGB", rgba.size, WHITE)
    canvas.paste(rgba, mask=rgba)
    return canvas


def clear_outside(image: Image.Image, frame: tuple[int, int, int, int]) -> Image.Image:
    """Put the part of an RGB image that its frame fills on white."""
    canvas = Image.new("RGB", image.size, WHITE)
    canvas.paste(image.crop(frame), frame)
    return canvas


def drop_empty_alpha(image: Image.Image) -> Image.Image:
    """Take RGBA that is transparent everywhere for opaque: in BMP the fourth byte is often not in use."""
    if image.mode == "RGBA" and image.getchannel("A").getextrema() == (0, 0):
        image.putalpha(255)
    return image


def scale_to_8_bits(image: Image.Image) -> NDArray[np.uint8]:
    """Scale 16-bit grey (mode I;16*) to uint8 [H, W], rounded; Pillow's own conversion clips at 255."""
    values = np.asarray(image).astype(np.uint32)
    bits, is_inverted = 16, False
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        bits, is_inverted = image.tag_v2.get(BITS_PER_SAMPLE, (16,))[0], image.tag_v2.get(PHOTOMETRIC) == 0
    peak = (1 << bits) - 1
    transparent = image.info.get("transparency")
    hidden = values == transparent if isinstance(transparent, int) else None
    values *= 255  # in place: each step's array would take four bytes a pixel
    values += peak // 2
    values //= peak
    grey = values.astype(np.uint8)
    if is_inverted:
        np.subtract(255, grey, out=grey)
    if hidden is not None:
        grey[hidden] = 255
    return grey


def clear_colour(high: Image.Image, low: Image.Image, colour: tuple[int, int, int]) -> None:
    """Paint the pixels of one colour of 16 bits white, in place.

    Args:
        high: RGB, the upper bytes; of these the image is made.
        low: RGB, the lower bytes.
        colour: of 16 bits a channel.
    """
    masks = (
        image.getchannel(channel).point([255 * (level == value >> shift & 255) for level in range(256)])
        for image, shift in ((high, 8), (low, 0))
        for channel, value in enumerate(colour)
    )
    high.paste(WHITE, mask=reduce(ImageChops.darker, masks))
