"""Which products go to int8: as many operations as the labels allow, the least noise for each operation first.

The noise of several products is the sum of theirs, up to a percent, so they are measured one by one on training
pictures and taken in order. How much noise is too much follows from how close the float32 model's decisions are on
pictures it has not seen: a label flips where noise is larger than the lead of the first class over the second. (To
count flipped labels on training pictures is no use: there the leads are larger, and five times fewer labels flip.)
"""

import math
from collections.abc import Iterator, Mapping

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto

from export.golden import spread
from export.quantization.int8 import (
    Floats,
    Images,
    Quantised,
    collect_inputs,
    find_products,
    open_session,
    quantise,
    quantise_product,
)
from service.engine.metadata import INPUT_NAME

CALIBRATION_PICTURES = 256
BATCH = 64
# Shares of labels that may flip by the prediction, tried in turn until the gate passes. A picture that the model finds
# hard also gets more noise than others, so about twice as many flip as predicted.
TARGETS = (0.0035, 0.0025, 0.0018)


def logits_of(model: ModelProto, images: Images) -> Floats:
    """Run uint8 [N, H, W, 3] in batches; float32 [N, C]."""
    session = open_session(model)
    batches = [images[at : at + BATCH] for at in range(0, len(images), BATCH)]
    return np.concatenate([session.run(None, {INPUT_NAME: batch})[0] for batch in batches])


def quantise_all(model: ModelProto, images: Images) -> dict[str, Quantised]:
    """Quantise every product by calibration pictures, by name."""
    products = find_products(model)
    rows = collect_inputs(model, products, images)
    return {product.name: quantise_product(product, rows[product.source]) for product in products}


def measure_noise(model: ModelProto, quantised: Mapping[str, Quantised], images: Images) -> dict[str, float]:
    """Mean square difference of the logits when each product alone is quantised, by name."""
    expected = logits_of(model, images)
    return {
        name: float(np.square(logits_of(quantise(model, {name: values}), images) - expected).mean())
        for name, values in quantised.items()
    }


def leads(logits: Floats) -> NDArray[np.float64]:
    """By how much the first class leads the second: float32 [N, C] -> float64 [N]."""
    two = np.sort(logits, axis=1)[:, -2:].astype(np.float64)
    result: NDArray[np.float64] = two[:, 1] - two[:, 0]
    return result


def predicted_flips(lead: NDArray[np.float64], noise: float) -> float:
    """Share of labels that flip when every logit gets Gaussian noise of this mean square.

    The difference of two logits then has twice the variance.
    """
    if noise == 0:
        return 0.0
    return float(np.mean([math.erfc(value / (2 * math.sqrt(noise))) / 2 for value in lead]))


def choose(noise: Mapping[str, float], sizes: Mapping[str, int], lead: NDArray[np.float64], target: float) -> list[str]:
    """Take products by noise for each multiply-add, the least first, while no more labels flip than `target`.

    Args:
        noise: of each product alone.
        sizes: multiply-adds of each product for one row of its input.
        lead: see `leads`; of pictures that were not trained on.
        target: share of the labels, 0..1.
    """
    chosen: list[str] = []
    total = 0.0
    for name in sorted(noise, key=lambda name: noise[name] / sizes[name]):
        total += noise[name]
        if predicted_flips(lead, total) > target:
            break
        chosen.append(name)
    return chosen


def candidates(model: ModelProto, training: Images, lead: NDArray[np.float64]) -> Iterator[tuple[str, ModelProto]]:
    """Yield graphs with fewer and fewer products on integers, each with what it is in words.

    Args:
        model: the float32 graph.
        training: training pictures, uint8 [N, H, W, 3].
        lead: see `leads`; of pictures that were not trained on.
    """
    pictures = spread(training, CALIBRATION_PICTURES)
    quantised = quantise_all(model, pictures)
    noise = measure_noise(model, quantised, pictures)
    sizes = {product.name: product.weight.size for product in find_products(model)}
    last: list[str] = []
    for target in TARGETS:
        chosen = choose(noise, sizes, lead, target)
        if chosen and chosen != last:
            words = f"{len(chosen)} of {len(sizes)} products with constant weights on integers"
            yield words, quantise(model, {name: quantised[name] for name in chosen})
        last = chosen
