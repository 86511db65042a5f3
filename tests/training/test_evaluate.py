"""Figures on cases worked by hand; the temperature on logits whose scale is known."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from tests.training.tiny import MODEL, make_split
from training.config import ModelConfig
from training.evaluate import (
    ConfusedPair,
    calibration_bins,
    fit_temperature,
    measure,
    measure_confidence,
    measure_superclasses,
    most_confused,
    predict_logits,
    top_label_loss,
)
from training.model import Perceiver
from training.preprocessing import Preprocess


def logits_of(*probabilities: list[float]) -> Tensor:
    return torch.tensor(probabilities).log()


def test_top1_and_top5_by_hand() -> None:
    # Class 0 most likely, then 1 and so on: the label's rank is the label.
    logits = torch.arange(7.0, 0.0, -1).expand(5, 7)
    metrics = measure(logits, torch.tensor([0, 1, 4, 5, 6]), "val")
    assert (metrics.split, metrics.n) == ("val", 5)
    assert metrics.top1 == pytest.approx(1 / 5)
    assert metrics.top5 == pytest.approx(3 / 5)


@pytest.mark.parametrize("classes", [2, 4, 5])
def test_of_few_classes_all_are_among_the_first_five(classes: int) -> None:
    labels = torch.arange(20) % classes
    metrics = measure(torch.randn(20, classes), labels, "val")
    assert metrics.top5 == 1
    assert 0 <= metrics.top1 <= 1


def test_loss_by_hand() -> None:
    metrics = measure(logits_of([0.5, 0.25, 0.25], [0.1, 0.1, 0.8]), torch.tensor([1, 2]), "val")
    assert metrics.loss == pytest.approx((-math.log(0.25) - math.log(0.8)) / 2, rel=1e-6)


def test_calibration_error_by_hand() -> None:
    # Four images with confidence 0.9, of which three are right: too confident. One with 0.5, right: too little.
    logits = logits_of(*[[0.9, 0.05, 0.05]] * 4, [0.25, 0.5, 0.25])
    labels = torch.tensor([0, 0, 0, 1, 1])
    assert measure(logits, labels, "val").ece == pytest.approx(4 / 5 * 0.15 + 1 / 5 * 0.5, rel=1e-6)
    bins = calibration_bins(logits, labels)
    assert bins.shape == (15, 3)
    torch.testing.assert_close(bins[13], torch.tensor([0.8, 0.9, 0.75], dtype=torch.float64))
    torch.testing.assert_close(bins[7], torch.tensor([0.2, 0.5, 1.0], dtype=torch.float64))
    assert not bins[[i for i in range(15) if i not in (7, 13)]].any()


def test_confidences_at_both_ends_have_a_bin() -> None:
    bins = calibration_bins(torch.tensor([[1000.0, 0.0], [0.0, 0.0]]), torch.tensor([0, 0]))
    assert bins[14].tolist() == [0.5, 1.0, 1.0]
    assert bins[7].tolist() == [0.5, 0.5, 1.0]


def sampled(scale: float) -> tuple[Tensor, Tensor]:
    """Logits ``scale`` times too large for the frequencies of their labels."""
    generator = torch.Generator().manual_seed(0)
    true = 2 * torch.randn(20_000, 10, generator=generator)
    labels = torch.multinomial(true.softmax(-1), 1, generator=generator)[:, 0]
    return scale * true, labels


@pytest.mark.parametrize("scale", [0.4, 1.0, 2.5])
def test_temperature_recovers_a_known_scale(scale: float) -> None:
    logits, labels = sampled(scale)
    temperature = fit_temperature(logits, labels)
    assert temperature == pytest.approx(scale, rel=0.03)
    at = [top_label_loss(logits / t, labels) for t in (temperature, 1.01 * temperature, temperature / 1.01)]
    assert at[0] < min(at[1], at[2])
    assert measure(logits / temperature, labels, "val").ece < 0.02


def test_the_loss_of_the_first_answer_by_hand() -> None:
    logits = logits_of([0.6, 0.3, 0.1], [0.2, 0.5, 0.3]).double()
    expected = -(math.log(0.6) + math.log(1 - 0.5)) / 2
    assert top_label_loss(logits, torch.tensor([0, 2])) == pytest.approx(expected, rel=1e-6)
    # Of a wrong answer it doesn't matter what else was thought likely, and one that is sure to the last bit costs most.
    assert top_label_loss(logits[1:], torch.tensor([0])) == top_label_loss(logits[1:], torch.tensor([2]))
    assert top_label_loss(torch.tensor([[0.0, 1e4]], dtype=torch.float64), torch.tensor([0])) == pytest.approx(1e4)


def test_the_temperature_leaves_a_first_answer_alone_whose_probability_is_right() -> None:
    true, labels = sampled(1.0)
    p, first = true.softmax(-1).max(-1, keepdim=True)
    # The rest is spread over the other classes, as label smoothing teaches: likelier logits would be sharper.
    spread = ((1 - p) / 9).expand(-1, 10).scatter(1, first, p).log()
    sure = p[:, 0] > 0.2  # where it stays the first answer
    logits, labels = spread[sure], labels[sure]
    assert fit_temperature(logits, labels) == pytest.approx(1.0, abs=0.03)


@pytest.mark.parametrize("right", [True, False])
def test_a_temperature_has_bounds(right: bool) -> None:
    logits = torch.eye(3).repeat(1000, 1)
    labels = logits.argmax(1) if right else (logits.argmax(1) + 1) % 3
    assert fit_temperature(logits, labels, largest=4) == pytest.approx(1 / 4 if right else 4, rel=0.05)


def test_few_images_move_the_temperature_little() -> None:
    logits = torch.tensor([[3.0, 0.0], [0.0, 2.0]])
    assert 0.8 < fit_temperature(logits, torch.tensor([0, 1])) < 1
    assert 1 < fit_temperature(logits, torch.tensor([1, 0])) < 3
    logits, labels = sampled(2.5)
    assert fit_temperature(logits[:15], labels[:15]) == pytest.approx(2.5, rel=0.5)


def test_logits_come_in_order_whatever_the_batch_size() -> None:
    model = Perceiver(ModelConfig.model_validate(MODEL | {"ffn_dropout": 0.5}))
    preprocess = Preprocess(8)
    split = make_split(10, 0)
    expected = model.eval()(preprocess(split.images)).detach()
    for batch_size in (1, 4, 10, 100):
        logits = predict_logits(model.train(), preprocess, split, batch_size)
        torch.testing.assert_close(logits, expected)
        assert not logits.requires_grad
        assert model.training
    assert predict_logits(model.eval(), preprocess, split, 4, torch.bfloat16).dtype == torch.float32
    assert not model.training


def test_autocast_is_used_where_asked_for() -> None:
    seen = []

    class Spy(nn.Module):
        def forward(self, pixels: Tensor) -> Tensor:
            logits = nn.functional.linear(pixels.flatten(1), torch.ones(3, 192))
            seen.append(logits.dtype)
            return logits

    for autocast in (None, torch.bfloat16):
        predict_logits(Spy(), Preprocess(8), make_split(2, 0), 2, autocast)
    assert seen == [torch.float32, torch.bfloat16]


def test_most_confused_counts_ordered_pairs() -> None:
    targets = [0, 0, 0, 0, 1, 1, 2, 2, 2]
    predictions = [0, 1, 1, 2, 0, 1, 2, 2, 2]
    assert most_confused(targets, predictions, ["ant", "bee", "cat"]) == [
        ConfusedPair("ant", "bee", 2, 0.5),
        ConfusedPair("bee", "ant", 1, 0.5),
        ConfusedPair("ant", "cat", 1, 0.25),
    ]
    assert len(most_confused(targets, predictions, ["ant", "bee", "cat"], limit=2)) == 2


def test_confusions_of_very_many_classes_take_no_memory_for_pairs_that_there_are_not() -> None:
    labels = ["ant"] * 999_998 + ["bee", "cat"]
    assert most_confused([999_998, 999_999], [999_999, 999_999], labels) == [ConfusedPair("bee", "cat", 1, 1.0)]


def test_nothing_is_confused_where_all_is_right() -> None:
    assert most_confused(torch.arange(3), torch.arange(3), ["ant", "bee", "cat"]) == []


def test_superclasses_by_hand() -> None:
    # Classes 0 and 2 are insects, 1 and 3 plants; the third superclass has no class.
    predicted = torch.tensor([0, 2, 1, 1, 0])
    logits = nn.functional.one_hot(predicted, 4).float()
    insects, plants = measure_superclasses(
        logits, torch.tensor([0, 0, 0, 1, 3]), (1, 0, 1, 0), ("plants", "insects", "fish")
    )[::-1]
    assert (insects.name, insects.n, plants.name, plants.n) == ("insects", 3, "plants", 2)
    assert insects.top1 == pytest.approx(1 / 3)
    assert insects.superclass_top1 == pytest.approx(2 / 3)
    assert (plants.top1, plants.superclass_top1) == (0.5, 0.5)
    assert insects.top5 == plants.top5 == 1


def test_superclasses_sum_up_to_the_whole() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(200, 12, generator=generator)
    labels = torch.randint(12, (200,), generator=generator)
    parts = measure_superclasses(logits, labels, [i % 3 for i in range(12)], ["a", "b", "c"])
    whole = measure(logits, labels, "val")
    for name in ("top1", "top5"):
        assert sum(part.n * getattr(part, name) for part in parts) / 200 == pytest.approx(getattr(whole, name))
    assert all(part.top1 <= part.superclass_top1 for part in parts)


def test_confidence_by_hand() -> None:
    logits = logits_of([0.9, 0.1, 0.0], [0.4, 0.3, 0.3], [0.1, 0.3, 0.6])
    confidence = measure_confidence(logits, torch.tensor([0, 1, 1]), "noise")
    assert (confidence.pictures, confidence.n) == ("noise", 3)
    assert confidence.mean == pytest.approx((0.9 + 0.4 + 0.6) / 3, rel=1e-6)
    assert confidence.above_half == pytest.approx(2 / 3)
    assert confidence.top1 == pytest.approx(1 / 3)
    assert measure_confidence(logits, None, "noise").top1 is None
