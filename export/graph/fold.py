"""The folded form: the trained function with all constants at inference multiplied out at export.

The algebra is exact; only rounding differs. Each attention is merged where that lowers the number of operations.

- Cross-attention keys. A row of scores, (Wq l + bq) . (Wk x + bk), differs from (A l + a) . x with A = Wk^T Wq and
  a = Wk^T bq by a term that is the same for every token, and softmax ignores that: tokens are their own keys.
- Values. A row of attention weights sums to one, so sum_j p_j (Wv x_j + bv) = Wv (sum_j p_j x_j) + bv: project last.
- Self-attention likewise: each head's Wq and Wk become one matrix, its Wv and Wo another.
- The first iteration's latents are constant, so its queries and its residual are.
- Keys, values and layer norm of the tokens are computed once for all iterations. The scale and shift of that norm go
  into the next matrices.
- Everything from pixels to tokens is affine in the image: one convolution, and a constant for each token.
- The mean over the latents commutes with the output projection of the last feed-forward layer, and that over an image
  and its mirror image with a head of one layer.

Shape letters as in `export.graph.attention`; also H and W the input size in pixels, K classes.
"""

import copy
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from export.graph.attention import (
    AttentionWeights,
    Dense,
    MergedAttention,
    ProjectedAttention,
    Workload,
    cheaper_attention,
)
from export.graph.patch_embedding import PatchEmbedding
from export.graph.trained import TrainedModel
from training.config import ModelConfig
from training.model import Block, CrossAttention, FeedForward, Perceiver, SelfAttention, Transformer

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def bias_of(layer: nn.Linear) -> Tensor:
    """Return a layer's bias, zeros where it has none."""
    return layer.weight.new_zeros(layer.out_features) if layer.bias is None else layer.bias


def dense(layer: nn.Linear, factor: float = 1.0) -> Dense:
    """Return a trained layer, scaled by a factor."""
    return Dense(layer.weight.T * factor, bias_of(layer) * factor)


def items(modules: nn.ModuleList, kind: type[ModuleT]) -> list[ModuleT]:
    """Return the modules of a list, all of one type."""
    found = [module for module in modules if isinstance(module, kind)]
    assert len(found) == len(modules)
    return found


def mean_rows(rows: Tensor, count: int) -> Tensor:
    """Map [R, C], `count` rows an image, to their mean, [B, C]."""
    return rows.view(-1, count, rows.shape[1]).mean(1)


class FoldedFeedForward(nn.Module):
    """Dense, exact GELU, dense."""

    def __init__(self, ffn: FeedForward, factor: float = 1.0) -> None:
        super().__init__()
        self.hidden = dense(ffn.hidden)
        self.output = dense(ffn.output, factor)

    def forward(self, rows: Tensor) -> Tensor:
        """Map [R, C] to [R, out]."""
        result: Tensor = self.output(F.gelu(self.hidden(rows)))
        return result

    def mean(self, rows: Tensor, count: int) -> Tensor:
        """Map [R, C], `count` rows an image, to the mean of `forward`, [B, out]; the output projects only the mean."""
        result: Tensor = self.output(mean_rows(F.gelu(self.hidden(rows)), count))
        return result


def weight_per_head(layer: nn.Linear, heads: int) -> Tensor:
    """Return a layer's weight as [P, in, S]."""
    return layer.weight.reshape(heads, -1, layer.in_features).transpose(1, 2)


def cross_attention_weights(cross: CrossAttention) -> AttentionWeights:
    """Return the weights of a cross-attention over tokens that are normed without scale and shift."""
    scale, shift = cross.token_norm.weight[:, None], cross.token_norm.bias
    output_bias = cross.value.weight @ shift + bias_of(cross.value)
    output: Tensor | None = None
    if isinstance(cross.output, nn.Linear):
        output = cross.output.weight.T.reshape(cross.heads, -1, cross.output.out_features)
        output_bias = cross.output.weight @ output_bias + bias_of(cross.output)
    return AttentionWeights(
        query=weight_per_head(cross.query, cross.heads) * cross.scale,
        query_bias=bias_of(cross.query).view(cross.heads, -1) * cross.scale,
        key=weight_per_head(cross.key, cross.heads) * scale,
        value=weight_per_head(cross.value, cross.heads) * scale,
        output=output,
        output_bias=output_bias,
        position_bias=cross.position_bias,
    )


