"""The Perceiver (Jaegle et al. 2021, arXiv:2103.03206): latents read the image by cross-attention, then themselves.

One configurable model; see `training.config.ModelConfig` for the knobs and for the letters of the shapes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from training.config import ModelConfig
from training.network import Network
from training.position_encoding import fourier_features, grid_position_bias

NORM_EPSILON = 1e-6


class Tokens(nn.Module):
    """Images to tokens: square patches, a dense layer, the position.

    A patch is flattened as (row, column, channel), patches stand in row-major order. With ``patch_overlap`` each patch
    reaches into its neighbours, and into the mean colour (zero) around the image.
    """

    fourier: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.stride = config.patch_size
        self.overlap = config.patch_overlap
        self.kernel = config.kernel
        features = 3 * self.kernel**2
        self.has_fourier = config.position in ("fourier", "both")
        if self.has_fourier:
            self.register_buffer("fourier", fourier_features(config.grid, config.fourier_bands), persistent=False)
            features += self.fourier.shape[1]
        self.patch_projection = nn.Linear(features, config.token_dim)
        self.position_embedding: nn.Parameter | None = None
        if config.position in ("learned", "both"):
            self.position_embedding = nn.Parameter(torch.empty(config.num_tokens, config.token_dim))

    def patches(self, pixels: Tensor) -> Tensor:
        """float [B, 3, H, W] -> float [B, M, kernel * kernel * 3]."""
        pixels = F.pad(pixels, [self.overlap] * 4)
        cut = pixels.unfold(2, self.kernel, self.stride).unfold(3, self.kernel, self.stride)
        return cut.permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(1, 2)

    def forward(self, pixels: Tensor) -> Tensor:
        """float [B, 3, H, W] -> float [B, M, T]."""
        patches = self.patches(pixels)
        if self.has_fourier:
            patches = torch.cat([patches, self.fourier.to(patches).expand(len(patches), -1, -1)], dim=-1)
        tokens = self.patch_projection(patches)
        if self.position_embedding is not None:
            tokens = tokens + self.position_embedding
        return tokens


class FeedForward(nn.Module):
    """Dense, exact (erf) GELU, dense, dropout; the dropout stands after the last dense layer only."""

    def __init__(self, dim: int, hidden: int, out: int, dropout: float) -> None:
        super().__init__()
        self.hidden = nn.Linear(dim, hidden)
        self.output = nn.Linear(hidden, out)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """float [..., dim] -> float [..., out]."""
        return self.dropout(self.output(F.gelu(self.hidden(x))))


class DropPath(nn.Module):
    """Stochastic depth (Huang et al. 2016): while training, drop a residual branch for whole images."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, branch: Tensor) -> Tensor:
        """float [B, N, C] -> the same; each image's branch is zero with probability ``rate``, scaled up otherwise."""
        if not self.training or self.rate == 0:
            return branch
        keep = torch.rand(len(branch), 1, 1, device=branch.device) >= self.rate
        return branch * keep / (1 - self.rate)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[B, n, heads * size] -> [B, heads, n, size]."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """[B, heads, n, size] -> [B, n, heads * size]."""
    return x.transpose(1, 2).flatten(2)


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, dropout: float) -> Tensor:
    """Softmax(scale * q k^T + bias) v over heads.

    On a CPU the plain products. Torch's fused kernel knows no dropout there, and takes 1.4 to 5 times as long in
    bfloat16 (2.13, one thread, forward and backward, heads of 32 to 256 channels, 64 to 1,024 keys); in float32 it is
    within 25 % either way. Elsewhere the fused kernel.

    Args:
        q: float [B, heads, n, size].
        k: float [B, heads, m, size].
        v: float [B, heads, m, size].
        bias: float [heads, n, m] or None.
        scale: factor of the scores.
        dropout: rate on the attention weights.

    Returns:
        float [B, n, heads * size].
    """
    bias = None if bias is None else bias.to(q.dtype)
    if q.device.type != "cpu":
        return merge_heads(F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout, scale=scale))
    scores = (q * scale) @ k.transpose(-2, -1)
    if bias is not None:
        scores = scores + bias
    # Autocast would store scores and their gradients in float32; the kernel computes in float32 either way.
    with torch.autocast("cpu", enabled=False):
        weights = F.dropout(scores.softmax(-1), dropout, training=dropout > 0)
    return merge_heads(weights @ v)


class CrossAttention(nn.Module):
    """Latents read the tokens, then a feed-forward layer; two residuals (`ModelConfig.residual` says of what)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        inner = config.cross_heads * config.cross_head_dim
        self.heads = config.cross_heads
        self.normalised_residual = config.residual == "normalised"
        self.attention_dropout = config.attention_dropout
        self.latent_norm = nn.LayerNorm(config.dim, eps=NORM_EPSILON)
        self.token_norm = nn.LayerNorm(config.token_dim, eps=NORM_EPSILON)
        self.query = nn.Linear(config.dim, inner, bias=config.bias)
        self.key = nn.Linear(config.token_dim, inner, bias=config.bias)
        self.value = nn.Linear(config.token_dim, inner, bias=config.bias)
        self.output = nn.Linear(inner, config.dim, bias=config.bias) if config.cross_output else nn.Identity()
        self.scale = nn.Parameter(torch.ones(())) if config.cross_scale == "learned" else config.cross_head_dim**-0.5
        self.position_bias: nn.Parameter | None = None
        if config.cross_position_bias:
            self.position_bias = nn.Parameter(torch.zeros(self.heads, config.num_latents, config.num_tokens))
        self.ffn_norm = nn.LayerNorm(config.dim, eps=NORM_EPSILON)
        hidden = round(config.ffn_ratio * config.dim)
        self.ffn = FeedForward(config.dim, hidden, config.dim, config.ffn_dropout)

    def forward(self, latents: Tensor, tokens: Tensor, kept: Tensor | None = None) -> Tensor:
        """float [B, N, C] latents, float [B, M, T] tokens -> float [B, N, C]; `kept` as in `read`."""
        queries = self.latent_norm(latents)
        attended = self.read(queries, self.token_norm(tokens), kept)
        x = self.output(attended) + (queries if self.normalised_residual else latents)
        y = self.ffn_norm(x)
        return self.ffn(y) + (y if self.normalised_residual else x)

    def read(self, queries: Tensor, tokens: Tensor, kept: Tensor | None = None) -> Tensor:
        """What the heads read.

        Args:
            queries: normed latents, float [B, N, C].
            tokens: normed tokens, float [B, M, T].
            kept: which of the model's latents these are, int64 [N]; None: all, in their order.

        Returns:
            float [B, N, heads * size].
        """
        q = split_heads(self.query(queries) * self.scale, self.heads)
        k = split_heads(self.key(tokens), self.heads)
        v = split_heads(self.value(tokens), self.heads)
        dropout = self.attention_dropout if self.training else 0.0
        bias = self.position_bias
        if bias is not None and kept is not None:
            bias = bias[:, kept]
        return attend(q, k, v, bias, 1.0, dropout)


