"""The two ways to compute an attention at inference; `cheaper_attention` takes the one with fewer operations.

Shape letters: B images, N latents, M tokens, C channels of a latent, T of a token, P heads, S channels of a head,
R rows: the latents (or tokens) of all images of a batch, one below the other.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn


class Dense(nn.Module):
    """Rows times a matrix, plus a bias: one Gemm.

    Args:
        weight: [in, out].
        bias: [out], or None.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.register_buffer("weight", weight.contiguous())
        self.register_buffer("bias", None if bias is None else bias.contiguous())

    def forward(self, rows: Tensor) -> Tensor:
        """Map [R, in] to [R, out]."""
        return rows @ self.weight if self.bias is None else torch.addmm(self.bias, rows, self.weight)


class OutputProjection(nn.Module):
    """From the heads' outputs to a latent: a matrix, where there is one, and a bias.

    Args:
        weight: [in, C], or None where the heads' channels are the latent's.
        bias: [C].
    """

    weight: Tensor | None
    bias: Tensor

    def __init__(self, weight: Tensor | None, bias: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)

    def without_bias(self, heads: Tensor) -> Tensor:
        """Map [R, in] to [R, C]."""
        return heads if self.weight is None else heads @ self.weight

    def forward(self, heads: Tensor) -> Tensor:
        """Map [R, in] to [R, C]."""
        return heads + self.bias if self.weight is None else torch.addmm(self.bias, heads, self.weight)


@dataclass(frozen=True)
class AttentionWeights:
    """What defines an attention of N latents over M tokens, in float64.

    Attributes:
        query: [P, C, S], scaled.
        query_bias: [P, S], scaled.
        key: [P, T, S]. A bias of the keys adds the same to all scores of a row, and softmax ignores that.
        value: [P, T, S].
        output: [P, S, C]; None where the heads' channels, side by side, are the latent.
        output_bias: [C]. It includes the values' bias, since a row of attention weights sums to one.
        position_bias: [P, N, M], added to the scores, or None.
    """

    query: Tensor
    query_bias: Tensor
    key: Tensor
    value: Tensor
    output: Tensor | None
    output_bias: Tensor
    position_bias: Tensor | None = None


@dataclass(frozen=True)
class Workload:
    """How often an attention's weights run over the same tokens, for one image.

    Attributes:
        latents: N.
        tokens: M.
        dynamic: runs with latents that depend on the image.
        constant: runs with constant latents, whose queries are known at export.
    """

    latents: int
    tokens: int
    dynamic: int
    constant: int = 0