def self_attention_weights(attention: SelfAttention) -> AttentionWeights:
    """Return the weights of a block's attention over its normed latents."""
    heads, scale, output = attention.heads, attention.head_dim**-0.5, attention.output.weight
    return AttentionWeights(
        query=weight_per_head(attention.query, heads) * scale,
        query_bias=bias_of(attention.query).view(heads, -1) * scale,
        key=weight_per_head(attention.key, heads),
        value=weight_per_head(attention.value, heads),
        output=output.T.reshape(heads, -1, len(output)),
        output_bias=output @ bias_of(attention.value) + bias_of(attention.output),
    )


class FoldedCrossAttention(nn.Module):
    """Latents attend to the tokens, then a feed-forward layer.

    Args:
        cross: the trained module.
        config: of the model.
        work: how often these weights run.
    """

    def __init__(self, cross: CrossAttention, config: ModelConfig, work: Workload) -> None:
        super().__init__()
        self.latents = config.num_latents
        self.normalised_residual = cross.normalised_residual
        self.latent_norm = cross.latent_norm
        self.attention = cheaper_attention(cross_attention_weights(cross), work)
        self.ffn_norm = cross.ffn_norm
        self.ffn = FoldedFeedForward(cross.ffn)

    def attend(self, latents: Tensor, keys_values: Tensor | tuple[Tensor, Tensor]) -> Tensor:
        """Map [R, C] to [R, C], before the feed-forward layer."""
        normed = self.latent_norm(latents)
        heads = self.attention(self.attention.queries(normed, self.latents), keys_values)
        result: Tensor = self.attention.output(heads) + (normed if self.normalised_residual else latents)
        return result

    def feed_forward(self, rows: Tensor) -> Tensor:
        """Map [R, C] to [R, C]."""
        normed = self.ffn_norm(rows)
        result: Tensor = self.ffn(normed) + (normed if self.normalised_residual else rows)
        return result

    def mean(self, rows: Tensor) -> Tensor:
        """Map [R, C] to the mean of `feed_forward` over the latents, [B, C]."""
        normed = self.ffn_norm(rows)
        residual = normed if self.normalised_residual else rows
        return self.ffn.mean(normed, self.latents) + mean_rows(residual, self.latents)


class FirstCrossAttention(nn.Module):
    """The first iteration's attention: its latents are constant, and so are its queries and its residual."""

    queries: Tensor
    residual: Tensor

    def __init__(self, cross: FoldedCrossAttention, latents: Tensor) -> None:
        super().__init__()
        normed = cross.latent_norm(latents)
        self.register_buffer("queries", cross.attention.queries(normed, cross.latents))
        residual = normed if cross.normalised_residual else latents
        self.register_buffer("residual", residual + cross.attention.output.bias)

    def forward(
        self, attention: ProjectedAttention | MergedAttention, keys_values: Tensor | tuple[Tensor, Tensor]
    ) -> Tensor:
        """Attend to the tokens; returns latents, [R, C]."""
        heads = attention.output.without_bias(attention(self.queries, keys_values))
        return (heads.view(-1, *self.residual.shape) + self.residual).flatten(0, 1)


class FoldedBlock(nn.Module):
    """Pre-norm Transformer block."""

    def __init__(self, block: Block, config: ModelConfig) -> None:
        super().__init__()
        self.latents = config.num_latents
        self.attention_norm = block.attention_norm
        work = Workload(config.num_latents, config.num_latents, dynamic=1)
        self.attention = cheaper_attention(self_attention_weights(block.attention), work)
        self.ffn_norm = block.ffn_norm
        self.ffn = FoldedFeedForward(block.ffn)

    def attend(self, rows: Tensor) -> Tensor:
        """Map [R, C] to [R, C], before the feed-forward layer."""
        normed = self.attention_norm(rows)
        keys_values = self.attention.keys_values(normed, self.latents)
        heads = self.attention(self.attention.queries(normed, self.latents), keys_values)
        result: Tensor = self.attention.output(heads) + rows
        return result

    def feed_forward(self, rows: Tensor) -> Tensor:
        """Map [R, C] to [R, C]."""
        result: Tensor = self.ffn(self.ffn_norm(rows)) + rows
        return result

    def mean(self, rows: Tensor) -> Tensor:
        """Map [R, C] to the mean of `feed_forward` over the latents, [B, C]."""
        return self.ffn.mean(self.ffn_norm(rows), self.latents) + mean_rows(rows, self.latents)


