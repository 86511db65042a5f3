"""What is exported: a checkpoint with its report and data set, or a preset with random weights."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from export.errors import ExportError
from training.checkpoint import CheckpointError, RunConfig, digest, git_commit, load_model
from training.config import PRESETS, exportable_presets
from training.data import cifar
from training.data.dataset import DataError, DataSet
from training.data.load import load_for
from training.evaluate import Metrics
from training.metrics_log import MACHINE_FIELDS, MetricsEntry, read_metrics
from training.model import Perceiver
from training.network import count_parameters
from training.preprocessing import Preprocess
from training.recipe_run import recipe_run_of
from training.report_schema import CURVES, METRICS_FILE, PLOTS, Report
from training.report_schema import FILE as REPORT_FILE
from training.transfer import find_checkpoint

RANDOM_CLASSES = 100
DATA_FOLDER = Path("data")


@dataclass(frozen=True)
class Machine:
    """What trained some epochs.

    Attributes:
        device: "cpu", or a GPU's name.
        processes: of the training.
        threads: CPU threads of each process.
    """

    device: str
    processes: int
    threads: int

    def __str__(self) -> str:
        threads = f" of {self.threads} thread{'s' * (self.threads > 1)}" if self.device == "cpu" else ""
        return f"{self.device}, {self.processes} process{'es' * (self.processes > 1)}{threads}"


@dataclass(frozen=True)
class Source:
    """A model to export, with its run.

    Attributes:
        model: in evaluation mode, float32, on the CPU.
        preprocess: stored pixels to the model's input.
        run: configuration of model and recipe.
        temperature: divisor of the logits.
        report: of these weights; None where the run has none.
        metrics: on test images, else on validation images; None for random weights.
        val: on validation images; None for random weights, and for a checkpoint that was written within an epoch.
        checkpoint: the file; None for random weights.
        checkpoint_sha256: of the file; zeros for random weights.
        git_commit: of the source tree that trained; None where unknown.
        epoch: after which the weights were saved.
        epochs: of `metrics.jsonl`, for the last stage of a recipe those of all its stages; empty where it can't be
            read.
        warnings: sentences for the user.
    """

    model: Perceiver
    preprocess: Preprocess
    run: RunConfig
    temperature: float
    report: Report | None
    metrics: Metrics | None
    val: Metrics | None
    checkpoint: Path | None
    checkpoint_sha256: str
    git_commit: str | None
    epoch: int
    epochs: tuple[MetricsEntry, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def plots(self) -> list[Path]:
        """The run's plots: curves, of all stages where those are known, and those of a report of these weights."""
        if self.checkpoint is None:
            return []
        names = [CURVES, *(PLOTS if self.report else ())]
        found = {name: self.checkpoint.with_name(name) for name in names}
        whole = recipe_run_of(self.checkpoint.parent, self.run.stage, last=True)
        if self.stages and whole is not None:
            found[CURVES] = whole / CURVES
        return [path for path in found.values() if path.is_file()]

    @property
    def stages(self) -> int:
        """Number of the recipe's stages whose epochs are known; 0 where `epochs` are those of the run alone."""
        return self.run.stage.number if self.run.stage and any("stage" in epoch for epoch in self.epochs) else 0

    @property
    def own_epochs(self) -> list[MetricsEntry]:
        """Those of `epochs` that are of the run itself."""
        return [epoch for epoch in self.epochs if epoch.get("stage", self.stages) == self.stages]

    @property
    def training_seconds(self) -> float | None:
        """Duration of all epochs' steps; None if an epoch is missing or does not record it."""
        seconds = [epoch["seconds"] for epoch in self.epochs if "seconds" in epoch]
        return sum(seconds) if seconds and len(seconds) == len(self.epochs) and self.has_own_epochs else None

    @property
    def has_own_epochs(self) -> bool:
        """Whether the epochs of the run itself are known, up to that of the weights."""
        return len(self.own_epochs) >= self.epoch

    @property
    def machines(self) -> list[Machine]:
        """The machines that the epochs name, in order of time."""
        named = [epoch for epoch in self.epochs if all(name in epoch for name in MACHINE_FIELDS)]
        return list(dict.fromkeys(Machine(*(epoch[name] for name in MACHINE_FIELDS)) for epoch in named))

    @property
    def parameters(self) -> int:
        """Number of trained parameters."""
        return count_parameters(self.model)


def top5(source: Source, cell: str) -> list[str]:
    """Return a cell of a table's top-5 column; empty where so few classes have none."""
    return [cell] if source.run.with_top5 else []


