"""Optimisers against the rules they are named after, schedules and the plateau against worked examples."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn
from torch.optim import AdamW, Muon

from tests.training.tiny import MODEL
from training.config import PRESETS, ModelConfig, TrainConfig
from training.model import Perceiver
from training.optim import (
    CorrectedLamb,
    Plateau,
    clip_gradients,
    make_optimizers,
    schedule_factor,
    set_learning_rates,
)

Array = NDArray[np.float64]


# --- LAMB


def lamb(
    weights: Array, gradients: list[Array], rate: float, decay: float, ratio_epsilon: float, *, corrected: bool = True
) -> list[Array]:
    """You et al. 2020, algorithm 2, as TensorFlow Addons has it (``ratio_epsilon`` 0): the weights after each step."""
    beta1, beta2, epsilon = 0.9, 0.999, 1e-6
    m, v = np.zeros_like(weights), np.zeros_like(weights)
    seen = []
    for t, gradient in enumerate(gradients, start=1):
        m = beta1 * m + (1 - beta1) * gradient
        v = beta2 * v + (1 - beta2) * gradient**2
        m_hat, v_hat = (m / (1 - beta1**t), v / (1 - beta2**t)) if corrected else (m, v)
        update = m_hat / (np.sqrt(v_hat) + epsilon) + decay * weights
        weight_norm, update_norm = np.sqrt((weights**2).sum()), np.sqrt((update**2).sum())
        ratio = weight_norm / (update_norm + ratio_epsilon) if weight_norm > 0 and update_norm > 0 else 1.0
        weights = weights - rate * ratio * update
        seen.append(weights)
    return seen


STARTS = {
    "matrix": np.random.default_rng(0).normal(size=(6, 5)),
    "beyond the package's clamp of 10": np.random.default_rng(1).normal(size=(20, 20)),
    "bias, from zero": np.zeros(7),
    "scalar": np.ones(()),
}


def lamb_of_the_package(start: Array, gradients: list[Array], rate: float, decay: float) -> list[Array]:
    parameter = nn.Parameter(torch.from_numpy(np.array(start)))
    optimizer = CorrectedLamb([{"params": [parameter], "weight_decay": decay}], rate)
    seen = []
    for gradient in gradients:
        parameter.grad = torch.from_numpy(np.array(gradient))
        optimizer.step()
        seen.append(parameter.detach().numpy().copy())
    return seen


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("start", STARTS.values(), ids=STARTS.keys())
def test_lamb_follows_the_paper_step_by_step(start: Array, decay: float) -> None:
    gradients = list(np.random.default_rng(2).normal(size=(30, *start.shape)))
    actual = lamb_of_the_package(start, gradients, 0.05, decay)
    # The package adds an epsilon to the ratio's denominator: its variant exactly, the paper's to that epsilon.
    np.testing.assert_allclose(actual, lamb(start, gradients, 0.05, decay, 1e-6), rtol=1e-11, atol=1e-13)
    np.testing.assert_allclose(actual, lamb(start, gradients, 0.05, decay, 0.0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("start", [STARTS["matrix"], STARTS["bias, from zero"]], ids=["matrix", "bias"])
def test_bias_correction_makes_a_difference(start: Array) -> None:
    gradients = list(np.random.default_rng(2).normal(size=(30, *start.shape)))
    corrected, uncorrected = (lamb(start, gradients, 0.05, 0.1, 0.0, corrected=c)[-1] for c in (True, False))
    assert np.abs(corrected - uncorrected).max() > 0.01


def test_the_first_step_of_a_bias_is_the_learning_rate() -> None:
    after = lamb_of_the_package(np.zeros(3), [np.array([3.0, -0.1, 50.0])], 0.01, 0.1)[0]
    np.testing.assert_allclose(after, [-0.01, 0.01, -0.01], rtol=1e-4)


# --- groups


def small_model(**changes: object) -> Perceiver:
    return Perceiver(ModelConfig.model_validate(MODEL | changes))


def decays(model: Perceiver, config: TrainConfig) -> dict[str, tuple[type, float]]:
    """Each parameter's optimiser and decay, by its name; fails where one has two."""
    found: dict[int, tuple[type, float]] = {}
    for optimizer in make_optimizers(model, config):
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                assert id(parameter) not in found
                found[id(parameter)] = (type(optimizer), group["weight_decay"])
    return {name: found[id(parameter)] for name, parameter in model.named_parameters()}


def test_lamb_decays_everything_as_the_example_does() -> None:
    train = PRESETS["reference"].train
    assert set(decays(small_model(), train).values()) == {(CorrectedLamb, 1e-4)}
    assert (train.optimizer, train.learning_rate) == ("lamb", 1e-3)


def test_decay_of_matrices_only() -> None:
    config = TrainConfig(optimizer="adamw", weight_decay=0.3, decay_all=False)
    decayed = {name for name, (_, decay) in decays(small_model(), config).items() if decay == 0.3}
    expected = {name for name, module in small_model().named_modules() if isinstance(module, nn.Linear)}
    assert decayed == {f"{name}.weight" for name in expected}


@pytest.mark.parametrize("head_hidden", [False, True])
def test_muon_trains_the_matrices_and_adamw_the_rest(head_hidden: bool) -> None:
    model = small_model(head_hidden=head_hidden, cross_position_bias=True, head_norm=True)
    config = TrainConfig(optimizer="muon", weight_decay=0.3, decay_all=False)
    found = decays(model, config)
    for name, parameter in model.named_parameters():
        dense = parameter.ndim == 2 and name.endswith(".weight")
        head = name.startswith("head.")
        assert found[name] == (Muon if dense and not head else AdamW, 0.3 if dense else 0.0), name
    assert {kind for kind, _ in found.values()} == {Muon, AdamW}


