"""The two ways to compute an attention at inference; `export.graph.fold` takes the one with fewer operations.

Shape letters as in `training.config`; also P heads, S channels of a head, R rows: the latents (or tokens) of all
pictures of a batch, one below the other.
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
        """[R, in] -> [R, out]."""
        return rows @ self.weight if self.bias is None else torch.addmm(self.bias, rows, self.weight)


class Output(nn.Module):
    """From what the heads found to a latent: a matrix, where there is one, and a bias.

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

    def without_bias(self, found: Tensor) -> Tensor:
        """[R, in] -> [R, C]."""
        return found if self.weight is None else found @ self.weight

    def forward(self, found: Tensor) -> Tensor:
        """[R, in] -> [R, C]."""
        return found + self.bias if self.weight is None else torch.addmm(self.bias, found, self.weight)


@dataclass(frozen=True)
class Weights:
    """What defines an attention of N latents among M tokens, in float64; letters as above.

    Attributes:
        query: [P, C, S], scaled.
        query_bias: [P, S], scaled.
        key: [P, T, S]. A bias of the keys would be the same for all tokens of a row of scores, so it plays no part.
        value: [P, T, S].
        output: [P, S, C], from heads back to a latent; None where the heads' channels, side by side, are the latent.
        output_bias: [C]; with it the values' bias, which a row of weights, summing to one, lets through.
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
class Uses:
    """How often an attention's weights are used on the same tokens, and on how many latents and tokens.

    Attributes:
        latents: N.
        tokens: M.
        dynamic: times with latents that depend on the picture.
        constant: times with constant latents, whose queries are known beforehand.
    """

    latents: int
    tokens: int
    dynamic: int
    constant: int = 0


class Projected(nn.Module):
    """Queries, keys and values of each head, as it was trained."""

    def __init__(self, weights: Weights) -> None:
        super().__init__()
        self.heads, _, self.size = weights.query.shape
        self.query = Dense(side_by_side(weights.query), weights.query_bias.flatten())
        self.key = Dense(side_by_side(weights.key))
        self.value = Dense(side_by_side(weights.value))
        output = weights.output
        self.output = Output(None if output is None else output.flatten(0, 1), weights.output_bias)
        self.register_buffer("position_bias", weights.position_bias)

    position_bias: Tensor | None

    @staticmethod
    def multiply_adds(weights: Weights, uses: Uses) -> int:
        """Multiply-adds a picture."""
        heads, dim, size = weights.query.shape
        token_dim, inner = weights.key.shape[1], heads * size
        n, m = uses.latents, uses.tokens
        each = 2 * n * m * inner + (0 if weights.output is None else n * inner * dim)
        return m * token_dim * 2 * inner + uses.dynamic * n * dim * inner + (uses.dynamic + uses.constant) * each

    def split(self, rows: Tensor, count: int) -> Tensor:
        """[R, P * S] with `count` rows a picture -> [B, P, count, S]."""
        return rows.view(-1, count, self.heads, self.size).transpose(1, 2)

    def prepare(self, tokens: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Rows of `count` tokens a picture, [R, T] -> keys and values, [B, P, M, S]."""
        return self.split(self.key(tokens), count), self.split(self.value(tokens), count)

    def queries(self, latents: Tensor, count: int) -> Tensor:
        """Rows of `count` latents a picture, [R, C] -> [B, P, N, S]."""
        return self.split(self.query(latents), count)

    def forward(self, queries: Tensor, prepared: tuple[Tensor, Tensor]) -> Tensor:
        """Read: [B or 1, P, N, S] -> what the heads found, side by side, [R, P * S]."""
        keys, values = prepared
        scores = queries @ keys.transpose(-1, -2)
        if self.position_bias is not None:
            scores = scores + self.position_bias
        return (scores.softmax(-1) @ values).transpose(1, 2).reshape(-1, self.heads * self.size)


class Merged(nn.Module):
    """Tokens are their own keys and values, for all heads; those matrices went into the queries' and the output's."""

    def __init__(self, weights: Weights) -> None:
        super().__init__()
        self.heads = len(weights.query)
        to_key = weights.key.transpose(1, 2)
        self.query = Dense(side_by_side(weights.query @ to_key), (weights.query_bias[:, None] @ to_key).flatten())
        self.output = Output((weights.value @ output_of(weights)).flatten(0, 1), weights.output_bias)
        bias = weights.position_bias
        # Rows of scores are (latent, head), as the queries' Gemm leaves them: nothing has to be moved.
        self.register_buffer("position_bias", None if bias is None else bias.transpose(0, 1).flatten(0, 1))

    position_bias: Tensor | None

    @staticmethod
    def multiply_adds(weights: Weights, uses: Uses) -> int:
        """Multiply-adds a picture."""
        heads, dim, _ = weights.query.shape
        token_dim = weights.key.shape[1]
        n, m = uses.latents, uses.tokens
        each = 2 * heads * n * m * token_dim + n * heads * token_dim * dim
        return uses.dynamic * n * dim * heads * token_dim + (uses.dynamic + uses.constant) * each

    def prepare(self, tokens: Tensor, count: int) -> Tensor:
        """Rows of `count` tokens a picture, [R, T] -> [B, M, T]."""
        return tokens.view(-1, count, tokens.shape[1])

    def queries(self, latents: Tensor, count: int) -> Tensor:
        """Rows of `count` latents a picture, [R, C] -> [B, N * P, T]."""
        rows: Tensor = self.query(latents)
        return rows.view(-1, count * self.heads, rows.shape[1] // self.heads)

    def forward(self, queries: Tensor, tokens: Tensor) -> Tensor:
        """Read: [B or 1, N * P, T] -> what the heads found, side by side, [R, P * T]."""
        scores = queries @ tokens.transpose(1, 2)
        if self.position_bias is not None:
            scores = scores + self.position_bias
        return (scores.softmax(-1) @ tokens).view(-1, self.heads * tokens.shape[2])


def side_by_side(matrices: Tensor) -> Tensor:
    """[P, in, out] -> [in, P * out]."""
    return matrices.transpose(0, 1).flatten(1)


def output_of(weights: Weights) -> Tensor:
    """Return [P, S, C] also where there is none: each head's channels to their place."""
    if weights.output is not None:
        return weights.output
    heads, _, size = weights.value.shape
    return torch.eye(heads * size, dtype=weights.value.dtype).view(heads, size, -1)


def fold_attention(weights: Weights, uses: Uses) -> Projected | Merged:
    """Take the form with fewer operations."""
    cheaper = Merged.multiply_adds(weights, uses) < Projected.multiply_adds(weights, uses)
    return Merged(weights) if cheaper else Projected(weights)
