"""The image of a heat map: the map's colours over the image, and a legend."""

import io
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from service.explanation.masks import Grid, Pixels

SIDE: Final = 448  # pixels, of the longer side of the image
OPACITY: Final = 0.6
MARGIN: Final = 12
BAR: Final = 20
FONT_SIZE: Final = 15
# Viridis (van der Walt and Smith 2015, CC0): equal steps look equal, in print and to the colour-blind too.
VIRIDIS: Final = (
    "440154 481a6c 472f7d 414487 39568c 31688e 2a788e 23888e 1f988b 22a884 35b779 54c568 7ad151 a5db36 d2e21b fde725"
)


def display_size(size: tuple[int, int]) -> tuple[int, int]:
    """Return (H, W) at which an input of `size` is shown."""
    longest = max(size)
    height, width = (max(1, round(side * SIDE / longest)) for side in size)
    return height, width


def colours(values: NDArray[np.float32]) -> Pixels:
    """Map values in 0..1, of any shape, to colours: uint8 [..., 3]."""
    anchors = np.array([list(bytes.fromhex(colour)) for colour in VIRIDIS.split()], np.float64)
    at = np.linspace(0, 1, len(anchors))
    channels = [np.interp(values, at, anchors[:, channel]) for channel in range(3)]
    return np.stack(channels, axis=-1).round().astype(np.uint8)


def overlay(image: Pixels, heat_map: Grid, title: str) -> bytes:
    """Lay a map over an image, with a legend beside and a title above it.

    Args:
        image: uint8 [H, W, 3].
        heat_map: float32 [G, K] over the same region.
        title: one line.

    Returns:
        a PNG file.
    """
    height, width = image.shape[:2]
    low, high = float(heat_map.min()), float(heat_map.max())
    scaled = (heat_map - low) / (high - low if high > low else 1)
    smooth = Image.fromarray(scaled).resize((width, height), Image.Resampling.BICUBIC)
    laid = Image.blend(
        Image.fromarray(image).convert("L").convert("RGB"),
        Image.fromarray(colours(np.asarray(smooth).clip(0, 1))),
        OPACITY,
    )
    font = ImageFont.load_default(FONT_SIZE)
    top, line = MARGIN + FONT_SIZE + MARGIN, FONT_SIZE + 4
    left = 2 * MARGIN + width
    texts = [f"{high:+.3f}", f"{low:+.3f}"]
    right = left + BAR + MARGIN + round(max(font.getlength(text) for text in texts)) + MARGIN
    canvas = Image.new("RGB", (right, top + height + MARGIN), "white")
    draw = ImageDraw.Draw(canvas)
    draw.text((MARGIN, MARGIN), fitted(title, font, right - 2 * MARGIN), "black", font)
    canvas.paste(laid, (MARGIN, top))
    bar = colours(np.linspace(1, 0, height, dtype=np.float32))[:, None].repeat(BAR, 1)
    canvas.paste(Image.fromarray(bar), (left, top))
    for text, at in zip(texts, (top, top + height - line), strict=True):
        draw.text((left + BAR + MARGIN, at), text, "black", font)
    file = io.BytesIO()
    canvas.save(file, "PNG")
    return file.getvalue()


def fitted(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """Return a text, cut so that it is at most `width` pixels wide."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"{text}...") > width:
        text = text[:-1]
    return f"{text}..."
