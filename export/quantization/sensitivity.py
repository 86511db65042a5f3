"""Sensitivity analysis: which layers to quantize, by the noise that each adds to the logits.

The noise of several layers is the sum of theirs, up to a percent. So each is measured alone on training images, and
they are taken in order of noise for each operation. How much noise is too much follows from the margins of the float32
model on images that it was not trained on: a label flips where the noise exceeds the margin. Counting flips on training
images would not do, since margins are larger there and five times fewer labels flip.

Shape letters: N images, H and W the input size in pixels, C classes.
"""

import math
from collections.abc import Iterator, Mapping

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto

from export.golden import spread
from export.graph.trained import Images, Logits
from export.quantization.int8 import QuantizedLayer, find_layers, open_session, quantize_layers, replace_layers
from service.engine.metadata import INPUT_NAME

CALIBRATION_IMAGES = 256
BATCH_SIZE = 64
# Predicted shares of flipped labels, tried in turn until the gate passes. Images with a small margin also get more
# noise than others, so about twice as many labels flip as predicted.
FLIP_RATES = (0.0035, 0.0025, 0.0018)


def run_graph(model: ModelProto, images: Images) -> Logits:
    """Run uint8 [N, H, W, 3] in batches; returns float32 [N, C]."""
    session = open_session(model)
    batches = [images[at : at + BATCH_SIZE] for at in range(0, len(images), BATCH_SIZE)]
    return np.concatenate([session.run(None, {INPUT_NAME: batch})[0] for batch in batches])


def measure_noise(model: ModelProto, quantized: Mapping[str, QuantizedLayer], images: Images) -> dict[str, float]:
    """Return the mean square change of the logits when one layer alone is quantized, by its name."""
    expected = run_graph(model, images)
    return {
        name: float(np.square(run_graph(replace_layers(model, {name: layer}), images) - expected).mean())
        for name, layer in quantized.items()
    }


def margins(logits: Logits) -> NDArray[np.float64]:
    """Return by how much the first class leads the second: float32 [N, C] -> float64 [N]."""
    two = np.sort(logits, axis=1)[:, -2:].astype(np.float64)
    result: NDArray[np.float64] = two[:, 1] - two[:, 0]
    return result


def predict_flip_rate(margin: NDArray[np.float64], noise: float) -> float:
    """Return the share of labels that flip when each logit gets Gaussian noise of this mean square.

    The difference of two logits has twice the variance.
    """
    if noise == 0:
        return 0.0
    return float(np.mean([math.erfc(value / (2 * math.sqrt(noise))) / 2 for value in margin]))


def choose_layers(
    noise: Mapping[str, float], sizes: Mapping[str, int], margin: NDArray[np.float64], flip_rate: float
) -> list[str]:
    """Take layers in order of noise for each multiply-add, up to a predicted share of flipped labels.

    Args:
        noise: of each layer alone, see `measure_noise`.
        sizes: multiply-adds of each layer for one row of its input.
        margin: float64 [N], of images that were not trained on.
        flip_rate: largest share of flipped labels, 0..1.
    """
    chosen: list[str] = []
    total = 0.0
    for name in sorted(noise, key=lambda name: noise[name] / sizes[name]):
        total += noise[name]
        if predict_flip_rate(margin, total) > flip_rate:
            break
        chosen.append(name)
    return chosen


def candidates(model: ModelProto, training: Images, margin: NDArray[np.float64]) -> Iterator[tuple[str, ModelProto]]:
    """Yield int8 graphs, the one with the most quantized layers first, each with a description.

    Args:
        model: the float32 graph.
        training: training images, uint8 [N, H, W, 3].
        margin: float64 [N], of images that were not trained on.
    """
    images = spread(training, CALIBRATION_IMAGES)
    quantized = quantize_layers(model, images)
    noise = measure_noise(model, quantized, images)
    sizes = {layer.name: layer.weight.size for layer in find_layers(model)}
    previous: list[str] = []
    for flip_rate in FLIP_RATES:
        chosen = choose_layers(noise, sizes, margin, flip_rate)
        if chosen and chosen != previous:
            description = f"{len(chosen)} of {len(sizes)} linear layers in int8"
            yield description, replace_layers(model, {name: quantized[name] for name in chosen})
        previous = chosen
