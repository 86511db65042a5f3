"""``report.json``: what was measured of a run's best checkpoint. Written by `training.report`, read by the exporter."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from training.evaluate import Confidence, ConfusedPair, Metrics, SuperclassMetrics

FILE = "report.json"
# What is drawn of a run, and what each image shows; all but the curves belong to the report.
CURVES = "curves.png"
PLOTS = {
    "confusion.png": "the pairs of classes that are confused most",
    "reliability.png": "reliability before and after temperature scaling",
    "out_of_distribution.png": "answers to images of nothing that it knows",
}


class Report(BaseModel):
    """The figures of one checkpoint.

    ``val`` and ``test`` are at the temperature, what is called uncalibrated at temperature 1. Superclasses, confusions
    and confidence are of the test images, or of the validation images where there are no test images.
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
    most_confused: tuple[ConfusedPair, ...]
    superclasses: tuple[SuperclassMetrics, ...] = Field(default=(), description="none where the data set has none")
    confidence: tuple[Confidence, ...] = Field(
        default=(), description="of calibrated probabilities: first on the split itself, then out of distribution"
    )
