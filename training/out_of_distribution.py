"""Images that no classifier was trained for, drawn from a seed: to see how sure it is where it should not be.

Shape letters: n images, H rows and columns (the input size).
"""

from __future__ import annotations

import string

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from imaging.resize import resize_images

Images = NDArray[np.uint8]

COUNT = 64
# Kinds that are made of images of the data set, whose label they keep.
ALTERED = ("upside down", "enlarged corner")


def out_of_distribution(known: Images, seed: int = 0) -> dict[str, Images]:
    """Draw images of each kind.

    Args:
        known: uint8 [N, H, H, 3], images of the data set; the first `COUNT` of them are also turned and cropped.
        seed: of what is drawn.

    Returns:
        uint8 [n, H, H, 3] for each kind: `COUNT` of what is drawn, of what is altered as many as were given.
    """
    random = np.random.default_rng(seed)
    size = known.shape[1]
    known = known[:COUNT]
    return {
        "noise": random.integers(0, 256, (COUNT, size, size, 3), dtype=np.uint8),
        "one colour": np.broadcast_to(_colours(random, COUNT)[:, None, None], (COUNT, size, size, 3)).copy(),
        "stripes": np.stack([_stripes(random, size) for _ in range(COUNT)]),
        "text": np.stack([_text(random, size) for _ in range(COUNT)]),
        "upside down": known[:, ::-1, ::-1].copy(),
        "enlarged corner": _enlarged_corners(random, known),
    }


def _colours(random: np.random.Generator, count: int) -> Images:
    return random.integers(0, 256, (count, 3), dtype=np.uint8)


def _stripes(random: np.random.Generator, size: int) -> Images:
    """Stripes of two colours at any angle, a quarter to an eighth of the image wide each."""
    angle, phase = random.uniform(0, np.pi), random.uniform(0, 1)
    period = size * random.uniform(1 / 4, 1 / 2)
    rows, columns = np.mgrid[:size, :size]
    along = (rows * np.sin(angle) + columns * np.cos(angle)) / period + phase
    return _colours(random, 2)[(along % 1 < 0.5).astype(int)]


def _text(random: np.random.Generator, size: int) -> Images:
    """Two lines of letters that mean nothing, dark on light."""
    ink, paper = random.integers(0, 100, 3), random.integers(156, 256, 3)
    image = Image.new("RGB", (size, size), tuple(map(int, paper)))
    letters = random.choice(list(string.ascii_uppercase), 8)
    lines = "\n".join("".join(part) for part in (letters[:4], letters[4:]))
    font = ImageFont.load_default(max(size * 0.4, 4))
    ImageDraw.Draw(image).text((size / 16, size / 16), lines, fill=tuple(map(int, ink)), font=font, spacing=1)
    return np.asarray(image)


def _enlarged_corners(random: np.random.Generator, known: Images) -> Images:
    """A corner of each image, a third as high and wide, at the image's own size: a ninth of what was to be seen."""
    size = known.shape[1]
    side = max(size // 3, 1)
    top, left = random.integers(0, 2, (2, len(known))) * (size - side)
    corners = [image[t : t + side, c : c + side] for image, t, c in zip(known, top, left, strict=True)]
    return resize_images(np.stack(corners), size)
