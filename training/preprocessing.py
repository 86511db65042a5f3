"""From stored pixels to what the model reads. The only copy of the mean and the variance."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Preprocess(nn.Module):
    """Normalise by channel, then resize, as the Keras example does; part of the exported graph.

    Bilinear with half-pixel centres, not antialiased (Keras' ``Resizing``); nothing is resized where the sizes agree.

    Args:
        image_size: height and width of the result, pixels.
        mean: mean of each channel on the 0..255 scale.
        variance: variance of each channel on the 0..255 scale.
    """

    mean: Tensor
    variance: Tensor

    def __init__(
        self,
        image_size: int,
        mean: tuple[float, ...] = (127.5, 127.5, 127.5),
        variance: tuple[float, ...] = (4096.0, 4096.0, 4096.0),
    ) -> None:
        super().__init__()
        self.image_size = image_size
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32))
        self.register_buffer("variance", torch.tensor(variance, dtype=torch.float32))

    def fit(self, *splits: Tensor, chunk: int = 1 << 22) -> None:
        """Take mean and variance from all images given, exactly (integer sums).

        Args:
            splits: uint8 [B, H, W, 3] each.
            chunk: pixels summed at once, at most, but one image at least; each takes 48 bytes meanwhile.
        """
        total = torch.zeros(3, dtype=torch.float64)
        squares = torch.zeros(3, dtype=torch.float64)
        parts = (
            part
            for images in splits
            for part in images.split(max(1, chunk // max(1, images.shape[1] * images.shape[2])))
        )
        for part in parts:
            values = part.reshape(-1, 3).to(torch.int64)
            total += values.sum(0).cpu()
            squares += values.square().sum(0).cpu()
        count = sum(images.numel() for images in splits) // 3
        mean = total / count
        self.mean.copy_(mean)
        # A channel that never changes (in fluorescence, say) would divide by zero: its deviation counts as one level.
        self.variance.copy_((squares / count - mean.square()).clamp(min=1.0))

    def forward(self, images: Tensor) -> Tensor:
        """uint8 [B, H, W, 3] (0..255, RGB) -> float [B, 3, image_size, image_size], normalised."""
        pixels = (images.to(self.mean.dtype) - self.mean) / self.variance.sqrt()
        pixels = pixels.permute(0, 3, 1, 2)
        if pixels.shape[-2:] != (self.image_size, self.image_size):
            size = (self.image_size, self.image_size)
            pixels = F.interpolate(pixels, size=size, mode="bilinear", align_corners=False)
        return pixels