def load_source(path: Path) -> Source:
    """Read a checkpoint and the report and metrics beside it.

    Args:
        path: a run's folder, a model or version folder, or a .safetensors file.

    Raises:
        ExportError: there is no checkpoint, it is damaged, or the report can't be read.
    """
    if not path.exists():
        raise ExportError(f"{path}: does not exist; name the folder of a run, or a .safetensors file in it.")
    try:
        checkpoint = find_checkpoint(path)
        # Before reading, so that `export.build` notices if a run in progress replaces the file.
        sha256 = digest(checkpoint) if checkpoint.is_file() else ""
        model, preprocess, header = load_model(checkpoint)
    except CheckpointError as error:
        raise ExportError(str(error)) from error
    if not isinstance(model, Perceiver):
        raise ExportError(f"{path}: is a residual network, which teaches and is not served; export what it has taught.")
    report, warnings = read_report(checkpoint.parent, sha256)
    return Source(
        model=model,
        preprocess=preprocess,
        run=header.run.model_copy(update={"data": read_data_path(checkpoint.parent) or header.run.data}),
        temperature=report.temperature if report else 1.0,
        report=report,
        metrics=(report.test or report.val) if report else header.val,
        val=report.val if report else header.val,
        checkpoint=checkpoint,
        checkpoint_sha256=sha256,
        git_commit=header.git_commit,
        epoch=header.epoch,
        epochs=read_epochs(checkpoint.parent, header.run),
        warnings=warnings,
    )


def read_data_path(folder: Path) -> str | None:
    """Return where the images of a run lie, which its configuration has and no checkpoint; None where nobody knows."""
    try:
        return RunConfig.model_validate_json((folder / "config.json").read_bytes()).data
    except (OSError, ValidationError):
        return None


def read_report(folder: Path, sha256: str) -> tuple[Report | None, tuple[str, ...]]:
    """Read a run's report file, or the report in a version's `metrics.json`.

    Args:
        folder: of the run or version.
        sha256: of the checkpoint.

    Returns:
        The report, or None and a warning where there is none for this checkpoint.

    Raises:
        ExportError: the file is not a report.
    """
    consequence = "the model gets no temperature and no test metrics"
    path = folder / REPORT_FILE
    if path.is_file():
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ExportError(f"{path}: can't be read ({error}); restore or remove it.") from error
    else:
        path, exported = folder / METRICS_FILE, read_exported(folder, "report")
        if not exported:
            return None, (f"{folder} holds no report, so {consequence}.",)
        text = json.dumps(exported)
    try:
        report = Report.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "JSON"
        raise ExportError(
            f"{path}: is not a report of this project ({where}: {first['msg']}); restore or remove it."
        ) from error
    if report.checkpoint_sha256 != sha256:
        return None, (f"{path} is about another checkpoint than this one, so {consequence}.",)
    return report, ()


def read_exported(folder: Path, key: str) -> Any:
    """Return a part of a version's `metrics.json`; None if it can't be read."""
    try:
        return json.loads((folder / METRICS_FILE).read_text(encoding="utf-8"))[key]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def read_epochs(folder: Path, run: RunConfig) -> tuple[MetricsEntry, ...]:
    """Read the epochs of a run, or those in a version's `metrics.json`; empty if damaged: only the card needs them.

    Those of a recipe's last stage are those of all stages.
    """
    whole = recipe_run_of(folder, run.stage, last=True)
    try:
        epochs = (whole and read_metrics(whole)) or read_metrics(folder) or read_exported(folder, "epochs") or []
    except ValueError:
        return ()
    return tuple(epochs) if all("epoch" in epoch for epoch in epochs) else ()


def random_source(preset: str, seed: int = 0) -> Source:
    """Build a preset's model with random weights, to measure speed.

    Raises:
        ExportError: there is no such preset.
    """
    if preset not in exportable_presets():
        raise ExportError(
            f"--random {preset}: there is no such preset; choose one of {', '.join(exportable_presets())}."
        )
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
        val=None,
        checkpoint=None,
        checkpoint_sha256="0" * 64,
        git_commit=git_commit(),
        epoch=0,
        warnings=("random weights: to measure speed, not to classify.",),
    )


def data_path(source: Source, path: Path | None) -> Path:
    """Return the path of the run's data set: `path`, else the path in training, else `data/`."""
    return path or (Path(source.run.data) if source.run.data else DATA_FOLDER)


def load_data(source: Source, path: Path | None) -> DataSet:
    """Load the data set of the run.

    Args:
        source: what is exported.
        path: of the data; None: the path in training, or CIFAR-100 in `data/`.

    Raises:
        ExportError: it is missing, or has other classes.
    """
    folder = data_path(source, path)
    reason = "golden images are validation images, so the run's data set is needed"
    if path is None and not folder.exists():
        raise ExportError(f"{folder}: does not exist; {reason}: name its folder by --data.")
    if source.run.data is None and cifar.find(folder) is None:
        raise ExportError(f"{folder}: holds no {cifar.FOLDER}; {reason}: name its folder by --data.")
    try:
        loaded = load_for(source.run, folder)
    except DataError as error:
        raise ExportError(f"{error} ({reason}.)") from error
    if loaded.labels != source.run.labels:
        raise ExportError(f"{folder}: has other classes than the run; name the run's own data by --data.")
    return loaded


def has_changed(source: Source, loaded: DataSet) -> bool:
    """Return whether the data or their split differ from the run's; False if unknown."""
    return source.run.pictures_sha256 not in (None, loaded.digest())
