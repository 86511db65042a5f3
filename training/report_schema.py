"""``report.json``: what was measured of a run's best checkpoint. Written by `training.report`, read by the exporter."""

from __future__ import annotations

import json
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from training.evaluate import Confidence, ConfusedPair, Corruption, Metrics, SuperclassMetrics

FILE = "report.json"
METRICS_FILE = "metrics.json"  # of an exported version, with the report in it
# What is drawn of a run, and what each image shows; all but the curves belong to the report.
CURVES = "curves.png"
PLOTS = {
    "confusion.png": "the pairs of classes that are confused most",
    "reliability.png": "reliability before and after temperature scaling",
    "out_of_distribution.png": "answers to images of nothing that it knows",
}


class Report(BaseModel):
    """The figures of one checkpoint.

    ``val`` and ``test`` are at the temperature, what is called uncalibrated at temperature 1. All others are of the
    test images, or of the validation images where there are no test images.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    preset: str
    dataset: str
    parameters: int
    training_pictures: int | None = None
    epoch: int = Field(description="the checkpoint's")
    temperature: float = Field(gt=0, description="fitted to the validation images; logits are divided by it")
    checkpoint_sha256: str
    note: str = Field(description="what to think of the figures")
    val: Metrics
    val_uncalibrated: Metrics
    test: Metrics | None = None
    test_uncalibrated: Metrics | None = None
    test_readings: int | None = Field(None, description="how often this run has read the test images")
    lineage_test_readings: int | None = Field(
        None, description="how often this run and those that led to it have, as far as they tell"
    )
    distinct: Metrics | None = Field(None, description="of those images that are no near-duplicate of a training image")
    most_confused: tuple[ConfusedPair, ...]
    seen: dict[str, int] | None = Field(
        None,
        description="images of each split that this run or one that led to it was trained on, as far as they tell; "
        "splits without any are left out",
    )
    superclasses: tuple[SuperclassMetrics, ...] = Field(default=(), description="none where the data set has none")
    corruptions: tuple[Corruption, ...] = Field(
        default=(), description="figures on some of the images: first as they are, then corrupted"
    )
    confidence: tuple[Confidence, ...] = Field(
        default=(), description="of calibrated probabilities: first on the split itself, then out of distribution"
    )


def read_report(folder: Path) -> Report | None:
    """The report of the run in a folder, or of the one that was exported to it; None where there is none to read."""
    try:
        if (folder / FILE).is_file():
            return Report.model_validate_json((folder / FILE).read_bytes())
        return Report.model_validate(json.loads((folder / METRICS_FILE).read_bytes())["report"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def read_test_readings(folder: Path) -> int | None:
    """How often the run in a folder, or the one that was exported to it, has read its test images.

    Returns:
        None where the folder holds no report. One that does not tell is of one reading.
    """
    report = read_report(folder)
    if report is None:
        return None
    return 0 if report.test is None else report.test_readings or 1


def describe_readings(own: int, lineage: int) -> str:
    """How often the test images were read, in words.

    Args:
        own: by the run.
        lineage: by the run and those that led to it.
    """
    times = "once" if own == 1 else f"{own} times"
    return times if lineage == own else f"{times} by this run, {lineage} times with those that led to it"
