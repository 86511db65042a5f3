"""The published Perceiver example once more, in NumPy and float64, written from its description and from no other code.

It is slow and literal on purpose: one image feature after the other as the text names them, no batching tricks, no
framework. Shape letters: B images, P pixels a side, M tokens, N latents, C channels, H heads, D channels of a head.

Parameters are a flat dictionary. Dense layers are ``<name>.kernel`` [in, out] and ``<name>.bias`` [out]; layer norms
are ``<name>.scale`` and ``<name>.offset`` [C]. Columns of the heads' kernels stand head by head: (H, D) flattened.

    input.mean, input.variance                   [3], on the scale 0..255
    patch, position [M, C], latents [N, C]
    cross.latent_norm, cross.token_norm, cross.query, cross.key, cross.value, cross.scale [],
    cross.norm, cross.ffn.hidden, cross.ffn.output
    block<i>.attention_norm, .query, .key, .value, .attention_output, .ffn_norm, .ffn.hidden, .ffn.output
    head.hidden, head.output
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Params = Mapping[str, Array]

EPSILON = 1e-6
_erf = np.vectorize(math.erf, otypes=[np.float64])


@dataclass(frozen=True)
class Shape:
    """What the parameters' own shapes do not tell."""

    image_size: int = 64
    patch_size: int = 2
    num_heads: int = 8
    num_blocks: int = 4
    num_iterations: int = 2


def dense(params: Params, name: str, x: Array) -> Array:
    return x @ params[f"{name}.kernel"] + params[f"{name}.bias"]


def layer_norm(params: Params, name: str, x: Array) -> Array:
    centred = x - x.mean(axis=-1, keepdims=True)
    variance = (centred**2).mean(axis=-1, keepdims=True)
    return centred / np.sqrt(variance + EPSILON) * params[f"{name}.scale"] + params[f"{name}.offset"]


def gelu(x: Array) -> Array:
    return 0.5 * x * (1.0 + _erf(x / math.sqrt(2.0)))


def softmax(scores: Array) -> Array:
    exponentials = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return exponentials / exponentials.sum(axis=-1, keepdims=True)


def normalise(params: Params, images: NDArray[np.uint8]) -> Array:
    """uint8 [B, P, P, 3] -> float64 [B, P, P, 3] of mean 0 and variance 1 a channel."""
    return (images.astype(np.float64) - params["input.mean"]) / np.sqrt(params["input.variance"])


def _interpolation(size: int, target: int) -> Array:
    """[target, size]: row i holds the weights of the old pixels in the new pixel i, centres at half pixels."""
    weights = np.zeros((target, size))
    for i in range(target):
        centre = (i + 0.5) * size / target - 0.5
        below = math.floor(centre)
        share = centre - below
        # Beyond the edge the edge pixel goes on.
        weights[i, min(max(below, 0), size - 1)] += 1.0 - share
        weights[i, min(max(below + 1, 0), size - 1)] += share
    return weights


def resize(pixels: Array, target: int) -> Array:
    """Bilinear [B, P, P, 3] -> [B, target, target, 3]."""
    rows = _interpolation(pixels.shape[1], target)
    columns = _interpolation(pixels.shape[2], target)
    return np.einsum("ip,bpqc,jq->bijc", rows, pixels, columns, optimize=True)


def patches(pixels: Array, size: int) -> Array:
    """[B, P, P, 3] -> [B, M, size * size * 3], patches row by row, each flattened as (row, column, channel)."""
    per_side = pixels.shape[1] // size
    cut = [
        pixels[:, size * row : size * (row + 1), size * column : size * (column + 1), :].reshape(len(pixels), -1)
        for row in range(per_side)
        for column in range(per_side)
    ]
    return np.stack(cut, axis=1)


def tokens(params: Params, shape: Shape, images: NDArray[np.uint8]) -> Array:
    """uint8 [B, P, P, 3] -> [B, M, C]."""
    pixels = resize(normalise(params, images), shape.image_size)
    return dense(params, "patch", patches(pixels, shape.patch_size)) + params["position"]


def feed_forward(params: Params, name: str, x: Array) -> Array:
    return dense(params, f"{name}.output", gelu(dense(params, f"{name}.hidden", x)))


def cross_attention(params: Params, latents: Array, inputs: Array) -> Array:
    """[B, N, C] and [B, M, C] -> [B, N, C]."""
    normed_latents = layer_norm(params, "cross.latent_norm", latents)
    normed_inputs = layer_norm(params, "cross.token_norm", inputs)
    query = dense(params, "cross.query", normed_latents)
    key = dense(params, "cross.key", normed_inputs)
    value = dense(params, "cross.value", normed_inputs)
    weights = softmax(params["cross.scale"] * (query @ key.swapaxes(1, 2)))
    summed = layer_norm(params, "cross.norm", weights @ value + normed_latents)
    return feed_forward(params, "cross.ffn", summed) + summed


