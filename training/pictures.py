"""Picture files to uint8 RGB of one size: the conversion that the service does with what it is sent."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps
from tqdm import tqdm

from training.dataset import DataError

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
_SIXTEEN_BIT_MODES = frozenset({"I", "I;16", "I;16L", "I;16B", "I;16N"})


def to_rgb(image: Image.Image) -> Image.Image:
    """Return the (first frame of the) picture upright and in mode RGB, transparency on white, 16 bit scaled to 8."""
    image = ImageOps.exif_transpose(image)
    if image.mode in _SIXTEEN_BIT_MODES:
        # Pillow's own conversion clips at 255 instead of scaling.
        levels = np.asarray(image).astype(np.int64).clip(0, 65535)
        return Image.fromarray(((levels + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def fit(image: Image.Image, size: int) -> Image.Image:
    """Return the largest centred square of an RGB picture at ``size`` x ``size``, bicubic; of that size: untouched."""
    if image.size == (size, size):
        return image
    return ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC, centering=(0.5, 0.5))


def read_picture(path: Path, size: int) -> NDArray[np.uint8]:
    """Read one file as uint8 [size, size, 3]; raises DataError naming the file when it is not a readable picture."""
    try:
        with Image.open(path) as image:
            return np.asarray(fit(to_rgb(image), size))
    except Exception as error:  # Pillow's decoders raise many kinds of errors at damaged files
        raise DataError(
            f"{path}: this picture cannot be read ({error}); replace it with a whole picture file or remove it."
        ) from error


def read_pictures(paths: Sequence[Path], size: int, description: str) -> NDArray[np.uint8]:
    """Read files as uint8 [N, size, size, 3] in a pool of threads, with a progress bar on stderr.

    Raises DataError at the first file that is not a readable picture.
    """
    images = np.empty((len(paths), size, size, 3), np.uint8)
    with ThreadPoolExecutor(max_workers=min(32, (os.cpu_count() or 1) + 2)) as pool:
        pictures = pool.map(read_picture, paths, [size] * len(paths))
        bar = tqdm(pictures, description, total=len(paths), unit="picture", disable=None, leave=False)
        for index, picture in enumerate(bar):
            images[index] = picture
    return images


def resize_pictures(images: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """Bring uint8 [N, H, W, 3] to uint8 [N, size, size, 3]; pictures already of that size are returned untouched."""
    if images.shape[1:3] == (size, size):
        return images
    return np.stack([np.asarray(fit(Image.fromarray(image), size)) for image in images])
