"""What is exported: a checkpoint with its report, or a preset with random weights."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from export.errors import ExportError
from training.checkpoint import CheckpointError, RunConfig, digest, git_commit, load_model
from training.config import PRESETS
from training.evaluate import Metrics
from training.model import Perceiver, count_parameters
from training.preprocessing import Preprocess

RANDOM_CLASSES = 100


class Report(BaseModel):
    """What the exporter reads of a run's `report.json`; what else stands there is kept for `metrics.json`."""

    model_config = ConfigDict(frozen=True, extra="allow")

    epoch: int
    temperature: float = Field(default=1.0, gt=0)
    checkpoint_sha256: str
    val: Metrics
    test: Metrics | None = None
    test_uncalibrated: Metrics | None = None


@dataclass(frozen=True)
class Source:
    """A model to export, and all that is known about it.

    Attributes:
        model: in evaluation mode, float32, on the CPU.
        preprocess: what brings pictures to the model.
        run: configuration of model and recipe.
        temperature: what the logits are divided by.
        report: None where the run has none that belongs to these weights.
        metrics: of the test pictures, else of the validation pictures; None for random weights.
        checkpoint: the file; None for random weights.
        checkpoint_sha256: of the file; of nothing but zeros for random weights.
        git_commit: of the source tree that trained, None where it is not known.
        epoch: after how many epochs the weights were taken.
        training_seconds: None where `metrics.jsonl` does not say.
        notes: sentences that the user should read.
    """

    model: Perceiver
    preprocess: Preprocess
    run: RunConfig
    temperature: float
    report: Report | None
    metrics: Metrics | None
    checkpoint: Path | None
    checkpoint_sha256: str
    git_commit: str | None
    epoch: int
    training_seconds: float | None
    notes: tuple[str, ...] = ()

    @property
    def curves(self) -> Path | None:
        """The picture of the run's learning curves, None where there is none."""
        path = self.checkpoint.parent / "curves.png" if self.checkpoint else None
        return path if path and path.is_file() else None

    @property
    def parameters(self) -> int:
        """Trained parameters."""
        return count_parameters(self.model)


def load_source(path: Path) -> Source:
    """Read a run's folder (its `best` checkpoint) or one checkpoint, with what stands beside it.

    Raises:
        ExportError: there is no checkpoint, it is damaged, or the report can't be read.
    """
    if not path.exists():
        raise ExportError(f"{path}: does not exist; name the folder of a run, or a .safetensors file in it.")
    checkpoint = path / "best.safetensors" if path.is_dir() else path
    try:
        model, preprocess, header = load_model(checkpoint)
    except CheckpointError as error:
        raise ExportError(str(error)) from error
    sha256 = digest(checkpoint)
    report, notes = read_report(checkpoint.parent / "report.json", sha256)
    return Source(
        model=model,
        preprocess=preprocess,
        run=header.run,
        temperature=report.temperature if report else 1.0,
        report=report,
        metrics=(report.test or report.val) if report else header.val,
        checkpoint=checkpoint,
        checkpoint_sha256=sha256,
        git_commit=header.git_commit,
        epoch=header.epoch,
        training_seconds=training_seconds(checkpoint.parent / "metrics.jsonl", header.epoch),
        notes=notes,
    )


def read_report(path: Path, sha256: str) -> tuple[Report | None, tuple[str, ...]]:
    """Read the report if it is about the checkpoint of this digest, and say in a sentence where it is not used.

    Raises:
        ExportError: the file is no report.
    """
    without = "the model gets no temperature and no test figures"
    if not path.is_file():
        return None, (f"there is no {path}, so {without}.",)
    try:
        report = Report.model_validate_json(path.read_text())
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "JSON"
        raise ExportError(f"{path}: is not a report of this project ({where}: {first['msg']}); remove it.") from error
    if report.checkpoint_sha256 != sha256:
        return None, (f"{path} is about another checkpoint than this one, so {without}.",)
    return report, ()


def training_seconds(path: Path, epoch: int) -> float | None:
    """Sum the seconds of the epochs up to `epoch`, None where the file does not tell all of them."""
    if not path.is_file():
        return None
    try:
        lines: list[dict[str, Any]] = [json.loads(line) for line in path.read_text().splitlines()]
        seconds = [float(line["seconds"]) for line in lines if line["epoch"] <= epoch]
    except (ValueError, KeyError):  # a line that was cut off; only the card would have used it
        return None
    return sum(seconds) if seconds and len(seconds) == epoch else None


def random_source(preset: str, seed: int = 0) -> Source:
    """Make a preset's model with random weights, for measurements of speed.

    Raises:
        ExportError: there is no such preset.
    """
    if preset not in PRESETS:
        raise ExportError(f"--random {preset}: there is no such preset; there are {', '.join(PRESETS)}.")
    config = PRESETS[preset].model.model_copy(update={"num_classes": RANDOM_CLASSES})
    labels = tuple(f"class {index}" for index in range(RANDOM_CLASSES))
    run = RunConfig(preset=preset, data=None, dataset="none", labels=labels, model=config, train=PRESETS[preset].train)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Perceiver(config).eval()
    return Source(
        model=model,
        preprocess=Preprocess(config.image_size),
        run=run,
        temperature=1.0,
        report=None,
        metrics=None,
        checkpoint=None,
        checkpoint_sha256="0" * 64,
        git_commit=git_commit(),
        epoch=0,
        training_seconds=None,
        notes=("random weights: for measurements of speed, not for answers.",),
    )