def self_attention(params: Params, name: str, x: Array, num_heads: int) -> Array:
    """[B, N, C] -> [B, N, C]."""
    query, key, value = (dense(params, f"{name}.{part}", x) for part in ("query", "key", "value"))
    head_dim = query.shape[-1] // num_heads
    outputs = []
    for head in range(num_heads):
        channels = slice(head * head_dim, (head + 1) * head_dim)
        scores = query[..., channels] @ key[..., channels].swapaxes(1, 2) / math.sqrt(head_dim)
        outputs.append(softmax(scores) @ value[..., channels])
    return dense(params, f"{name}.attention_output", np.concatenate(outputs, axis=-1))


def block(params: Params, name: str, x: Array, num_heads: int) -> Array:
    """[B, N, C] -> [B, N, C], layer norms before."""
    x = x + self_attention(params, name, layer_norm(params, f"{name}.attention_norm", x), num_heads)
    return x + feed_forward(params, f"{name}.ffn", layer_norm(params, f"{name}.ffn_norm", x))


def head(params: Params, latents: Array) -> Array:
    """[B, N, C] -> logits [B, K]."""
    return dense(params, "head.output", gelu(dense(params, "head.hidden", latents.mean(axis=1))))


def forward(params: Params, images: NDArray[np.uint8], shape: Shape) -> Array:
    """uint8 [B, P, P, 3] -> logits float64 [B, K], without dropout."""
    inputs = tokens(params, shape, images)
    latents = np.broadcast_to(params["latents"], (len(images), *params["latents"].shape))
    for _ in range(shape.num_iterations):
        latents = cross_attention(params, latents, inputs)
        for index in range(shape.num_blocks):
            latents = block(params, f"block{index}", latents, shape.num_heads)
    return head(params, latents)


# Where the torch model's parameters stand here; ``{i}`` counts the blocks. A torch dense layer keeps its kernel turned.
DENSE_NAMES = {
    "tokens.patch_projection": "patch",
    "cross_attentions.0.query": "cross.query",
    "cross_attentions.0.key": "cross.key",
    "cross_attentions.0.value": "cross.value",
    "cross_attentions.0.ffn.hidden": "cross.ffn.hidden",
    "cross_attentions.0.ffn.output": "cross.ffn.output",
    "transformers.0.{i}.attention.query": "block{i}.query",
    "transformers.0.{i}.attention.key": "block{i}.key",
    "transformers.0.{i}.attention.value": "block{i}.value",
    "transformers.0.{i}.attention.output": "block{i}.attention_output",
    "transformers.0.{i}.ffn.hidden": "block{i}.ffn.hidden",
    "transformers.0.{i}.ffn.output": "block{i}.ffn.output",
    "head.hidden": "head.hidden",
    "head.output": "head.output",
}
NORM_NAMES = {
    "cross_attentions.0.latent_norm": "cross.latent_norm",
    "cross_attentions.0.token_norm": "cross.token_norm",
    "cross_attentions.0.ffn_norm": "cross.norm",
    "transformers.0.{i}.attention_norm": "block{i}.attention_norm",
    "transformers.0.{i}.ffn_norm": "block{i}.ffn_norm",
}
OTHER_NAMES = {
    "tokens.position_embedding": "position",
    "latents": "latents",
    "cross_attentions.0.scale": "cross.scale",
    "preprocess.mean": "input.mean",
    "preprocess.variance": "input.variance",
}


def from_torch(state: Mapping[str, Array], num_blocks: int) -> dict[str, Array]:
    """Rename and turn the torch model's parameters; raises KeyError unless each is used, exactly once.

    state: the model's state_dict and, under ``preprocess.``, the preprocessing's, as float64 arrays.
    """
    left = dict(state)
    params = {new: left.pop(old) for old, new in OTHER_NAMES.items()}
    for i in range(num_blocks):
        for old, new in DENSE_NAMES.items():
            if i == 0 or "{i}" in old:
                params[f"{new.format(i=i)}.kernel"] = left.pop(f"{old.format(i=i)}.weight").T
                params[f"{new.format(i=i)}.bias"] = left.pop(f"{old.format(i=i)}.bias")
        for old, new in NORM_NAMES.items():
            if i == 0 or "{i}" in old:
                params[f"{new.format(i=i)}.scale"] = left.pop(f"{old.format(i=i)}.weight")
                params[f"{new.format(i=i)}.offset"] = left.pop(f"{old.format(i=i)}.bias")
    if left:
        raise KeyError(f"no counterpart for {sorted(left)}")
    return params
