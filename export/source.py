"""What is exported: a checkpoint with its report, or a preset with random weights."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from export.errors import ExportError
from training.checkpoint import CheckpointError, RunConfig, digest, git_commit, load_model
from training.config import PRESETS
from training.evaluate import Metrics
from training.metrics_log import MACHINE, Line, read_lines
from training.model import Perceiver, count_parameters
from training.preprocessing import Preprocess
from training.report_schema import CURVES, PLOTS, Report
from training.report_schema import FILE as REPORT_FILE
from training.transfer import find

RANDOM_CLASSES = 100
METRICS_FILE = "metrics.json"  # of a version folder


@dataclass(frozen=True)
class Machine:
    """What trained some epochs: a kind of device ("cpu", or a GPU's name), processes, CPU threads of each."""

    device: str
    processes: int
    threads: int

    def __str__(self) -> str:
        threads = f" of {self.threads} thread{'s' * (self.threads > 1)}" if self.device == "cpu" else ""
        return f"{self.device}, {self.processes} process{'es' * (self.processes > 1)}{threads}"


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
        lines: of `metrics.jsonl`, an epoch each; none where it can't be read.
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
    lines: tuple[Line, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def pictures(self) -> list[Path]:
        """What was drawn of the run; of the report's pictures only those of these weights."""
        if self.checkpoint is None:
            return []
        names = [CURVES, *(PLOTS if self.report else ())]
        return [path for path in map(self.checkpoint.with_name, names) if path.is_file()]

    @property
    def training_seconds(self) -> float | None:
        """Of all epochs' steps, None where some epoch does not say."""
        seconds = [line["seconds"] for line in self.lines if "seconds" in line]
        return sum(seconds) if len(seconds) == len(self.lines) >= max(self.epoch, 1) else None

    @property
    def machines(self) -> list[Machine]:
        """What trained it, in order of time, as far as the epochs tell."""
        told = [line for line in self.lines if all(name in line for name in MACHINE)]
        return list(dict.fromkeys(Machine(*(line[name] for name in MACHINE)) for line in told))

    @property
    def parameters(self) -> int:
        """Trained parameters."""
        return count_parameters(self.model)


def load_source(path: Path) -> Source:
    """Read one checkpoint with what stands beside it: the `best` of a run's folder, or that of a model folder.

    Raises:
        ExportError: there is no checkpoint, it is damaged, or the report can't be read.
    """
    if not path.exists():
        raise ExportError(f"{path}: does not exist; name the folder of a run, or a .safetensors file in it.")
    try:
        checkpoint = find(path)
        # Before it is read, so that `export.build` sees if a run that goes on replaces it meanwhile.
        sha256 = digest(checkpoint) if checkpoint.is_file() else ""
        model, preprocess, header = load_model(checkpoint)
    except CheckpointError as error:
        raise ExportError(str(error)) from error
    report, notes = read_report(checkpoint.parent, sha256)
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
        lines=epochs_of(checkpoint.parent),
        notes=notes,
    )


def read_report(folder: Path, sha256: str) -> tuple[Report | None, tuple[str, ...]]:
    """Read the report if it is about the checkpoint of this digest, and say in a sentence where it is not used.

    A run has it in a file of its own, a version folder in its `metrics.json`.

    Raises:
        ExportError: the file is no report.
    """
    without = "the model gets no temperature and no test figures"
    of_run, of_version = folder / REPORT_FILE, folder / METRICS_FILE
    path = of_run if of_run.is_file() else of_version
    try:
        text = of_run.read_text(encoding="utf-8") if of_run.is_file() else exported_report(of_version)
    except (OSError, UnicodeDecodeError) as error:
        raise ExportError(f"{path}: can't be read ({error}); restore or remove it.") from error
    if text is None:
        return None, (f"{folder} holds no report, so {without}.",)
    try:
        report = Report.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "JSON"
        raise ExportError(
            f"{path}: is not a report of this project ({where}: {first['msg']}); restore or remove it."
        ) from error
    if report.checkpoint_sha256 != sha256:
        return None, (f"{path} is about another checkpoint than this one, so {without}.",)
    return report, ()


def exported_report(path: Path) -> str | None:
    """Return the report in the `metrics.json` of a version folder as JSON; None where there is none."""
    report = exported_part(path, "report")
    return json.dumps(report) if report else None


def exported_part(path: Path, key: str) -> Any:
    """Return a part of the `metrics.json` of a version folder; None where there is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))[key]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def epochs_of(folder: Path) -> tuple[Line, ...]:
    """Read `metrics.jsonl`, or what a version folder has of it; nothing where it is damaged: only the card uses it."""
    try:
        lines = read_lines(folder) or exported_part(folder / METRICS_FILE, "epochs") or []
    except ValueError:
        return ()
    return tuple(lines) if all("epoch" in line for line in lines) else ()


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
        notes=("random weights: for measurements of speed, not for answers.",),
    )
