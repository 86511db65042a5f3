"""The loop: order of the pictures, repeatability, and a stopped run that goes on bit for bit."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training.tiny import ALONE, DROPOUT, data_set, run_config
from training import checkpoint
from training.checkpoint import CheckpointError, RunConfig
from training.config import PRESETS
from training.distributed import World
from training.lines import read_lines
from training.state import seed_step
from training.train import Trainer, epoch_order

pytestmark = pytest.mark.usefixtures("without_curves")

# Between them: every optimiser, average, mixing, schedule and precision, and all kinds of dropout.
RECIPES: dict[str, dict[str, Any]] = {
    "lamb": {"optimizer": "lamb", "learning_rate": 0.01, "zoom": 0.2, "mixup": 0.2, "plateau_patience": 1},
    "adamw": {
        "optimizer": "adamw",
        "learning_rate": 0.003,
        "schedule": "cosine",
        "ema_decay": 0.9,
        "cutmix": 1.0,
        "label_smoothing": 0.1,
    },
    "muon": {
        "optimizer": "muon",
        "learning_rate": 0.02,
        "schedule": "linear",
        "warmup_epochs": 0.5,
        "ema_decay": 0.8,
        "mixup": 0.4,
        "cutmix": 1.0,
        "crop_padding": 2,
        "clip_norm": 1.0,
        "precision": "bfloat16",
        "best_by": "loss",
    },
}


def trainer_in(folder: Path, run: RunConfig, **sizes: int) -> Trainer:
    folder.mkdir(exist_ok=True)
    return Trainer(run, data_set(**sizes), folder, ALONE)


def tensors_of(trainer: Trainer, name: str = "last") -> dict[str, torch.Tensor]:
    return checkpoint.load(trainer.folder / f"{name}.safetensors")[0]


def lines_of(trainer: Trainer) -> list[dict[str, float]]:
    """The epochs' lines without what a clock says."""
    timed = ("seconds", "pictures_per_second")
    return [{key: value for key, value in line.items() if key not in timed} for line in read_lines(trainer.folder)]


