"""One size for all: the largest centred part of the target's shape, or all of the image, stretched."""

from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

Crop = Literal["center", "none"]
Filter = Literal["bilinear", "bicubic", "lanczos", "box"]

FILTERS: Final[dict[Filter, Image.Resampling]] = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
    "box": Image.Resampling.BOX,
}


def resize(
    image: Image.Image, size: tuple[int, int], *, crop: Crop = "center", resample: Filter = "bicubic"
) -> Image.Image:
    """Bring an image to one size; one that has it is returned as it is.

    Args:
        image: mode RGB.
        size: (H, W).
        crop: "center" takes the largest centred region of the target's aspect ratio, "none" stretches.
        resample: Pillow's filter; all of them average over all source pixels when shrinking.
    """
    height, width = size
    if image.size == (width, height):
        return image
    if crop == "center":
        return ImageOps.fit(image, (width, height), FILTERS[resample])
    return image.resize((width, height), FILTERS[resample])


def resize_images(images: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """Bring uint8 [N, H, W, 3] to uint8 [N, size, size, 3], cropped and bicubic; those of that size are untouched."""
    if images.shape[1:3] == (size, size):
        return images
    return np.stack([np.asarray(resize(Image.fromarray(image), (size, size))) for image in images])