class ProjectedAttention(nn.Module):
    """Queries, keys and values are projected for each head, as in training."""

    position_bias: Tensor | None

    def __init__(self, weights: AttentionWeights) -> None:
        super().__init__()
        self.heads, _, self.size = weights.query.shape
        self.query = Dense(concatenate_heads(weights.query), weights.query_bias.flatten())
        self.key = Dense(concatenate_heads(weights.key))
        self.value = Dense(concatenate_heads(weights.value))
        output = weights.output
        self.output = OutputProjection(None if output is None else output.flatten(0, 1), weights.output_bias)
        self.register_buffer("position_bias", weights.position_bias)

    @staticmethod
    def multiply_adds(weights: AttentionWeights, work: Workload) -> int:
        """Count multiply-adds for one image."""
        heads, dim, size = weights.query.shape
        token_dim, inner = weights.key.shape[1], heads * size
        n, m = work.latents, work.tokens
        each = 2 * n * m * inner + (0 if weights.output is None else n * inner * dim)
        return m * token_dim * 2 * inner + work.dynamic * n * dim * inner + (work.dynamic + work.constant) * each

    def split_heads(self, rows: Tensor, count: int) -> Tensor:
        """Map [R, P * S], `count` rows an image, to [B, P, count, S]."""
        return rows.view(-1, count, self.heads, self.size).transpose(1, 2)

    def keys_values(self, tokens: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Map [R, T], `count` tokens an image, to keys and values, [B, P, M, S] each."""
        return self.split_heads(self.key(tokens), count), self.split_heads(self.value(tokens), count)

    def queries(self, latents: Tensor, count: int) -> Tensor:
        """Map [R, C], `count` latents an image, to [B, P, N, S]."""
        return self.split_heads(self.query(latents), count)

    def forward(self, queries: Tensor, keys_values: tuple[Tensor, Tensor]) -> Tensor:
        """Attend with queries [B or 1, P, N, S]; returns the heads' outputs side by side, [R, P * S]."""
        keys, values = keys_values
        scores = queries @ keys.transpose(-1, -2)
        if self.position_bias is not None:
            scores = scores + self.position_bias
        return (scores.softmax(-1) @ values).transpose(1, 2).reshape(-1, self.heads * self.size)


class MergedAttention(nn.Module):
    """Tokens are keys and values of all heads; key and value matrices are merged into query and output."""

    position_bias: Tensor | None

    def __init__(self, weights: AttentionWeights) -> None:
        super().__init__()
        self.heads = len(weights.query)
        to_key = weights.key.transpose(1, 2)
        self.query = Dense(concatenate_heads(weights.query @ to_key), (weights.query_bias[:, None] @ to_key).flatten())
        self.output = OutputProjection((weights.value @ output_per_head(weights)).flatten(0, 1), weights.output_bias)
        bias = weights.position_bias
        # Score rows are ordered (latent, head), as the query Gemm returns them, so no transpose is needed.
        self.register_buffer("position_bias", None if bias is None else bias.transpose(0, 1).flatten(0, 1))

    @staticmethod
    def multiply_adds(weights: AttentionWeights, work: Workload) -> int:
        """Count multiply-adds for one image."""
        heads, dim, _ = weights.query.shape
        token_dim = weights.key.shape[1]
        n, m = work.latents, work.tokens
        each = 2 * heads * n * m * token_dim + n * heads * token_dim * dim
        return work.dynamic * n * dim * heads * token_dim + (work.dynamic + work.constant) * each

    def keys_values(self, tokens: Tensor, count: int) -> Tensor:
        """Map [R, T], `count` tokens an image, to [B, M, T]."""
        return tokens.view(-1, count, tokens.shape[1])

    def queries(self, latents: Tensor, count: int) -> Tensor:
        """Map [R, C], `count` latents an image, to [B, N * P, T]."""
        rows: Tensor = self.query(latents)
        return rows.view(-1, count * self.heads, rows.shape[1] // self.heads)

    def forward(self, queries: Tensor, tokens: Tensor) -> Tensor:
        """Attend with queries [B or 1, N * P, T]; returns the heads' outputs side by side, [R, P * T]."""
        scores = queries @ tokens.transpose(1, 2)
        if self.position_bias is not None:
            scores = scores + self.position_bias
        return (scores.softmax(-1) @ tokens).view(-1, self.heads * tokens.shape[2])


def concatenate_heads(matrices: Tensor) -> Tensor:
    """Map [P, in, out] to [in, P * out]."""
    return matrices.transpose(0, 1).flatten(1)


def output_per_head(weights: AttentionWeights) -> Tensor:
    """Return the output matrix of each head, [P, S, C]; an identity where the attention has none."""
    if weights.output is not None:
        return weights.output
    heads, _, size = weights.value.shape
    return torch.eye(heads * size, dtype=weights.value.dtype).view(heads, size, -1)


def cheaper_attention(weights: AttentionWeights, work: Workload) -> ProjectedAttention | MergedAttention:
    """Build the form with fewer operations."""
    merged = MergedAttention.multiply_adds(weights, work) < ProjectedAttention.multiply_adds(weights, work)
    return MergedAttention(weights) if merged else ProjectedAttention(weights)
