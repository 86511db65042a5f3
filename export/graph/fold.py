"""The serving form: the trained function with everything that is constant at inference multiplied out beforehand.

The algebra is exact; only rounding differs. Each attention is folded where that lowers the number of operations.

- Cross-attention keys. A row of scores, (Wq l + bq) . (Wk x + bk), differs from (A l + a) . x with A = Wk^T Wq and
  a = Wk^T bq by what is the same for every token, and softmax does not see that: tokens are their own keys.
- Values. A row of weights sums to one, so sum_j p_j (Wv x_j + bv) = Wv (sum_j p_j x_j) + bv: project afterwards.
- Self-attention likewise: each head's Wq and Wk become one matrix, its Wv and Wo another.
- The first iteration's latents are constant, so its queries are, and what its residual adds.
- Keys, values and layer norm of the tokens are computed once for all iterations; that norm's scale and shift, and those
  of a norm before the head, go into the matrices behind them.
- Everything from the pixels to the tokens is affine in the picture: one matrix, and a constant for each token that
  holds mean, bias, position and what the padding adds.
- The mean over the latents commutes with the last feed-forward layer's output, and with the scale of a norm.

Shape letters as in `training.config`; also P heads, S channels of a head, R rows: the latents (or tokens) of all
pictures of a batch, one below the other.
"""

import copy
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from export.graph.attention import Dense, Merged, Projected, Uses, Weights, fold_attention
from export.graph.patch_embedding import Tokens
from export.graph.trained import TrainingForm
from training.config import ModelConfig
from training.model import NORM_EPSILON, Block, CrossAttention, Perceiver, SelfAttention, Transformer
from training.model import FeedForward as TrainedFeedForward

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def bias_of(layer: nn.Linear) -> Tensor:
    """A layer's bias, zero where it has none."""
    return layer.weight.new_zeros(layer.out_features) if layer.bias is None else layer.bias


def dense(layer: nn.Linear, factor: float = 1.0) -> Dense:
    """A trained layer, times a factor."""
    return Dense(layer.weight.T * factor, bias_of(layer) * factor)


def pick(modules: nn.ModuleList, index: int, kind: type[ModuleT]) -> ModuleT:
    """A module of a list, of the type that all in it are of."""
    module = modules[index]
    assert isinstance(module, kind)
    return module


class FeedForward(nn.Module):
    """Dense, exact GELU, dense."""

    def __init__(self, ffn: TrainedFeedForward, factor: float = 1.0) -> None:
        super().__init__()
        self.hidden = dense(ffn.hidden)
        self.output = dense(ffn.output, factor)

    def forward(self, rows: Tensor) -> Tensor:
        """[R, C] -> [R, out]."""
        result: Tensor = self.output(F.gelu(self.hidden(rows)))
        return result

    def mean(self, rows: Tensor, count: int) -> Tensor:
        """[R, C] with `count` rows a picture -> mean of `forward`, [B, out]; only the mean goes through the output."""
        result: Tensor = self.output(mean_rows(F.gelu(self.hidden(rows)), count))
        return result


def mean_rows(rows: Tensor, count: int) -> Tensor:
    """[R, C] with `count` rows a picture -> [B, C]."""
    return rows.view(-1, count, rows.shape[1]).mean(1)


def heads_of(layer: nn.Linear, heads: int) -> Tensor:
    """A layer's weight, head by head: [P, in, S]."""
    return layer.weight.reshape(heads, -1, layer.in_features).transpose(1, 2)


def cross_weights(cross: CrossAttention) -> Weights:
    """The attention of a cross-attention module on tokens that are normed without scale and shift."""
    scale, shift = cross.token_norm.weight[:, None], cross.token_norm.bias
    passed = cross.value.weight @ shift + bias_of(cross.value)
    output: Tensor | None = None
    if isinstance(cross.output, nn.Linear):
        output = cross.output.weight.T.reshape(cross.heads, -1, cross.output.out_features)
        passed = cross.output.weight @ passed + bias_of(cross.output)
    return Weights(
        query=heads_of(cross.query, cross.heads) * cross.scale,
        query_bias=bias_of(cross.query).view(cross.heads, -1) * cross.scale,
        key=heads_of(cross.key, cross.heads) * scale,
        value=heads_of(cross.value, cross.heads) * scale,
        output=output,
        output_bias=passed,
        position_bias=cross.position_bias,
    )