class SelfAttention(nn.Module):
    """Multi-head self-attention among the latents, scores over sqrt(head size)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        inner = config.self_heads * config.self_head_dim
        self.heads = config.self_heads
        self.head_dim = config.self_head_dim
        self.attention_dropout = config.attention_dropout
        self.query = nn.Linear(config.dim, inner, bias=config.bias)
        self.key = nn.Linear(config.dim, inner, bias=config.bias)
        self.value = nn.Linear(config.dim, inner, bias=config.bias)
        self.output = nn.Linear(inner, config.dim, bias=config.bias)

    def reset_as_kernels(self) -> None:
        """Glorot uniform by Keras' fans before its pull request 22789 (2026): kernels of [field, in, out]."""
        # [dim, heads, size] of queries, keys and values, and [heads, size, dim] of the output.
        dim = self.output.out_features
        bound = (6 / (dim * self.heads + dim * self.head_dim)) ** 0.5
        for layer in (self.query, self.key, self.value):
            nn.init.uniform_(layer.weight, -bound, bound)
        bound = (6 / (self.heads * self.head_dim + self.heads * dim)) ** 0.5
        nn.init.uniform_(self.output.weight, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        """float [B, N, C] -> float [B, N, C]."""
        q, k, v = (split_heads(layer(x), self.heads) for layer in (self.query, self.key, self.value))
        dropout = self.attention_dropout if self.training else 0.0
        return self.output(attend(q, k, v, None, self.head_dim**-0.5, dropout))


class Block(nn.Module):
    """Pre-norm Transformer block on the latents."""

    def __init__(self, config: ModelConfig, drop_path: float) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.dim, eps=NORM_EPSILON)
        self.attention = SelfAttention(config)
        self.ffn_norm = nn.LayerNorm(config.dim, eps=NORM_EPSILON)
        hidden = round(config.ffn_ratio * config.dim)
        self.ffn = FeedForward(config.dim, hidden, config.dim, config.ffn_dropout)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """float [B, N, C] -> float [B, N, C]."""
        x = x + self.drop_path(self.attention(self.attention_norm(x)))
        return x + self.drop_path(self.ffn(self.ffn_norm(x)))


