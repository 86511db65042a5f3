"""The loop: order of the images, repeatability, what an epoch trains, chooses and writes down."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training.runs import assert_same_run, assert_same_tensors, metrics_of, tensors_of, trainer_in
from tests.training.tiny import ALONE, DROPOUT, data_set, run_config
from training import checkpoint
from training.config import PRESETS
from training.distributed import World
from training.metrics_log import read_metrics
from training.precision import choose_precision
from training.state import seed_step
from training.train import Trainer, epoch_order

pytestmark = pytest.mark.usefixtures("without_figures")

# --- order


@pytest.mark.parametrize(("count", "batch_size"), [(40, 8), (41, 8), (47, 8), (3, 8), (1, 8), (8, 8), (9, 1), (5, 12)])
def test_an_epoch_shows_every_image_before_any_again(count: int, batch_size: int) -> None:
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


def test_a_seed_repeats_a_run_and_another_seed_does_not(tmp_path: Path) -> None:
    runs = [trainer_in(tmp_path / str(i), run_config(DROPOUT, seed=seed)) for i, seed in enumerate((5, 5, 6))]
    for trainer in runs:
        trainer.fit()
    assert_same_run(runs[0], runs[1])
    assert metrics_of(runs[0]) != metrics_of(runs[2])


def test_a_damaged_line_is_told_with_its_file(tmp_path: Path) -> None:
    trainer = trainer_in(tmp_path, run_config(epochs=1))
    trainer.fit()
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + "{a\n")
    with pytest.raises(
        ValueError, match=r"metrics\.jsonl: line 2 is damaged \(.*\); take it out, or restore the file\."
    ):
        read_metrics(tmp_path)
    path.write_bytes(b"\xff\n")
    with pytest.raises(ValueError, match=r"metrics\.jsonl: line 1 is damaged"):
        read_metrics(tmp_path)


def test_it_learns(tmp_path: Path) -> None:
    run = run_config(optimizer="adamw", learning_rate=0.01, epochs=8, early_stop_patience=0)
    trainer = trainer_in(tmp_path / "run", run)
    trainer.fit()
    lines = metrics_of(trainer)
    assert lines[-1]["val_top1"] > 0.8
    assert lines[-1]["val_loss"] < 0.6 * lines[0]["val_loss"]
    assert [line["epoch"] for line in lines] == list(range(1, 9))


@pytest.mark.parametrize("sizes", [{"train": 5, "val": 1}, {"train": 1, "val": 1}, {"train": 9, "val": 30}])
def test_tiny_data_sets_train(tmp_path: Path, sizes: dict[str, int]) -> None:
    trainer = trainer_in(tmp_path / "run", run_config(epochs=2), **sizes)
    assert trainer.fit()
    assert trainer.state.step == 2 * trainer.steps_per_epoch


def test_the_average_of_the_weights_is_what_is_evaluated_and_saved(tmp_path: Path) -> None:
    trainer = trainer_in(tmp_path / "run", run_config(ema_decay=0.3, optimizer="adamw", epochs=1))
    expected: dict[str, torch.Tensor] = {}
    # Nothing of the random weights stays, and the decay grows from 2/11 by way of 3/12 to what it is set to.
    for indices, decay in zip(epoch_order(0, 0, 40, 8), (0, 2 / 11, 3 / 12, 0.3, 0.3), strict=True):
        trainer.one_step(indices)
        for name, weight in trainer.state.model.named_parameters():
            old = expected.get(name, weight)
            expected[name] = (decay * old + (1 - decay) * weight).detach().clone()
    trainer.state.seconds = 1.0
    trainer.finish_epoch()
    saved = checkpoint.strip_prefix("model", tensors_of(trainer, "best"))
    for name, weight in expected.items():
        torch.testing.assert_close(saved[name], weight)
    assert not torch.equal(saved["latents"], checkpoint.strip_prefix("raw", tensors_of(trainer))["latents"])


@pytest.mark.parametrize("best_by", ["top1", "loss"])
def test_the_best_epoch_is_chosen_by_what_the_recipe_says(tmp_path: Path, best_by: str) -> None:
    run = run_config(optimizer="adamw", learning_rate=0.02, epochs=6, best_by=best_by)
    trainer = trainer_in(tmp_path / "run", run)
    trainer.fit()
    lines = metrics_of(trainer)
    key = {"top1": lambda line: (-line["val_top1"], line["val_loss"]), "loss": lambda line: line["val_loss"]}[best_by]
    _, header = checkpoint.load(trainer.folder / "best.safetensors")
    assert header.epoch == min(lines, key=key)["epoch"]
    assert header.val is not None
    assert header.val.loss == lines[header.epoch - 1]["val_loss"]


@pytest.mark.smoke
def test_the_training_loss_is_the_mean_of_the_epoch(tmp_path: Path) -> None:
    # Weights that rest and images as they are: every epoch has the loss of all images.
    run = run_config(learning_rate=1e-12, weight_decay=0, flip=False)
    trainer = trainer_in(tmp_path / "run", run)
    with torch.no_grad():
        logits = trainer.state.model(trainer.state.preprocess(trainer.train_split.images))
    expected = torch.nn.functional.cross_entropy(logits, trainer.train_split.labels).item()
    trainer.fit()
    assert [line["train_loss"] for line in metrics_of(trainer)] == pytest.approx([expected] * 3, rel=1e-5)


def test_the_rate_falls_where_the_loss_rests(tmp_path: Path) -> None:
    recipe = {"schedule": "plateau", "plateau_factor": 0.2, "plateau_patience": 1, "plateau_threshold": 100}
    trainer = trainer_in(tmp_path, run_config(learning_rate=0.01, epochs=4, **recipe))
    assert trainer.fit()
    assert [line["learning_rate"] for line in metrics_of(trainer)] == pytest.approx([0.01, 0.01, 0.002, 0.0004])


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
    losses = [line["val_loss"] for line in metrics_of(trainer)]
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
    assert len(metrics_of(trainer)) == 1


@pytest.mark.parametrize("name", PRESETS)
def test_every_presets_recipe_trains(name: str, tmp_path: Path, without_figures: None) -> None:
    changes = {"epochs": 2, "batch_size": 8, "compile": False, "crop_padding": min(PRESETS[name].train.crop_padding, 7)}
    recipe = PRESETS[name].train.model_dump() | changes
    recipe["precision"] = choose_precision(PRESETS[name].train.precision, ALONE.device)
    trainer = Trainer(run_config(**recipe), data_set(), tmp_path, ALONE)
    before = trainer.state.model.latents.detach().clone()
    assert trainer.fit()
    assert not torch.equal(trainer.state.model.latents, before)


def test_of_epochs_that_are_as_good_the_one_of_the_lowest_loss_is_kept(tmp_path: Path) -> None:
    # Of a single image most epochs are as good.
    run = run_config(DROPOUT, optimizer="adamw", learning_rate=0.003, epochs=12, early_stop_patience=0)
    trainer = trainer_in(tmp_path / "run", run, val=1)
    for max_steps in (17, None):
        if max_steps is None:
            trainer = trainer_in(tmp_path / "run", run, val=1)
            trainer.resume()
        trainer.fit(max_steps=max_steps)
    ranked = sorted(metrics_of(trainer), key=lambda line: (-line["val_top1"], line["val_loss"]))
    assert ranked[0]["epoch"] != next(
        line["epoch"] for line in metrics_of(trainer) if line["val_top1"] == ranked[0]["val_top1"]
    )
    assert checkpoint.load(trainer.folder / "best.safetensors")[1].epoch == ranked[0]["epoch"]
