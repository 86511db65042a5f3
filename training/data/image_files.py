"""Files of a folder to uint8 RGB of one size, by the decoder that the service has."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from imaging.decoder import decode_image
from imaging.errors import ImageError
from training.data.dataset import DataError

SUFFIXES = frozenset({".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
MAX_PIXELS = 180_000_000  # of one file, which takes up to 16 bytes a pixel while it is decoded


def read_image(path: Path, size: int) -> NDArray[np.uint8]:
    """Read one file as uint8 [size, size, 3]; raises DataError naming the file when it is not a readable image."""
    try:
        return decode_image(path.read_bytes(), size=(size, size), max_pixels=MAX_PIXELS)
    except (ImageError, OSError) as error:
        raise DataError(
            f"{path}: this image cannot be read ({error}); replace it with a whole image file or remove it."
        ) from error


def read_images(paths: Sequence[Path], size: int, description: str) -> tuple[NDArray[np.uint8], dict[int, DataError]]:
    """Read files in a pool of threads, with a progress bar on stderr.

    Returns: uint8 [N, size, size, 3], black where a file is not a readable image; and why, by index.
    """
    images = np.zeros((len(paths), size, size, 3), np.uint8)
    errors = {}

    def read(path: Path) -> NDArray[np.uint8] | DataError:
        try:
            return read_image(path, size)
        except DataError as error:
            return error

    with ThreadPoolExecutor(max_workers=min(32, (os.cpu_count() or 1) + 2)) as pool:
        bar = tqdm(pool.map(read, paths), description, total=len(paths), unit="image", disable=None, leave=False)
        for index, image in enumerate(bar):
            if isinstance(image, DataError):
                errors[index] = image
            else:
                images[index] = image
    return images, errors