def self_weights(attention: SelfAttention) -> Weights:
    """The attention of a block on its normed latents."""
    heads, scale, output = attention.heads, attention.head_dim**-0.5, attention.output.weight
    return Weights(
        query=heads_of(attention.query, heads) * scale,
        query_bias=bias_of(attention.query).view(heads, -1) * scale,
        key=heads_of(attention.key, heads),
        value=heads_of(attention.value, heads),
        output=output.T.reshape(heads, -1, len(output)),
        output_bias=output @ bias_of(attention.value) + bias_of(attention.output),
    )


class FoldedCross(nn.Module):
    """Latents read the tokens, then a feed-forward layer.

    Args:
        cross: what was trained.
        config: of the model.
        uses: of these weights.
    """

    def __init__(self, cross: CrossAttention, config: ModelConfig, uses: Uses) -> None:
        super().__init__()
        self.latents = config.num_latents
        self.normalised_residual = cross.normalised_residual
        self.latent_norm = cross.latent_norm
        self.attention = fold_attention(cross_weights(cross), uses)
        self.ffn_norm = cross.ffn_norm
        self.ffn = FeedForward(cross.ffn)

    def attend(self, latents: Tensor, prepared: Tensor | tuple[Tensor, Tensor]) -> Tensor:
        """[R, C] -> [R, C], before the feed-forward layer."""
        normed = self.latent_norm(latents)
        found = self.attention(self.attention.queries(normed, self.latents), prepared)
        result: Tensor = self.attention.output(found) + (normed if self.normalised_residual else latents)
        return result

    def feed_forward(self, rows: Tensor) -> Tensor:
        """[R, C] -> [R, C]."""
        normed = self.ffn_norm(rows)
        result: Tensor = self.ffn(normed) + (normed if self.normalised_residual else rows)
        return result

    def mean(self, rows: Tensor) -> Tensor:
        """Mean over the latents of `feed_forward`: [R, C] -> [B, C]."""
        normed = self.ffn_norm(rows)
        kept = normed if self.normalised_residual else rows
        return self.ffn.mean(normed, self.latents) + mean_rows(kept, self.latents)


class FirstRead(nn.Module):
    """The first iteration's attention, whose latents are constant: so are its queries, and what its residual adds."""

    queries: Tensor
    residual: Tensor

    def __init__(self, cross: FoldedCross, latents: Tensor) -> None:
        super().__init__()
        normed = cross.latent_norm(latents)
        self.register_buffer("queries", cross.attention.queries(normed, cross.latents))
        kept = normed if cross.normalised_residual else latents
        self.register_buffer("residual", kept + cross.attention.output.bias)

    def forward(self, attention: Projected | Merged, prepared: Tensor | tuple[Tensor, Tensor]) -> Tensor:
        """Keys and values of the tokens -> latents, [R, C]."""
        found = attention.output.without_bias(attention(self.queries, prepared))
        return (found.view(-1, *self.residual.shape) + self.residual).flatten(0, 1)


class FoldedBlock(nn.Module):
    """Pre-norm Transformer block."""

    def __init__(self, block: Block, config: ModelConfig) -> None:
        super().__init__()
        self.latents = config.num_latents
        self.attention_norm = block.attention_norm
        uses = Uses(config.num_latents, config.num_latents, dynamic=1)
        self.attention = fold_attention(self_weights(block.attention), uses)
        self.ffn_norm = block.ffn_norm
        self.ffn = FeedForward(block.ffn)

    def attend(self, rows: Tensor) -> Tensor:
        """[R, C] -> [R, C], before the feed-forward layer."""
        normed = self.attention_norm(rows)
        prepared = self.attention.prepare(normed, self.latents)
        found = self.attention(self.attention.queries(normed, self.latents), prepared)
        result: Tensor = self.attention.output(found) + rows
        return result

    def feed_forward(self, rows: Tensor) -> Tensor:
        """[R, C] -> [R, C]."""
        result: Tensor = self.ffn(self.ffn_norm(rows)) + rows
        return result

    def mean(self, rows: Tensor) -> Tensor:
        """Mean over the latents of `feed_forward`: [R, C] -> [B, C]."""
        return self.ffn.mean(self.ffn_norm(rows), self.latents) + mean_rows(rows, self.latents)


class FoldedTransformer(nn.ModuleList):
    """The blocks of one iteration."""

    def __init__(self, transformer: Transformer, config: ModelConfig) -> None:
        super().__init__(FoldedBlock(pick(transformer, i, Block), config) for i in range(len(transformer)))

    def blocks(self) -> list[FoldedBlock]:
        """The blocks in order."""
        return [pick(self, index, FoldedBlock) for index in range(len(self))]


