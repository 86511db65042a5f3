"""Images that are nearly training images: figures on them flatter.

Shape letters: N images to look at, M training images, H rows and columns, P values of a thumbnail.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

CORRELATION = 0.9  # from which on two images are near-duplicates
THUMBNAIL = 16  # pixels: larger images are compared at this size, which forgives a shift
AT_ONCE = 4096  # images: products of so many take 64 MiB
PIXELS_AT_ONCE = AT_ONCE * 32 * 32  # which take 48 MiB as floats


@torch.inference_mode()
def near_duplicates(images: Tensor, trained: Tensor) -> Tensor:
    """Tell which images correlate with a training image or its mirror image, over all pixels and channels.

    Args:
        images: uint8 [N, H, H, 3].
        trained: uint8 [M, H, H, 3], on the same device.

    Returns:
        bool [N] on the CPU. An image of one colour correlates with none.
    """
    size = max(1, PIXELS_AT_ONCE // (images.shape[1] * images.shape[2]))
    known = torch.cat([_standardised(part) for part in trained.split(size)])
    found = [_is_near(part, known) | _is_near(part.flip(2), known) for part in images.split(size)]
    return torch.cat(found).cpu()


def _is_near(images: Tensor, known: Tensor) -> Tensor:
    """uint8 [N, H, H, 3], float32 [M, P] -> bool [N]."""
    values = _standardised(images)
    return torch.stack([(values @ part.T >= CORRELATION).any(dim=1) for part in known.split(AT_ONCE)]).any(dim=0)


def _standardised(images: Tensor) -> Tensor:
    """uint8 [N, H, H, 3] -> float32 [N, P], each of mean 0 and length 1, so that a product of two is a correlation."""
    pixels = images.permute(0, 3, 1, 2).float()
    if pixels.shape[-1] > THUMBNAIL:
        pixels = F.adaptive_avg_pool2d(pixels, THUMBNAIL)
    values = pixels.flatten(1)
    return F.normalize(values - values.mean(dim=1, keepdim=True), dim=1)
