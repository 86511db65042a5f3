"""What users send beside clean images: the same images grey, compressed, noisy, blurred or turned, at fixed severities.

Shape letters: n images, H rows and columns (the input size).
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from imaging.decoder import decode_image
from training.data import corruption

COUNT = 2000
JPEG_QUALITY, NOISE_SIGMA, BLUR_SIGMA, DEGREES = 75, 20.0, 1.0, 20


def corrupted(images: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Corrupt images in each of the ways, the same on every machine of one torch.

    Args:
        images: uint8 [n, H, H, 3] on the CPU.

    Yields:
        What was done, and uint8 [n, H, H, 3].
    """
    pixels = images.permute(0, 3, 1, 2).float()
    ones = torch.ones(len(images))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        noisy = corruption.noise(pixels, ones * (NOISE_SIGMA / corruption.MAX_NOISE))
    severity = (BLUR_SIGMA - corruption.MIN_BLUR) / (corruption.MAX_BLUR - corruption.MIN_BLUR)
    yield "greyscale", _to_bytes(corruption.greyscale(pixels, ones))
    yield f"JPEG of quality {JPEG_QUALITY}", _each(images, _through_jpeg)
    yield f"noise of standard deviation {NOISE_SIGMA:g} levels", _to_bytes(noisy)
    yield f"blur of standard deviation {BLUR_SIGMA:g} pixel", _to_bytes(corruption.blur(pixels, ones * severity))
    yield f"rotation by {DEGREES} degrees", _each(images, _rotate)


def _to_bytes(pixels: Tensor) -> Tensor:
    """Float [n, 3, H, H] -> uint8 [n, H, H, 3]."""
    return pixels.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def _each(images: Tensor, change: Callable[[NDArray[np.uint8]], NDArray[np.uint8]]) -> Tensor:
    return torch.from_numpy(np.stack([change(image) for image in images.numpy()]))


def _through_jpeg(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """What the service decodes of the file that Pillow writes (libjpeg's tables, chroma at half the size)."""
    file, size = io.BytesIO(), len(image)
    Image.fromarray(image).save(file, "JPEG", quality=JPEG_QUALITY)
    return decode_image(file.getvalue(), size=(size, size), max_pixels=size * size)


def _rotate(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Turn an image; what comes into sight is its own mirror image at the edge, as no camera sees black corners."""
    size = len(image)
    padded = Image.fromarray(np.pad(image, ((size, size), (size, size), (0, 0)), "symmetric"))
    turned = np.asarray(padded.rotate(DEGREES, Image.Resampling.BICUBIC))
    return turned[size : 2 * size, size : 2 * size]
