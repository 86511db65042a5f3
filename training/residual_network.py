"""A wide residual network, which teaches a Perceiver and is not served.

Convolutions know from the start that what is near belongs together. A network without them learns some of it from one
with them (Touvron et al. 2021, arXiv:2012.12877, section 5.2: a convolutional teacher is the better one).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from training.config import ModelConfig
from training.network import Network

# Channels of the three stages, as multiples of the first's; the second and the third halve height and width.
STAGES = (1, 2, 4)


class Convolution(nn.Module):
    """A 3 x 3 convolution without bias, padded with zeros.

    Its weight is a matrix, [out, 3 * 3 * in], which Muon takes, and lies in memory as channels-last kernels do.
    """

    def __init__(self, channels: int, out: int, stride: int = 1) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out, 9 * channels))
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """float [B, in, H, W] -> float [B, out, H / stride, W / stride]."""
        kernels = self.weight.unflatten(1, (3, 3, -1)).permute(0, 3, 1, 2)
        return F.conv2d(x, kernels, stride=self.stride, padding=1)


class ResidualBlock(nn.Module):
    """Norm, ReLU, convolution, twice, and a shortcut (He et al. 2016, arXiv:1603.05027, figure 4e)."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.first_norm = nn.BatchNorm2d(channels)
        self.first = Convolution(channels, out, stride)
        self.second_norm = nn.BatchNorm2d(out)
        self.second = Convolution(out, out)
        self.shortcut = None
        if stride > 1 or channels != out:
            self.shortcut = nn.Linear(channels, out, bias=False)
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """float [B, in, H, W] -> float [B, out, H / stride, W / stride]."""
        y = F.relu(self.first_norm(x))
        branch = self.second(F.relu(self.second_norm(self.first(y))))
        if self.shortcut is None:
            return x + branch
        kept = y[:, :, :: self.stride, :: self.stride]
        return F.conv2d(kept, self.shortcut.weight[:, :, None, None]) + branch


class ResidualNetwork(Network):
    """A wide residual network (Zagoruyko and Komodakis 2016, arXiv:1605.07146) for small images.

    Three stages of ``num_blocks`` blocks with ``dim``, twice and four times ``dim`` channels.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.stem = Convolution(3, config.dim)
        blocks: list[nn.Module] = []
        channels = config.dim
        for stage, multiple in enumerate(STAGES):
            for i in range(config.num_blocks):
                blocks.append(ResidualBlock(channels, multiple * config.dim, 2 if stage and not i else 1))
                channels = multiple * config.dim
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.BatchNorm2d(channels)
        self.head = nn.Linear(channels, config.num_classes)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Normal with variance 2 / fan-in for what a ReLU feeds (He et al. 2015); a head of zeros."""
        for module in self.modules():
            if isinstance(module, Convolution | nn.Linear):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def features_of_view(self, pixels: Tensor) -> Tensor:
        """The mean over the image of what the last block has: float [B, 3, H, W] -> float [B, 4 * dim]."""
        x = self.blocks(self.stem(pixels.contiguous(memory_format=torch.channels_last)))
        return F.relu(self.norm(x)).mean(dim=(2, 3))
