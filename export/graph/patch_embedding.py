"""From stored pixels to layer-normed tokens: one convolution, and a constant for each token.

Normalisation, resize, patches, projection and position are together affine in the image. The output for a black image
is the constant part, which holds mean, bias, position and padding. The rest is linear.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from export.graph.trained import TrainedModel
from training.model import NORM_EPSILON


def interpolation_matrix(size: int, target: int) -> Tensor:
    """Return linear interpolation with half-pixel centres as a matrix, float64 [target, size].

    ONNX's Resize would need the batch size as a number, and so a branch of the graph that computes it.
    """
    identity = torch.eye(size, dtype=torch.float64)[None]
    return F.interpolate(identity, size=target, mode="linear", align_corners=False)[0].T.contiguous()


class PatchEmbedding(nn.Module):
    """Stored pixels to layer-normed tokens, without that norm's scale and shift."""

    weight: Tensor
    constant: Tensor
    resize: Tensor | None

    def __init__(self, trained: TrainedModel) -> None:
        super().__init__()
        tokens, preprocess, config = trained.model.tokens, trained.preprocess, trained.model.config
        self.stride, self.overlap = config.patch_size, config.patch_overlap
        kernel = tokens.kernel
        weight = tokens.patch_projection.weight[:, : 3 * kernel**2].reshape(-1, kernel, kernel, 3)
        self.register_buffer("weight", (weight / preprocess.variance.sqrt()).permute(0, 3, 1, 2).contiguous())
        black = torch.zeros(1, config.input_size, config.input_size, 3, dtype=torch.uint8)
        self.register_buffer("constant", tokens(preprocess(black))[0])
        self.register_buffer("resize", None)
        if config.input_size != config.image_size:
            self.resize = interpolation_matrix(config.input_size, config.image_size)

    def forward(self, images: Tensor) -> Tensor:
        """Map uint8 [B, H, W, 3] to [R, T]."""
        pixels = images.to(self.weight.dtype).permute(0, 3, 1, 2)
        if self.resize is not None:
            pixels = self.resize @ pixels @ self.resize.T
        patches = F.conv2d(pixels, self.weight, stride=self.stride, padding=self.overlap)
        tokens = patches.flatten(2).transpose(1, 2) + self.constant
        return F.layer_norm(tokens, tokens.shape[-1:], eps=NORM_EPSILON).flatten(0, 1)
