"""The choice of products: the prediction of flips, and the order."""

import math

import numpy as np
import pytest
from onnx import ModelProto

from export.golden import spread
from export.int8 import quantise
from export.search import choose, leads, logits_of, measure_noise, predicted_flips, quantise_all
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
