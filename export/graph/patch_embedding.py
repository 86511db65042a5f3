"""From stored pixels to layer-normed tokens: one convolution, and a constant for each token.

Normalisation, resize, patches, their projection and the position are together affine in the picture: what a black
picture gives is the constant, with mean, bias, position and padding in it; the rest is linear.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from export.graph.trained import TrainingForm
from training.model import NORM_EPSILON


def interpolation(size: int, target: int) -> Tensor:
    """Linear interpolation with half-pixel centres as a matrix, float64 [target, size].

    As a matrix, since ONNX's Resize wants the batch's size as a number, and so a graph's branch that computes it.
    """
    identity = torch.eye(size, dtype=torch.float64)[None]
    return F.interpolate(identity, size=target, mode="linear", align_corners=False)[0].T.contiguous()


class Tokens(nn.Module):
    """Stored pixels to layer-normed tokens, without that norm's scale and shift."""

    weight: Tensor
    constant: Tensor
    resize: Tensor | None

    def __init__(self, form: TrainingForm) -> None:
        super().__init__()
        tokens, preprocess = form.model.tokens, form.preprocess
        config = form.model.config
        self.stride, self.overlap = config.patch_size, config.patch_overlap
        kernel = tokens.kernel
        weight = tokens.patch_projection.weight[:, : 3 * kernel**2].reshape(-1, kernel, kernel, 3)
        self.register_buffer("weight", (weight / preprocess.variance.sqrt()).permute(0, 3, 1, 2).contiguous())
        # The map is affine, so what a black picture gives is the constant of each token.
        black = torch.zeros(1, config.input_size, config.input_size, 3, dtype=torch.uint8)
        self.register_buffer("constant", tokens(preprocess(black))[0])
        self.register_buffer("resize", None)
        if config.input_size != config.image_size:
            self.resize = interpolation(config.input_size, config.image_size)

    def forward(self, images: Tensor) -> Tensor:
        """uint8 [B, H, W, 3] -> [R, T]."""
        pixels = images.to(self.weight.dtype).permute(0, 3, 1, 2)
        if self.resize is not None:
            pixels = self.resize @ pixels @ self.resize.T
        patches = F.conv2d(pixels, self.weight, stride=self.stride, padding=self.overlap)
        tokens = patches.flatten(2).transpose(1, 2) + self.constant
        return F.layer_norm(tokens, tokens.shape[-1:], eps=NORM_EPSILON).flatten(0, 1)
