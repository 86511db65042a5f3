"""What cameras, networks and users do to images before they are sent: greyscale, JPEG, noise, blur.

A part of Hendrycks and Dietterich (2019), as augmentation: batched tensor code, as `training.data.trivial_augment`.

Shape letters: B images of H x W pixels.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

CORRUPTIONS = ("none", "greyscale", "jpeg", "noise", "blur")

MIN_QUALITY, MAX_QUALITY = 40, 95  # of a JPEG
MAX_NOISE = 30.0  # standard deviation, levels
MIN_BLUR, MAX_BLUR = 0.4, 1.4  # standard deviation, pixels
BLUR_RADIUS = 3  # pixels

# ITU-R BT.601, full range, as JFIF has it: rows are Y, Cb and Cr.
YCBCR = ((0.299, 0.587, 0.114), (-0.168736, -0.331264, 0.5), (0.5, -0.418688, -0.081312))

# ITU-T T.81, annex K.1 and K.2: what the coefficients of luminance and chrominance are divided by at quality 50.
LUMINANCE = (
    (16, 11, 10, 16, 24, 40, 51, 61),
    (12, 12, 14, 19, 26, 58, 60, 55),
    (14, 13, 16, 24, 40, 57, 69, 56),
    (14, 17, 22, 29, 51, 87, 80, 62),
    (18, 22, 37, 56, 68, 109, 103, 77),
    (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101),
    (72, 92, 95, 98, 112, 100, 103, 99),
)
CHROMINANCE = (
    (17, 18, 24, 47, 99, 99, 99, 99),
    (18, 21, 26, 66, 99, 99, 99, 99),
    (24, 26, 56, 99, 99, 99, 99, 99),
    (47, 66, 99, 99, 99, 99, 99, 99),
    *((99,) * 8,) * 4,
)


@torch.compiler.disable  # shapes depend on the draws
def corrupt(images: Tensor, corruption: Tensor, severity: Tensor) -> Tensor:
    """Corrupt each image by its corruption.

    Every corruption is computed for those images alone that have it.

    Args:
        images: uint8 or float [B, H, W, 3], 0..255.
        corruption: int64 [B], indices into `CORRUPTIONS`.
        severity: float32 [B], 0..1.

    Returns:
        float32 [B, H, W, 3], 0..255; images without a corruption as they are. Noise is drawn from torch's generator.
    """
    result = images.permute(0, 3, 1, 2).float()
    functions = {"greyscale": greyscale, "jpeg": jpeg, "noise": noise, "blur": blur}
    # Autocast would round matrix products to eight bits.
    with torch.autocast(images.device.type, enabled=False):
        for name, function in functions.items():
            chosen = (corruption == CORRUPTIONS.index(name)).nonzero().squeeze(1)
            if len(chosen):
                result = result.index_copy(0, chosen, function(result[chosen], severity[chosen]))
    return result.permute(0, 2, 3, 1)


def greyscale(pixels: Tensor, _severity: Tensor) -> Tensor:
    """Luma in all three channels; float [B, 3, H, W]."""
    luma = pixels.new_tensor(YCBCR[0])
    return torch.einsum("c,bchw->bhw", luma, pixels)[:, None].expand_as(pixels)


def noise(pixels: Tensor, severity: Tensor) -> Tensor:
    """Gaussian noise of up to `MAX_NOISE` levels; float [B, 3, H, W]."""
    sigma = MAX_NOISE * severity[:, None, None, None]
    return (pixels + sigma * torch.randn(pixels.shape, device=pixels.device)).clamp(0, 255)


def blur(pixels: Tensor, severity: Tensor) -> Tensor:
    """Gaussian blur of `MIN_BLUR` to `MAX_BLUR` pixels, edges repeated; float [B, 3, H, W]."""
    sigma = MIN_BLUR + (MAX_BLUR - MIN_BLUR) * severity[:, None]
    offsets = torch.arange(-BLUR_RADIUS, BLUR_RADIUS + 1, device=pixels.device)
    kernel = (-(offsets**2) / (2 * sigma**2)).softmax(dim=1)
    # Images of a batch stand in the channels, each with a kernel of its own.
    count, channels, height, width = pixels.shape
    kernels = kernel.repeat_interleave(channels, dim=0)[:, None]
    padded = F.pad(pixels, (BLUR_RADIUS,) * 4, mode="replicate")
    planes = padded.reshape(1, count * channels, height + 2 * BLUR_RADIUS, width + 2 * BLUR_RADIUS)
    planes = F.conv2d(planes, kernels[:, :, :, None], groups=count * channels)
    planes = F.conv2d(planes, kernels[:, :, None, :], groups=count * channels)
    return planes.reshape(pixels.shape)


def jpeg(pixels: Tensor, severity: Tensor) -> Tensor:
    """What a JPEG of quality `MAX_QUALITY` down to `MIN_QUALITY` keeps, chroma at half the size.

    Quantises as ITU-T T.81 does, with libjpeg's scale of its tables for a quality. Differs from a file by rounding.

    Args:
        pixels: float [B, 3, H, W], 0..255.
        severity: float [B], 0..1.

    Returns:
        float [B, 3, H, W], 0..255.
    """
    height, width = pixels.shape[2:]
    quality = MAX_QUALITY - (MAX_QUALITY - MIN_QUALITY) * severity
    scale = torch.where(quality < 50, 50 / quality, 2 - quality / 50)
    to_ycbcr = pixels.new_tensor(YCBCR)
    padded = F.pad(pixels, (0, -width % 16, 0, -height % 16), mode="replicate")
    planes = torch.einsum("dc,bchw->bdhw", to_ycbcr, padded)
    luma = _quantise(planes[:, :1] - 128, LUMINANCE, scale) + 128
    chroma = _quantise(F.avg_pool2d(planes[:, 1:], 2), CHROMINANCE, scale)
    chroma = F.interpolate(chroma, scale_factor=2, mode="bilinear", align_corners=False)
    planes = torch.cat([luma, chroma], dim=1)
    decoded = torch.einsum("dc,bchw->bdhw", torch.linalg.inv(to_ycbcr), planes)
    return decoded[..., :height, :width].clamp(0, 255)


def _quantise(planes: Tensor, table: tuple[tuple[int, ...], ...], scale: Tensor) -> Tensor:
    """Round the cosine transform of each block of 8 x 8; float [B, C, H, W], sides multiples of 8."""
    count, channels, height, width = planes.shape
    frequency = torch.arange(8, device=planes.device)[:, None]
    transform = 0.5 * torch.cos((2 * torch.arange(8, device=planes.device) + 1) * frequency * math.pi / 16)
    transform[0] /= math.sqrt(2)
    steps = (planes.new_tensor(table) * scale[:, None, None]).round().clamp(1, 255)[:, None, None, None]
    blocks = planes.reshape(count, channels, height // 8, 8, width // 8, 8).transpose(3, 4)
    coefficients = transform @ blocks @ transform.T
    kept = (coefficients / steps).round() * steps
    return (transform.T @ kept @ transform).transpose(3, 4).reshape(planes.shape)
