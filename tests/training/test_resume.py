"""A stopped or killed run goes on bit for bit, and nothing else is taken for it."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training.runs import RECIPES, assert_same_run, assert_same_tensors, metrics_of, tensors_of, trainer_in
from tests.training.tiny import DROPOUT, run_config
from training import checkpoint
from training.checkpoint import CheckpointError
from training.evaluate import predict_logits

pytestmark = pytest.mark.usefixtures("without_figures")


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES.keys())
def test_a_stopped_run_goes_on_bit_for_bit(tmp_path: Path, recipe: dict[str, Any]) -> None:
    run = run_config(DROPOUT, **recipe)
    whole = trainer_in(tmp_path / "whole", run)
    assert whole.fit()
    assert whole.state.step == 15
    # Before the first step, within an epoch (twice), at an epoch's end.
    stops = [2, 7, 9, 10]
    for i, max_steps in enumerate([*stops, None]):
        stopped = trainer_in(tmp_path / "stopped", run)
        if i:
            stopped.resume()
            assert stopped.state.step == stops[i - 1]
        assert stopped.fit(max_steps=max_steps) == (max_steps is None)
    assert_same_run(whole, stopped)


def test_the_time_that_an_epoch_took_before_a_stop_counts(tmp_path: Path) -> None:
    stopped = trainer_in(tmp_path, run_config())
    stopped.fit(max_steps=2)
    again = trainer_in(tmp_path, run_config())
    again.resume()
    assert again.state.seconds == stopped.state.seconds > 0


def test_a_run_stopped_before_its_first_step_can_go_on(tmp_path: Path) -> None:
    run = run_config(DROPOUT, **RECIPES["muon"])
    whole = trainer_in(tmp_path / "whole", run)
    whole.fit()
    stopped = trainer_in(tmp_path / "stopped", run)
    assert not stopped.fit(deadline=0.0)
    assert stopped.state.step == 0
    resumed = trainer_in(tmp_path / "stopped", run)
    resumed.resume()
    assert resumed.fit()
    assert_same_run(whole, resumed)


def test_a_finished_run_is_left_as_it_is(tmp_path: Path) -> None:
    first = trainer_in(tmp_path / "run", run_config())
    first.fit()
    before = tensors_of(first)
    again = trainer_in(tmp_path / "run", run_config())
    again.resume()
    assert again.fit()
    assert_same_tensors(before, tensors_of(again))
    assert len(metrics_of(again)) == 3


@pytest.mark.parametrize("slow", [False, True])
def test_what_ends_a_long_validation_ends_no_epoch(tmp_path: Path, slow: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_config(DROPOUT, ema_decay=0.8)
    whole = trainer_in(tmp_path / "whole", run)
    whole.fit()
    killed = trainer_in(tmp_path / "killed", run)
    assert killed.validation_seconds == math.inf
    killed.fit(max_steps=7)
    assert 0 < killed.validation_seconds < math.inf
    killed.validation_seconds = 60.0 if slow else 0.1

    def die() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(killed, "validate", die)
    with pytest.raises(KeyboardInterrupt):
        killed.fit()
    again = trainer_in(tmp_path / "killed", run)
    again.resume()
    # Of a short one, the steps since the last checkpoint are trained again.
    assert (again.state.epoch, again.state.step) == (1, 10 if slow else 7)
    assert again.fit()
    assert_same_run(whole, again)


def test_a_signal_stops_a_validation_before_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_config(DROPOUT, ema_decay=0.8)
    whole = trainer_in(tmp_path / "whole", run, val=40)
    whole.fit()
    stopped = trainer_in(tmp_path / "stopped", run, val=40)
    stopped.fit(max_steps=7)
    seen = []

    def predict_and_stop(*args: Any) -> torch.Tensor:
        seen.append(len(args[2]))
        stopped.stop_requested = True
        return predict_logits(*args)

    with monkeypatch.context() as patched:
        patched.setattr("training.train.predict_logits", predict_and_stop)
        assert not stopped.fit()
    assert seen == [stopped.evaluation_batch]  # of 40 images
    again = trainer_in(tmp_path / "stopped", run, val=40)
    again.resume()
    assert (again.state.epoch, again.state.step) == (1, 10)
    assert again.fit()
    assert_same_run(whole, again)


def test_lines_behind_the_checkpoint_are_written_anew(tmp_path: Path) -> None:
    run = run_config(epochs=2)
    whole = trainer_in(tmp_path / "whole", run)
    whole.fit()
    killed = trainer_in(tmp_path / "killed", run)
    killed.fit(max_steps=5)
    # As a run leaves it that is killed between its second line and the checkpoint, and in the middle of a third.
    with (killed.folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(metrics_of(whole)[1]) + '\n{"epoch": 3, "st')
    resumed = trainer_in(tmp_path / "killed", run)
    resumed.resume()
    resumed.fit()
    assert_same_run(whole, resumed)


def test_a_stop_after_the_weights_have_burst_keeps_the_last_checkpoint(tmp_path: Path) -> None:
    trainer = trainer_in(tmp_path / "run", run_config(optimizer="adamw"))
    trainer.fit(max_steps=7)
    before = tensors_of(trainer)
    with torch.no_grad():
        trainer.state.model.latents.fill_(float("inf"))
    with pytest.raises(FloatingPointError):
        trainer.fit(max_steps=8)
    assert_same_tensors(before, tensors_of(trainer))


def test_a_checkpoint_of_another_configuration_is_refused(tmp_path: Path) -> None:
    trainer_in(tmp_path / "one", run_config()).fit(max_steps=1)
    other = trainer_in(tmp_path / "other", run_config({"dim": 32}))
    shutil.copy(tmp_path / "one" / "last.safetensors", tmp_path / "other")
    with pytest.raises(CheckpointError, match="belongs to another configuration"):
        other.resume()


def test_an_older_run_knows_its_images_by_their_number(tmp_path: Path) -> None:
    trainer = trainer_in(tmp_path / "run", run_config())
    trainer.fit(max_steps=1)
    last = tmp_path / "run" / "last.safetensors"
    tensors, header = checkpoint.load(last)
    checkpoint.save(last, tensors, header.model_copy(update={"state": header.state | {"pictures": 41}}))
    with pytest.raises(CheckpointError, match="began with 41 training images, and now there are 40"):
        trainer_in(tmp_path / "run", run_config()).resume()