def fold_head(model: Perceiver, temperature: float) -> Dense | FeedForward:
    """The head on the mean of latents that are normed, if they are, without scale and shift; over the temperature."""
    head = copy.deepcopy(model.head)
    first = head.hidden if isinstance(head, TrainedFeedForward) else next(head.children())
    assert isinstance(first, nn.Linear)
    if isinstance(model.head_norm, nn.LayerNorm):
        first.bias.copy_(first.bias + first.weight @ model.head_norm.bias)
        first.weight.copy_(first.weight * model.head_norm.weight)
    return FeedForward(head, 1 / temperature) if isinstance(head, TrainedFeedForward) else dense(first, 1 / temperature)


class FoldedPerceiver(nn.Module):
    """The serving form; the same function as the `TrainingForm` it is made of."""

    def __init__(self, form: TrainingForm) -> None:
        super().__init__()
        model, config = form.model, form.model.config
        self.latents, self.num_tokens, self.norm_head = config.num_latents, config.num_tokens, config.head_norm
        self.cross_of = [model.cross_attention_of(i) for i in range(config.num_iterations)]
        self.transformer_of = [model.transformer_of(i) for i in range(config.num_iterations)]
        self.tokens = Tokens(form)
        self.crosses = nn.ModuleList(
            FoldedCross(pick(model.cross_attentions, index, CrossAttention), config, self.uses(index))
            for index in range(len(model.cross_attentions))
        )
        self.first = FirstRead(self.cross(0), model.latents)
        self.transformers = nn.ModuleList(
            FoldedTransformer(pick(model.transformers, index, Transformer), config)
            for index in range(len(model.transformers))
        )
        self.head = fold_head(model, form.temperature)
        self.test_time_flip = config.test_time_flip

    def uses(self, cross: int) -> Uses:
        """How the iterations use a cross-attention's weights."""
        later = self.cross_of[1:].count(cross)
        return Uses(self.latents, self.num_tokens, dynamic=later, constant=int(cross == 0))

    def cross(self, iteration: int) -> FoldedCross:
        """The cross-attention of an iteration."""
        return pick(self.crosses, self.cross_of[iteration], FoldedCross)

    def forward(self, images: Tensor) -> Tensor:
        """uint8 [B, H, W, 3], RGB -> calibrated logits, [B, K]."""
        if not self.test_time_flip:
            return self.answer(images)
        # Side by side: halves of a batch could not be told apart in a graph whose batch may be of any size.
        views = torch.stack([images, images.flip(2)], dim=1).flatten(0, 1)
        return mean_rows(self.answer(views), 2)

    def answer(self, images: Tensor) -> Tensor:
        """The logits of the pictures as they are; shapes as `forward`'s."""
        tokens: Tensor = self.tokens(images)
        prepared = [
            pick(self.crosses, index, FoldedCross).attention.prepare(tokens, self.num_tokens)
            for index in range(len(self.crosses))
        ]
        last: FoldedCross | FoldedBlock = self.cross(0)
        rows: Tensor = self.first(self.cross(0).attention, prepared[0])
        for iteration, index in enumerate(self.cross_of):
            if iteration > 0:
                rows = self.cross(iteration).attend(last.feed_forward(rows), prepared[index])
                last = self.cross(iteration)
            for block in pick(self.transformers, self.transformer_of[iteration], FoldedTransformer).blocks():
                rows = block.attend(last.feed_forward(rows))
                last = block
        logits: Tensor = self.head(self.pool(last, rows))
        return logits

    def pool(self, last: FoldedCross | FoldedBlock, rows: Tensor) -> Tensor:
        """The last feed-forward layer, the norm if there is one, and the mean over the latents: [R, C] -> [B, C]."""
        if not self.norm_head:
            return last.mean(rows)
        latents = last.feed_forward(rows)
        return mean_rows(F.layer_norm(latents, latents.shape[-1:], eps=NORM_EPSILON), self.latents)


@torch.no_grad()
def fold(form: TrainingForm) -> FoldedPerceiver:
    """Make the serving form of a training form, in its type; everything is multiplied out in float64.

    Args:
        form: of any configuration; it is left as it is.
    """
    dtype = form.model.latents.dtype
    return FoldedPerceiver(copy.deepcopy(form).double()).to(dtype).eval()