def fold_head(model: Perceiver, temperature: float) -> Dense | FoldedFeedForward:
    """Fold the temperature into the head."""
    if isinstance(model.head, FeedForward):
        return FoldedFeedForward(model.head, 1 / temperature)
    layer = next(model.head.children())
    assert isinstance(layer, nn.Linear)
    return dense(layer, 1 / temperature)


class FoldedPerceiver(nn.Module):
    """The same function as the `TrainedModel` it is made from, with fewer operations."""

    def __init__(self, trained: TrainedModel) -> None:
        super().__init__()
        model, config = trained.model, trained.model.config
        self.latents, self.num_tokens = config.num_latents, config.num_tokens
        self.test_time_flip = config.test_time_flip
        self.cross_of = [model.cross_attention_of(i) for i in range(config.num_iterations)]
        self.transformer_of = [model.transformer_of(i) for i in range(config.num_iterations)]
        self.patch_embedding = PatchEmbedding(trained)
        self.crosses = nn.ModuleList(
            FoldedCrossAttention(cross, config, self.workload(index))
            for index, cross in enumerate(items(model.cross_attentions, CrossAttention))
        )
        self.first = FirstCrossAttention(items(self.crosses, FoldedCrossAttention)[0], model.latents)
        self.transformers = nn.ModuleList(
            nn.ModuleList(FoldedBlock(block, config) for block in items(transformer, Block))
            for transformer in items(model.transformers, Transformer)
        )
        self.head_norm = model.head_norm
        self.head = fold_head(model, trained.temperature)

    def workload(self, cross: int) -> Workload:
        """Count the runs of a cross-attention over all iterations."""
        later = self.cross_of[1:].count(cross)
        return Workload(self.latents, self.num_tokens, dynamic=later, constant=int(cross == 0))

    def forward(self, images: Tensor) -> Tensor:
        """Map uint8 [B, H, W, 3], RGB, to calibrated logits, [B, K]."""
        return self.with_features(images)[0]

    def with_features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Map images as `forward` to logits, [B, K], and features, [B, C]."""
        if not self.test_time_flip:
            features = self.features(images)
            return self.head(features), features
        # Image and mirror image are neighbours: a graph with a dynamic batch can't split a batch into halves.
        views = self.features(torch.stack([images, images.flip(2)], dim=1).flatten(0, 1))
        features = mean_rows(views, 2)
        if isinstance(self.head, Dense):  # the mean commutes with it
            return self.head(features), features
        return mean_rows(self.head(views), 2), features

    def features(self, images: Tensor) -> Tensor:
        """Map images to features without the mirror image, [B, C]."""
        tokens: Tensor = self.patch_embedding(images)
        crosses = items(self.crosses, FoldedCrossAttention)
        transformers = items(self.transformers, nn.ModuleList)
        keys_values = [cross.attention.keys_values(tokens, self.num_tokens) for cross in crosses]
        last: FoldedCrossAttention | FoldedBlock = crosses[0]
        rows: Tensor = self.first(last.attention, keys_values[0])
        for iteration, (cross, transformer) in enumerate(zip(self.cross_of, self.transformer_of, strict=True)):
            if iteration > 0:
                rows = crosses[cross].attend(last.feed_forward(rows), keys_values[cross])
                last = crosses[cross]
            for block in items(transformers[transformer], FoldedBlock):
                rows = block.attend(last.feed_forward(rows))
                last = block
        return self.pool(last, rows)

    def pool(self, last: FoldedCrossAttention | FoldedBlock, rows: Tensor) -> Tensor:
        """Apply the last feed-forward layer, the head norm if any, and the mean over latents: [R, C] -> [B, C]."""
        if isinstance(self.head_norm, nn.Identity):
            return last.mean(rows)
        return mean_rows(self.head_norm(last.feed_forward(rows)), self.latents)


@torch.no_grad()
def fold(trained: TrainedModel) -> FoldedPerceiver:
    """Build the folded form of a model, in its dtype; all products are computed in float64.

    Args:
        trained: of any configuration; it is not changed.

    Raises:
        Exception: of any type, if the model has parts that this algebra does not know.
    """
    dtype = trained.model.latents.dtype
    return FoldedPerceiver(copy.deepcopy(trained).double()).to(dtype).eval()
