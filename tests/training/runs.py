"""Runs of the tiny model in a folder, and what tells whether two of them are the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.training.tiny import ALONE, data_set
from training import checkpoint
from training.checkpoint import RunConfig
from training.metrics_log import read_metrics
from training.train import Trainer

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


def metrics_of(trainer: Trainer) -> list[dict[str, float]]:
    """The epochs' lines without what a clock says."""
    timed = ("seconds", "pictures_per_second")
    return [{key: value for key, value in line.items() if key not in timed} for line in read_metrics(trainer.folder)]


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
    assert metrics_of(one) == metrics_of(other)