def assert_same_tensors(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


def assert_same_run(one: Trainer, other: Trainer) -> None:
    """Weights, their average, the optimisers' moments, counters, metrics and the best checkpoint."""
    assert_same_tensors(tensors_of(one), tensors_of(other))
    assert_same_tensors(tensors_of(one, "best"), tensors_of(other, "best"))
    headers = [checkpoint.load(trainer.folder / "last.safetensors")[1] for trainer in (one, other)]
    states = [{**header.state, "seconds": None} for header in headers]
    assert states[0] == states[1]
    assert (headers[0].epoch, headers[0].step, headers[0].val) == (headers[1].epoch, headers[1].step, headers[1].val)
    assert lines_of(one) == lines_of(other)


# --- order


@pytest.mark.parametrize(("count", "batch_size"), [(40, 8), (41, 8), (47, 8), (3, 8), (1, 8), (8, 8), (9, 1), (5, 12)])
def test_an_epoch_shows_every_picture_before_any_again(count: int, batch_size: int) -> None:
    order = epoch_order(0, 3, count, batch_size)
    assert order.shape == (-(-count // batch_size), batch_size)
    flat = order.flatten()
    for start in range(0, len(flat), count):
        part = flat[start : start + count]
        assert torch.equal(part, flat[: len(part)])
    assert sorted(flat[:count].tolist()) == list(range(count))


def test_order_is_that_of_seed_and_epoch() -> None:
    assert torch.equal(epoch_order(1, 2, 100, 10), epoch_order(1, 2, 100, 10))
    assert not torch.equal(epoch_order(1, 2, 100, 10), epoch_order(1, 3, 100, 10))
    assert not torch.equal(epoch_order(1, 2, 100, 10), epoch_order(2, 2, 100, 10))
    assert epoch_order(2**32 - 1, 10_000, 5, 5).shape == (1, 5)


def test_generators_are_seeded_by_every_part() -> None:
    def drawn(*parts: int) -> float:
        seed_step(*parts)
        return torch.rand(()).item()

    assert drawn(1, 2, 3) == drawn(1, 2, 3)
    assert len({drawn(1), drawn(1, 0), drawn(0, 1), drawn(1, 1), drawn(1, 1, 0), drawn(11, 0), drawn(1, 10)}) == 7


# --- a run


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


def test_a_seed_repeats_a_run_and_another_seed_does_not(tmp_path: Path) -> None:
    runs = [trainer_in(tmp_path / str(i), run_config(DROPOUT, seed=seed)) for i, seed in enumerate((5, 5, 6))]
    for trainer in runs:
        trainer.fit()
    assert_same_run(runs[0], runs[1])
    assert lines_of(runs[0]) != lines_of(runs[2])


def test_a_finished_run_is_left_as_it_is(tmp_path: Path) -> None:
    first = trainer_in(tmp_path / "run", run_config())
    first.fit()
    before = tensors_of(first)
    again = trainer_in(tmp_path / "run", run_config())
    again.resume()
    assert again.fit()
    assert_same_tensors(before, tensors_of(again))
    assert len(lines_of(again)) == 3


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


def test_a_damaged_line_is_told_with_its_file(tmp_path: Path) -> None:
    trainer = trainer_in(tmp_path, run_config(epochs=1))
    trainer.fit()
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + "{a\n")
    with pytest.raises(
        ValueError, match=r"metrics\.jsonl: line 2 is damaged \(.*\); take it out, or restore the file\."
    ):
        read_lines(tmp_path)
    path.write_bytes(b"\xff\n")
    with pytest.raises(ValueError, match=r"metrics\.jsonl: line 1 is damaged"):
        read_lines(tmp_path)


def test_lines_behind_the_checkpoint_are_written_anew(tmp_path: Path) -> None:
    run = run_config(epochs=2)
    whole = trainer_in(tmp_path / "whole", run)
    whole.fit()
    killed = trainer_in(tmp_path / "killed", run)
    killed.fit(max_steps=5)
    # As a run leaves it that is killed between its second line and the checkpoint, and in the middle of a third.
    with (killed.folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(lines_of(whole)[1]) + '\n{"epoch": 3, "st')
    resumed = trainer_in(tmp_path / "killed", run)
    resumed.resume()
    resumed.fit()
    assert_same_run(whole, resumed)


def test_it_learns(tmp_path: Path) -> None:
    run = run_config(optimizer="adamw", learning_rate=0.01, epochs=8, early_stop_patience=0)
    trainer = trainer_in(tmp_path / "run", run)
    trainer.fit()
    lines = lines_of(trainer)
    assert lines[-1]["val_top1"] > 0.8
    assert lines[-1]["val_loss"] < 0.6 * lines[0]["val_loss"]
    assert [line["epoch"] for line in lines] == list(range(1, 9))


@pytest.mark.parametrize("sizes", [{"train": 5, "val": 1}, {"train": 1, "val": 1}, {"train": 9, "val": 30}])
def test_tiny_data_sets_train(tmp_path: Path, sizes: dict[str, int]) -> None:
    trainer = trainer_in(tmp_path / "run", run_config(epochs=2), **sizes)
    assert trainer.fit()
    assert trainer.state.step == 2 * trainer.steps_per_epoch


def test_the_average_of_the_weights_is_what_is_evaluated_and_saved(tmp_path: Path) -> None:
    trainer = trainer_in(tmp_path / "run", run_config(ema_decay=0.2, optimizer="adamw", epochs=1))
    expected: dict[str, torch.Tensor] = {}
    # Nothing of the random weights stays, and the decay grows from 2/11 to what it is set to.
    for indices, decay in zip(epoch_order(0, 0, 40, 8), (0, 2 / 11, 0.2, 0.2, 0.2), strict=True):
        trainer.one_step(indices)
        for name, weight in trainer.state.model.named_parameters():
            old = expected.get(name, weight)
            expected[name] = (decay * old + (1 - decay) * weight).detach().clone()
    trainer.state.seconds = 1.0
    trainer.finish_epoch()
    saved = checkpoint.under("model", tensors_of(trainer, "best"))
    for name, weight in expected.items():
        torch.testing.assert_close(saved[name], weight)
    assert not torch.equal(saved["latents"], checkpoint.under("raw", tensors_of(trainer))["latents"])


@pytest.mark.parametrize("best_by", ["top1", "loss"])
def test_the_best_epoch_is_chosen_by_what_the_recipe_says(tmp_path: Path, best_by: str) -> None:
    run = run_config(optimizer="adamw", learning_rate=0.02, epochs=6, best_by=best_by)
    trainer = trainer_in(tmp_path / "run", run)
    trainer.fit()
    lines = lines_of(trainer)
    key = {"top1": lambda line: (-line["val_top1"], line["val_loss"]), "loss": lambda line: line["val_loss"]}[best_by]
    _, header = checkpoint.load(trainer.folder / "best.safetensors")
    assert header.epoch == min(lines, key=key)["epoch"]
    assert header.val is not None
    assert header.val.loss == lines[header.epoch - 1]["val_loss"]


def test_the_training_loss_is_the_mean_of_the_epoch(tmp_path: Path) -> None:
    # Weights that rest and pictures as they are: every epoch has the loss of all pictures.
    run = run_config(learning_rate=1e-12, weight_decay=0, flip=False)
    trainer = trainer_in(tmp_path / "run", run)
    with torch.no_grad():
        logits = trainer.state.model(trainer.state.preprocess(trainer.train_split.images))
    expected = torch.nn.functional.cross_entropy(logits, trainer.train_split.labels).item()
    trainer.fit()
    assert [line["train_loss"] for line in lines_of(trainer)] == pytest.approx([expected] * 3, rel=1e-5)


def test_the_rate_falls_where_the_loss_rests(tmp_path: Path) -> None:
    recipe = {"schedule": "plateau", "plateau_factor": 0.2, "plateau_patience": 1, "plateau_threshold": 100}
    trainer = trainer_in(tmp_path, run_config(learning_rate=0.01, epochs=4, **recipe))
    assert trainer.fit()
    assert [line["learning_rate"] for line in lines_of(trainer)] == pytest.approx([0.01, 0.01, 0.002, 0.0004])


def test_the_optimizer_takes_gradients_that_are_clipped(tmp_path: Path) -> None:
    norms = []
    for clip_norm in (0.0, 0.001):
        trainer = trainer_in(tmp_path, run_config(optimizer="adamw", clip_norm=clip_norm))
        trainer.fit(max_steps=1)
        moments = [moment["exp_avg"].flatten() for moment in trainer.state.optimizers[0].state.values()]
        norms.append(torch.cat(moments).norm().item() / 0.1)  # of its first moment a step's gradient is a tenth
    assert norms[0] > 0.01
    assert norms[1] == pytest.approx(0.001, rel=1e-2)


@pytest.mark.parametrize("model", [{}, DROPOUT])
def test_processes_draw_the_same_changes_of_a_batch_and_dropout_of_their_own(
    tmp_path: Path, model: dict[str, Any]
) -> None:
    losses = []
    for rank in (0, 1):
        trainer = trainer_in(tmp_path, run_config(model, crop_padding=2, zoom=0.2, mixup=0.4, cutmix=1.0))
        trainer.world = World(rank, 1, ALONE.device)  # and yet the whole batch is the share of each
        trainer.fit(max_steps=1)
        losses.append(trainer.state.loss_sum.item())
    assert (losses[0] == losses[1]) == (not model)


def test_early_stop_ends_the_run(tmp_path: Path) -> None:
    run = run_config(learning_rate=1e-9, epochs=50, early_stop_patience=2, flip=False, weight_decay=0)
    trainer = trainer_in(tmp_path / "run", run)
    assert trainer.fit()
    assert trainer.state.epoch < 50
    losses = [line["val_loss"] for line in lines_of(trainer)]
    assert min(losses) == losses[-3]


# --- what goes wrong


@pytest.mark.parametrize(
    ("what", "part"), [("training", "weights"), ("validation", "weights"), ("validation", "preprocessing")]
)
def test_a_loss_that_is_not_finite_ends_the_run_and_spoils_no_checkpoint(tmp_path: Path, what: str, part: str) -> None:
    trainer = trainer_in(tmp_path / "run", run_config(optimizer="adamw"))
    trainer.fit(max_steps=7)
    before = tensors_of(trainer)
    broken = trainer.state.model.latents if part == "weights" else trainer.state.preprocess.mean
    if part == "weights":
        trainer.validation_seconds = 60.0  # so that the epoch's steps would be saved before
    with torch.no_grad():
        broken.fill_(float("nan"))
    if what == "validation":
        trainer.state.step = 10
    message = f"the {what} loss became nan in epoch 2: lower --learning-rate"
    with pytest.raises(FloatingPointError, match=message):
        trainer.finish_epoch() if what == "validation" else trainer.fit()
    assert_same_tensors(before, tensors_of(trainer))
    assert len(lines_of(trainer)) == 1


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


def test_an_older_run_knows_its_pictures_by_their_number(tmp_path: Path) -> None:
    trainer = trainer_in(tmp_path / "run", run_config())
    trainer.fit(max_steps=1)
    last = tmp_path / "run" / "last.safetensors"
    tensors, header = checkpoint.load(last)
    checkpoint.save(last, tensors, header.model_copy(update={"state": header.state | {"pictures": 41}}))
    with pytest.raises(CheckpointError, match="began with 41 training pictures, and now there are 40"):
        trainer_in(tmp_path / "run", run_config()).resume()


@pytest.mark.parametrize("name", PRESETS)
def test_every_presets_recipe_trains(name: str, tmp_path: Path, without_curves: None) -> None:
    changes = {"epochs": 2, "batch_size": 8, "compile": False, "crop_padding": min(PRESETS[name].train.crop_padding, 7)}
    recipe = PRESETS[name].train.model_dump() | changes
    trainer = Trainer(run_config(**recipe), data_set(), tmp_path, ALONE)
    before = trainer.state.model.latents.detach().clone()
    assert trainer.fit()
    assert not torch.equal(trainer.state.model.latents, before)


def test_of_epochs_that_are_as_good_the_one_of_the_lowest_loss_is_kept(tmp_path: Path) -> None:
    # Of a single picture most epochs are as good.
    run = run_config(DROPOUT, optimizer="adamw", learning_rate=0.003, epochs=12, early_stop_patience=0)
    trainer = trainer_in(tmp_path / "run", run, val=1)
    for max_steps in (17, None):
        if max_steps is None:
            trainer = trainer_in(tmp_path / "run", run, val=1)
            trainer.resume()
        trainer.fit(max_steps=max_steps)
    ranked = sorted(lines_of(trainer), key=lambda line: (-line["val_top1"], line["val_loss"]))
    assert ranked[0]["epoch"] != next(
        line["epoch"] for line in lines_of(trainer) if line["val_top1"] == ranked[0]["val_top1"]
    )
    assert checkpoint.load(trainer.folder / "best.safetensors")[1].epoch == ranked[0]["epoch"]
