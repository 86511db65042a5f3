"""Picture files to uint8 RGB of one size: the conversion that the service does with what it is sent."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, TiffImagePlugin, UnidentifiedImageError
from tqdm import tqdm

from training.data.dataset import DataError

SUFFIXES = frozenset({".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
# What the service takes: a file says by its content what it is, and its name may say otherwise.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
_BITS_PER_SAMPLE, _PHOTOMETRIC = 258, 262  # TIFF tags


def _scale_grey(image: Image.Image) -> Image.Image:
    """Scale grey of 9 to 16 bits to 8, rounded, where Pillow's own conversion clips at 255."""
    bits, white_is_zero = 16, False
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        bits, white_is_zero = image.tag_v2.get(_BITS_PER_SAMPLE, (16,))[0], image.tag_v2.get(_PHOTOMETRIC) == 0
    levels, peak = np.asarray(image).astype(np.uint32), (1 << bits) - 1
    grey = (levels * 255 + peak // 2) // peak
    grey = 255 - grey if white_is_zero else grey
    if isinstance(transparent := image.info.get("transparency"), int):
        grey[levels == transparent] = 255
    return Image.fromarray(grey.astype(np.uint8))


def to_rgb(image: Image.Image) -> Image.Image:
    """Return the (first frame of the) picture upright and in mode RGB, transparency on white, 16 bits scaled to 8.

    Raises ValueError for 32-bit pixels, which have no defined range.
    """
    image.load()
    if image.mode in ("I", "F"):
        raise ValueError("32-bit pixel values have no defined range, 8 or 16 bits a channel have")
    with suppress(Exception):  # a picture with damaged EXIF or XMP is taken as it lies
        ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith("I;16"):
        image = _scale_grey(image)
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        canvas = Image.new("RGB", rgba.size, "white")
        canvas.paste(rgba, mask=rgba)
        return canvas
    return image.convert("RGB")


def fit(image: Image.Image, size: int) -> Image.Image:
    """Return the largest centred square of an RGB picture at ``size`` x ``size``, bicubic; of that size: untouched."""
    if image.size == (size, size):
        return image
    return ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC, centering=(0.5, 0.5))


def read_picture(path: Path, size: int) -> NDArray[np.uint8]:
    """Read one file as uint8 [size, size, 3]; raises DataError naming the file when it is not a readable picture."""
    try:
        # From memory, as the service does: an uncompressed TIFF file that has to be turned is mapped by Pillow 13 with
        # width and height exchanged.
        with Image.open(io.BytesIO(path.read_bytes()), formats=FORMATS) as image:
            return np.asarray(fit(to_rgb(image), size))
    except Image.DecompressionBombError as error:
        pixels = str(error).partition(",")[0]
        raise DataError(f"{path}: this picture is too large to be read ({pixels}); make it smaller.") from error
    except Exception as error:  # Pillow's decoders raise many kinds of errors at damaged files
        reason = f"it is none of {', '.join(FORMATS)}" if isinstance(error, UnidentifiedImageError) else error
        raise DataError(
            f"{path}: this picture cannot be read ({reason}); replace it with a whole picture file or remove it."
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
