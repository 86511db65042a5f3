"""Files of a folder to uint8 RGB of one size, by the decoder that the service has."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from imaging.decoder import decode_image
from imaging.errors import ImageError
from training.data import decoded
from training.data.dataset import DataError

SUFFIXES = frozenset({".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
AT_ONCE = 256  # files that are decoded before the first of them is taken
MAX_PIXELS = 180_000_000  # of one file, which takes up to 16 bytes a pixel while it is decoded


def read_image(path: Path, size: int) -> NDArray[np.uint8]:
    """Read one file as uint8 [size, size, 3]; raises DataError naming the file when it is not a readable image."""
    try:
        return decode_image(path.read_bytes(), size=(size, size), max_pixels=MAX_PIXELS)
    except (ImageError, OSError) as error:
        raise DataError(
            f"{path}: this image cannot be read ({error}); replace it with a whole image file or remove it."
        ) from error


def read_images(paths: Sequence[Path], size: int, description: str) -> tuple[Tensor, Path | None, dict[int, DataError]]:
    """Read files in a pool of threads, with a progress bar on stderr.

    Returns:
        uint8 [N, size, size, 3] of those that can be read, in order; the file that they are mapped from, None where
        they lie in memory; and why the others can't be read, by index.

    Raises:
        DataError: the disk has no room for as many.
    """
    if len(paths) * size * size * 3 >= decoded.MIN_BYTES:
        return _map_images(paths, size, description)
    images, errors = np.empty((len(paths), size, size, 3), np.uint8), {}
    count = 0
    for index, image in enumerate(_decode(paths, size, description)):
        if isinstance(image, DataError):
            errors[index] = image
        else:
            images[count] = image
            count += 1
    return torch.from_numpy(images[:count]), None, errors


def _map_images(paths: Sequence[Path], size: int, description: str) -> tuple[Tensor, Path | None, dict[int, DataError]]:
    images = (None if isinstance(image, DataError) else image for image in _decode(paths, size, description))
    try:
        file, unreadable = decoded.store(decoded.cache_key(paths, size), images)
    except OSError as error:
        gigabytes = len(paths) * size * size * 3 / 1e9
        raise DataError(
            f"{decoded.FOLDER}: cannot hold the decoded images, {gigabytes:.1f} GB ({error}); make room there, or read "
            "them smaller with --input-size."
        ) from error
    errors = {index: image for index in unreadable if isinstance(image := _try_to_read(paths[index], size), DataError)}
    return decoded.map_images(file, (len(paths) - len(unreadable), size, size, 3)), file, errors


def _decode(paths: Sequence[Path], size: int, description: str) -> Iterator[NDArray[np.uint8] | DataError]:
    with ThreadPoolExecutor(max_workers=min(32, (os.cpu_count() or 1) + 2)) as pool:
        # Not all at once: what waits to be taken would fill the memory that a file is to spare.
        parts = (paths[start : start + AT_ONCE] for start in range(0, len(paths), AT_ONCE))
        images = (image for part in parts for image in pool.map(partial(_try_to_read, size=size), part))
        yield from tqdm(images, description, total=len(paths), unit="image", disable=None, leave=False)


def _try_to_read(path: Path, size: int) -> NDArray[np.uint8] | DataError:
    try:
        return read_image(path, size)
    except DataError as error:
        return error