def test_muon_and_adamw_have_rates_of_their_own() -> None:
    config = TrainConfig(optimizer="muon", learning_rate=0.02, adamw_learning_rate=0.003)
    optimizers = make_optimizers(small_model(), config)
    for factor in (0.5, 0.1):
        set_learning_rates(optimizers, factor)
        rates = [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]
        assert rates == pytest.approx([0.02 * factor, 0.003 * factor, 0.003 * factor])


def test_clipping_bounds_the_norm_of_all_gradients_together() -> None:
    model = small_model()
    model(torch.randn(4, 3, 8, 8)).square().sum().backward()

    def norm() -> float:
        return math.sqrt(sum(float(p.grad.square().sum()) for p in model.parameters() if p.grad is not None))

    before = norm()
    clip_gradients(model, 0)
    assert norm() == before
    clip_gradients(model, before / 4)
    assert norm() == pytest.approx(before / 4, rel=1e-4)


# --- schedules


def factors(steps_per_epoch: int, epochs: int, **changes: object) -> list[float]:
    config = TrainConfig.model_validate({"epochs": epochs, **changes})
    total = steps_per_epoch * epochs
    return [schedule_factor(config, step, total, steps_per_epoch) for step in range(total)]


def test_linear_warms_up_and_falls_to_nothing() -> None:
    expected = [0.25, 0.5, 0.75, 1.0, 1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125]
    assert factors(4, 3, schedule="linear", warmup_epochs=1) == pytest.approx(expected)


def test_cosine_warms_up_and_falls_to_nothing() -> None:
    half = [0.5 * (1 + math.cos(math.pi * i / 8)) for i in range(8)]
    assert factors(4, 3, schedule="cosine", warmup_epochs=1) == pytest.approx([0.25, 0.5, 0.75, 1.0, *half])
    assert half[4] == pytest.approx(0.5)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("warmup", [0.0, 0.15, 0.33, 1.0, 2.7, 3.0, 9.0])
def test_factors_stay_between_nothing_and_one(schedule: str, warmup: float) -> None:
    found = factors(7, 3, schedule=schedule, warmup_epochs=warmup)
    assert all(0 < factor <= 1 for factor in found)
    peak = found.index(max(found))
    assert found[:peak] == sorted(found[:peak])
    assert found[peak:] == sorted(found[peak:], reverse=True)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_a_warm_up_as_long_as_the_run_takes_half_of_it(schedule: str) -> None:
    for warmup in (1, 2, 50):
        found = factors(4, 2, schedule=schedule, warmup_epochs=warmup)
        assert found[:4] == [0.25, 0.5, 0.75, 1.0]
        assert found == factors(4, 2, schedule=schedule, warmup_epochs=1)
        assert found[-1] < 0.3


def test_plateau_leaves_the_steps_alone() -> None:
    assert set(factors(4, 3, schedule="plateau", warmup_epochs=1)) == {1.0}


# --- Keras' callbacks


def follow(losses: list[float], **changes: object) -> list[tuple[float, bool]]:
    """The learning rate's factor and whether to stop, after each epoch's validation loss."""
    config = TrainConfig.model_validate(changes)
    plateau = Plateau()
    seen = []
    for loss in losses:
        plateau.update(loss, config)
        seen.append((plateau.factor, plateau.should_stop(config)))
    return seen


def test_rate_falls_after_epochs_without_enough_improvement() -> None:
    # Falls of 0.1 or less don't count, and the best stays what it was: 0.95 is compared with 1.0, so is 0.91.
    losses = [1.0, 0.95, 0.91, 0.80, 0.75, 0.90, 0.71, 0.71, 0.50, 0.45, 0.44]
    expected = [1, 1, 0.5, 0.5, 0.5, 0.25, 0.25, 0.125, 0.125, 0.125, 0.0625]
    found = follow(losses, plateau_patience=2, plateau_threshold=0.1, plateau_factor=0.5)
    assert [factor for factor, _ in found] == expected


def test_defaults_are_those_of_the_example() -> None:
    losses = [2.0, *[1.99995] * 15]
    found = follow(losses)
    assert [factor for factor, _ in found[:8]] == pytest.approx([1, 1, 1, 0.2, 0.2, 0.2, 0.04, 0.04])
    # EarlyStopping, unlike ReduceLROnPlateau, took the fall from 2.0 for one: fifteen epochs later than that.
    assert [stop for _, stop in follow([*losses, 1.99995])] == [False] * 16 + [True]


def test_stop_after_epochs_without_any_improvement() -> None:
    losses = [1.0, 1.1, 0.999, 0.999, 1.2, 0.9989, 1.0, 1.0, 1.0]
    assert [stop for _, stop in follow(losses, early_stop_patience=3)] == [False] * 8 + [True]
    assert not any(stop for _, stop in follow([1.0] * 50, early_stop_patience=0))


def test_other_schedules_stop_early_but_are_not_reduced() -> None:
    found = follow([1.0] * 6, schedule="cosine", early_stop_patience=4, plateau_patience=1)
    assert found == [(1.0, False)] * 4 + [(1.0, True)] * 2
