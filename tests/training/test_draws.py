"""What a run draws at random: by its seed alone where it begins at random, and otherwise than its ancestors'."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.training.runs import assert_same_run, trainer_in
from tests.training.tiny import DROPOUT, run_config
from training import checkpoint
from training.checkpoint import Origin, RunConfig
from training.data import augment
from training.train import Trainer
from training.transfer import read_origin

pytestmark = pytest.mark.usefixtures("without_figures")

RECIPE: dict[str, Any] = {
    "crop_padding": 2,
    "zoom": 0.2,
    "trivial_augment": 0.5,
    "corruption": 0.5,
    "random_crop": 0.5,
    "mixup": 0.4,
    "mix_probability": 1.0,
}


class Recorder:
    """Of each step: its images, the changes of them, the mix, and a number as dropout would draw it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.steps: list[dict[str, Tensor]] = []
        one_step, draw, draw_mix = Trainer.one_step, augment.draw, augment.draw_mix

        def record_step(trainer: Trainer, indices: Tensor) -> None:
            self.steps.append({"indices": indices})
            trainer.state.model.register_forward_pre_hook(self._record_dropout)
            one_step(trainer, indices)
            trainer.state.model._forward_pre_hooks.clear()

        def record_draw(*args: Any) -> augment.Draws:
            draws = draw(*args)
            self.steps[-1] |= vars(draws)
            return draws

        def record_mix(*args: Any) -> Tensor | None:
            weight = draw_mix(*args)
            assert weight is not None
            self.steps[-1]["weight"] = weight
            return weight

        monkeypatch.setattr(Trainer, "one_step", record_step)
        monkeypatch.setattr(augment, "draw", record_draw)
        monkeypatch.setattr(augment, "draw_mix", record_mix)

    def _record_dropout(self, *_: object) -> None:
        self.steps[-1]["dropout"] = torch.randint(1 << 40, ())

    def taken(self) -> list[dict[str, Tensor]]:
        """The steps since the last call."""
        steps, self.steps = self.steps, []
        return steps


def assert_same(one: list[dict[str, Tensor]], other: list[dict[str, Tensor]]) -> None:
    for mine, theirs in zip(one, other, strict=True):
        assert mine.keys() == theirs.keys() >= {"indices", "flip", "shift", "zoom", "weight", "dropout"}
        for name, values in mine.items():
            assert torch.equal(values, theirs[name]), name


def assert_all_differ(one: list[dict[str, Tensor]], other: list[dict[str, Tensor]]) -> None:
    """No kind of draw is the same over the run, nor any step's images and shifts."""
    for name in one[0]:
        mine, theirs = (torch.stack([step[name] for step in steps]) for steps in (one, other))
        assert not torch.equal(mine, theirs), name
    for mine_step, their_step in zip(one, other, strict=True):
        for name in ("indices", "shift"):
            assert not torch.equal(mine_step[name], their_step[name]), name


def continued(run: RunConfig, path: Path) -> RunConfig:
    return run.model_copy(update={"init": read_origin(path)})


def begun(folder: Path, run: RunConfig, path: Path) -> Trainer:
    trainer = trainer_in(folder, run)
    trainer.load_origins([path], [])
    return trainer


def test_a_run_that_begins_at_random_draws_by_its_seed_alone() -> None:
    assert [run_config(seed=seed).draw_seed for seed in (0, 7, 2**32 - 1)] == [0, 7, 2**32 - 1]


def test_a_continued_run_draws_otherwise_than_its_ancestors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder(monkeypatch)
    run = run_config(DROPOUT, epochs=2, **RECIPE)
    first = trainer_in(tmp_path / "first", run)
    first.fit()
    of_first = recorder.taken()
    second = begun(tmp_path / "second", continued(run, path := first.folder / "best.safetensors"), path)
    second.fit()
    of_second = recorder.taken()
    assert_all_differ(of_first, of_second)
    third = begun(tmp_path / "third", continued(run, path := second.folder / "best.safetensors"), path)
    third.fit()
    of_third = recorder.taken()
    assert_all_differ(of_second, of_third)
    assert_all_differ(of_first, of_third)


def test_a_continued_run_draws_the_same_again_and_by_its_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder(monkeypatch)
    run = run_config(DROPOUT, epochs=1, **RECIPE)
    trainer_in(tmp_path / "first", run).fit()
    path = tmp_path / "first" / "best.safetensors"
    draws = []
    for name, seed in (("one", 0), ("other", 0), ("third", 1)):
        mine = run.model_copy(update={"train": run.train.model_copy(update={"seed": seed})})
        recorder.taken()
        begun(tmp_path / name, continued(mine, path), path).fit()
        draws.append(recorder.taken())
    assert_same(draws[0], draws[1])
    assert_all_differ(draws[0], draws[2])


def test_the_same_weights_written_at_another_time_are_continued_alike(tmp_path: Path) -> None:
    run = run_config(DROPOUT, epochs=1, **RECIPE)
    trainer_in(tmp_path / "first", run).fit()
    path, later = tmp_path / "first" / "best.safetensors", tmp_path / "later.safetensors"
    tensors, header = checkpoint.load(path)
    checkpoint.save(later, tensors, header.model_copy(update={"created": "2001-01-01T00:00:00+00:00"}))
    assert checkpoint.digest(path) != checkpoint.digest(later)
    one, other = (continued(run, each) for each in (path, later))
    assert one.draw_seed == other.draw_seed
    other_weights = tensors | {"model.latents": tensors["model.latents"] + 1}
    checkpoint.save(later, other_weights, header)
    assert continued(run, later).draw_seed != one.draw_seed


def test_a_run_of_before_the_weights_were_told_goes_on_by_the_digest_of_the_file(tmp_path: Path) -> None:
    run = run_config()
    assert run.train.seed == 0
    origin = Origin(checkpoint_sha256="ab" * 32, epoch=1, git_commit=None, run=run)
    seed = int.from_bytes(hashlib.sha256(f"0/{'ab' * 32}".encode()).digest()[:4], "little")
    assert run.model_copy(update={"init": origin}).draw_seed == seed


def test_a_continued_run_that_is_resumed_draws_as_one_that_nobody_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = Recorder(monkeypatch)
    run = run_config(DROPOUT, epochs=2, **RECIPE)
    trainer_in(tmp_path / "first", run).fit()
    run = continued(run, path := tmp_path / "first" / "best.safetensors")
    recorder.taken()
    whole = begun(tmp_path / "whole", run, path)
    whole.fit()
    of_whole = recorder.taken()
    begun(tmp_path / "stopped", run, path).fit(max_steps=7)
    resumed = trainer_in(tmp_path / "stopped", run)
    resumed.resume()
    resumed.fit()
    assert_same(of_whole, recorder.taken())
    assert_same_run(whole, resumed)