class Transformer(nn.ModuleList):
    """The blocks of one iteration."""

    def __init__(self, config: ModelConfig) -> None:
        rates = (
            torch.linspace(0, config.drop_path, config.num_blocks).tolist()
            if config.num_blocks > 1
            else [config.drop_path]
        )
        super().__init__(Block(config, rates[i]) for i in range(config.num_blocks))

    def forward(self, x: Tensor) -> Tensor:
        """float [B, N, C] -> float [B, N, C]."""
        for block in self:
            x = block(x)
        return x


class Perceiver(Network):
    """Normalised images to logits.

    ``cross_attentions`` and ``transformers`` hold each set of weights once; which of them an iteration uses follows
    from ``config.sharing`` (`cross_attention_of`, `transformer_of`).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.tokens = Tokens(config)
        self.latents = nn.Parameter(torch.empty(config.num_latents, config.dim))
        crosses = self.cross_attention_of(config.num_iterations - 1) + 1
        transformers = self.transformer_of(config.num_iterations - 1) + 1
        self.cross_attentions = nn.ModuleList(CrossAttention(config) for _ in range(crosses))
        self.transformers = nn.ModuleList(Transformer(config) for _ in range(transformers))
        self.head_norm = nn.LayerNorm(config.dim, eps=NORM_EPSILON) if config.head_norm else nn.Identity()
        if config.head_hidden:
            self.head = FeedForward(config.dim, config.dim, config.num_classes, config.logits_dropout)
        else:
            self.head = nn.Sequential(nn.Linear(config.dim, config.num_classes), nn.Dropout(config.logits_dropout))
        self.reset_parameters()

    def cross_attention_of(self, iteration: int) -> int:
        """Index into ``cross_attentions`` of an iteration's weights."""
        if self.config.sharing == "all":
            return 0
        return iteration if self.config.sharing == "none" else min(iteration, 1)

    def transformer_of(self, iteration: int) -> int:
        """Index into ``transformers`` of an iteration's weights."""
        if self.config.sharing in ("all", "all_but_first_cross"):
            return 0
        return iteration if self.config.sharing == "none" else min(iteration, 1)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Glorot uniform for dense layers, zero biases, uniform +-0.05 positions, normal latents, as the Keras example.

        With ``attention_fans`` kernel the self-attention's values are `SelfAttention.reset_as_kernels`; with
        ``latent_init`` grid the cross-attentions' position biases are set to `grid_position_bias`.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        if self.config.attention_fans == "kernel":
            for block in (block for transformer in self.transformers for block in transformer):
                block.attention.reset_as_kernels()
        if self.tokens.position_embedding is not None:
            nn.init.uniform_(self.tokens.position_embedding, -0.05, 0.05)
        nn.init.normal_(self.latents, std=self.config.latent_std)
        if self.config.latent_init == "grid":
            for cross in self.cross_attentions:
                bias = grid_position_bias(self.config.cross_heads, self.config.num_latents, self.config.grid)
                cross.position_bias.copy_(bias)

    def draw_latents(self) -> Tensor | None:
        """The latents that a training step keeps where ``latent_dropout`` leaves some out, int64 [kept]; None: all.

        As PatchDropout (Liu et al. 2022, arXiv:2208.07220) draws tokens of a vision transformer: less to compute, and
        no latent can rely on another. One draw for all iterations and for all images of the step, or of this
        process where several share them.
        """
        if not self.training or self.config.latent_dropout == 0:
            return None
        return torch.randperm(self.config.num_latents, device=self.latents.device)[: self.config.kept_latents]

    def features_of_view(self, pixels: Tensor) -> Tensor:
        """What the head classifies, of the pixels as they are: float [B, 3, image_size, image_size] -> float [B, C]."""
        tokens = self.tokens(pixels)
        kept = self.draw_latents()
        latents = (self.latents if kept is None else self.latents[kept]).expand(len(pixels), -1, -1)
        for i in range(self.config.num_iterations):
            latents = self.cross_attentions[self.cross_attention_of(i)](latents, tokens, kept)
            latents = self.transformers[self.transformer_of(i)](latents)
        return self.head_norm(latents).mean(dim=1)
