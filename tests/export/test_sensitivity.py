"""The choice of layers: the prediction of flips, and the order."""

import math

import numpy as np
import pytest
from onnx import ModelProto

from export.golden import spread
from export.quantization import sensitivity
from export.quantization.int8 import find_layers, quantize_layers, replace_layers
from export.quantization.sensitivity import (
    candidates,
    choose_layers,
    margins,
    measure_noise,
    predict_flip_rate,
    run_graph,
)
from tests.export.test_int8 import model, noise  # noqa: F401


def test_the_margin_is_that_of_the_first_class_over_the_second() -> None:
    assert margins(np.array([[1, 4, 2], [5, 0, 5]], dtype=np.float32)).tolist() == [2, 0]


def test_flips_are_predicted_as_they_happen() -> None:
    rng = np.random.default_rng(0)
    margin = rng.exponential(1.0, 20_000)
    logits = np.stack([margin, np.zeros_like(margin)], axis=1)
    flipped = (logits + rng.normal(0, 0.1, logits.shape)).argmax(axis=1) == 1
    assert predict_flip_rate(margin, 0.01) == pytest.approx(flipped.mean(), rel=0.1)
    assert predict_flip_rate(margin, 0) == 0
    assert predict_flip_rate(np.zeros(3), 1) == pytest.approx(0.5)


def test_layers_are_taken_by_noise_for_each_operation_until_labels_flip() -> None:
    margin = np.full(10, 1.0)
    sizes = {"large": 100, "small": 1, "loud": 100}
    noise_of = {"large": 0.02, "small": 0.01, "loud": 10.0}
    assert choose_layers(noise_of, sizes, margin, flip_rate=0.01) == ["large", "small"]
    assert choose_layers(noise_of, sizes, margin, flip_rate=math.erfc(0.5 / math.sqrt(0.02)) / 2 + 1e-9) == ["large"]
    assert choose_layers(noise_of, sizes, margin, flip_rate=0.0) == []
    assert choose_layers(noise_of, sizes, margin, flip_rate=0.5) == ["large", "small", "loud"]


def test_images_are_spread_evenly() -> None:
    images = noise(10)
    assert np.array_equal(spread(images, 4), images[[0, 3, 6, 9]])
    assert np.array_equal(spread(images, 20), images)


def test_noise_of_layers_adds_up(model: ModelProto) -> None:  # noqa: F811
    images = noise(64)
    quantized = quantize_layers(model, images)
    each = measure_noise(model, quantized, images)
    together = np.square(run_graph(replace_layers(model, quantized), images) - run_graph(model, images)).mean()
    assert set(each) == set(quantized)
    assert sum(each.values()) == pytest.approx(together, rel=0.5)


def test_candidates_have_fewer_and_fewer_layers_on_integers(
    model: ModelProto,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    images = noise(40)
    monkeypatch.setattr(sensitivity, "CALIBRATION_IMAGES", 10)
    calibration = spread(images, 10)
    quantized = quantize_layers(model, calibration)
    noise_of = measure_noise(model, quantized, calibration)
    sizes = {layer.name: layer.weight.size for layer in find_layers(model)}
    order = sorted(noise_of, key=lambda name: noise_of[name] / sizes[name])
    margin = np.full(5, math.sqrt(sum(noise_of.values())))

    def rate_for(count: int) -> float:
        """What lets so many layers pass, and not one more."""
        return predict_flip_rate(margin, sum(noise_of[name] for name in order[:count])) * (1 + 1e-9)

    # Twice the same, which is tried once; and none, which is model.onnx again.
    half = len(order) // 2
    rates = (0.5, rate_for(half), rate_for(half) * (1 + 1e-9), rate_for(1), 0.0)
    monkeypatch.setattr(sensitivity, "FLIP_RATES", rates)
    found = list(candidates(model, images, margin))
    assert [words for words, _ in found] == [
        f"{count} of {len(order)} linear layers in int8" for count in (len(order), half, 1)
    ]
    for (_, graph), count in zip(found, (len(order), half, 1), strict=True):
        integers = {node.output[0] for node in graph.graph.node if node.op_type == "MatMulIntegerToFloat"}
        assert integers == set(order[:count])
        expected = replace_layers(model, {name: quantized[name] for name in order[:count]})
        np.testing.assert_array_equal(run_graph(graph, images), run_graph(expected, images))
