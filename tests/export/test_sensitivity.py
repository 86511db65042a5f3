"""The choice of products: the prediction of flips, and the order."""

import math

import numpy as np
import pytest
from onnx import ModelProto

from export.golden import spread
from export.quantization import sensitivity
from export.quantization.int8 import find_products, quantise
from export.quantization.sensitivity import (
    candidates,
    choose,
    leads,
    logits_of,
    measure_noise,
    predicted_flips,
    quantise_all,
)
from tests.export.test_int8 import model, noise  # noqa: F401


def test_the_lead_is_that_of_the_first_class_over_the_second() -> None:
    assert leads(np.array([[1, 4, 2], [5, 0, 5]], dtype=np.float32)).tolist() == [2, 0]


def test_flips_are_predicted_as_they_happen() -> None:
    rng = np.random.default_rng(0)
    lead = rng.exponential(1.0, 20_000)
    logits = np.stack([lead, np.zeros_like(lead)], axis=1)
    flipped = (logits + rng.normal(0, 0.1, logits.shape)).argmax(axis=1) == 1
    assert predicted_flips(lead, 0.01) == pytest.approx(flipped.mean(), rel=0.1)
    assert predicted_flips(lead, 0) == 0
    assert predicted_flips(np.zeros(3), 1) == pytest.approx(0.5)


def test_products_are_taken_by_noise_for_each_operation_until_labels_flip() -> None:
    lead = np.full(10, 1.0)
    sizes = {"large": 100, "small": 1, "loud": 100}
    noise_of = {"large": 0.02, "small": 0.01, "loud": 10.0}
    assert choose(noise_of, sizes, lead, target=0.01) == ["large", "small"]
    assert choose(noise_of, sizes, lead, target=math.erfc(0.5 / math.sqrt(0.02)) / 2 + 1e-9) == ["large"]
    assert choose(noise_of, sizes, lead, target=0.0) == []
    assert choose(noise_of, sizes, lead, target=0.5) == ["large", "small", "loud"]


def test_pictures_are_spread_evenly() -> None:
    images = noise(10)
    assert np.array_equal(spread(images, 4), images[[0, 3, 6, 9]])
    assert np.array_equal(spread(images, 20), images)


def test_noise_of_products_adds_up(model: ModelProto) -> None:  # noqa: F811
    images = noise(64)
    quantised = quantise_all(model, images)
    each = measure_noise(model, quantised, images)
    together = np.square(logits_of(quantise(model, quantised), images) - logits_of(model, images)).mean()
    assert set(each) == set(quantised)
    assert sum(each.values()) == pytest.approx(together, rel=0.5)


def test_candidates_have_fewer_and_fewer_products_on_integers(
    model: ModelProto,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    images = noise(40)
    monkeypatch.setattr(sensitivity, "CALIBRATION_PICTURES", 10)
    calibration = spread(images, 10)
    quantised = quantise_all(model, calibration)
    noise_of = measure_noise(model, quantised, calibration)
    sizes = {product.name: product.weight.size for product in find_products(model)}
    order = sorted(noise_of, key=lambda name: noise_of[name] / sizes[name])
    lead = np.full(5, math.sqrt(sum(noise_of.values())))

    def target_of(count: int) -> float:
        """What lets so many products pass, and not one more."""
        return predicted_flips(lead, sum(noise_of[name] for name in order[:count])) * (1 + 1e-9)

    # Twice the same, which is tried once; and none, which is model.onnx again.
    half = len(order) // 2
    monkeypatch.setattr(sensitivity, "TARGETS", (0.5, target_of(half), target_of(half) * (1 + 1e-9), target_of(1), 0.0))
    found = list(candidates(model, images, lead))
    assert [words for words, _ in found] == [
        f"{count} of {len(order)} products with constant weights on integers" for count in (len(order), half, 1)
    ]
    for (_, graph), count in zip(found, (len(order), half, 1), strict=True):
        integers = {node.output[0] for node in graph.graph.node if node.op_type == "MatMulIntegerToFloat"}
        assert integers == set(order[:count])
        expected = quantise(model, {name: quantised[name] for name in order[:count]})
        np.testing.assert_array_equal(logits_of(graph, images), logits_of(expected, images))
