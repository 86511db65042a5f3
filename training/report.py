"""What a run tells: a line, curves and TensorBoard events each epoch, and at the end its report."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from training import checkpoint, report_schema
from training.checkpoint import RunConfig
from training.data.dataset import Split
from training.evaluate import (
    Confidence,
    ConfusedPair,
    SuperclassMetrics,
    calibration_bins,
    fit_temperature,
    measure,
    measure_confidence,
    measure_superclasses,
    most_confused,
    predict_logits,
)
from training.metrics_log import MACHINE_FIELDS, read_metrics
from training.model import count_parameters
from training.out_of_distribution import ALTERED, COUNT, out_of_distribution
from training.plots import save_answers, save_confusion, save_curves, save_reliability, shorten
from training.report_schema import Report

SPLITS = {"test": "test images", "val": "validation images"}
IMAGES_PER_KIND = 6  # images of each kind

# What to think of a report's figures, by the split that they are of.
NOTES = {
    "test": "checkpoint and temperature were chosen by the validation images; the test images were read once",
    "val": "no test images: the validation figures flatter, since checkpoint and temperature were chosen by them",
}


def log_epoch(folder: Path, events: SummaryWriter, best_by: str) -> None:
    """Show the last epoch of ``metrics.jsonl`` on the terminal, in TensorBoard's events and in ``curves.png``."""
    lines = read_metrics(folder)
    line = lines[-1]
    for key, value in line.items():
        if key not in ("epoch", "step", *MACHINE_FIELDS):
            events.add_scalar(key, value, int(line["epoch"]))
    events.flush()
    save_curves(lines, folder / report_schema.CURVES, best_by)
    tqdm.write(
        f"epoch {line['epoch']:3d}  train loss {line['train_loss']:.4f}  val loss {line['val_loss']:.4f}  "
        f"top-1 {line['val_top1']:.2%}  top-5 {line['val_top5']:.2%}  {line['pictures_per_second']:.0f} images/s"
    )
    sys.stdout.flush()  # for whoever reads along in a log file


def write_report(
    folder: Path, train: Split, val: Split, test: Split | None, device: torch.device, batch_size: int
) -> Report:
    """Measure ``best`` in float32 and write ``report.json`` and its images (`training.report_schema.PLOTS`).

    The temperature is fitted to the validation images. The test images are read here, in one pass that all their
    figures come from.

    Args:
        folder: of the run.
        train: training images, which are only counted.
        val: validation images.
        test: test images; None where the data has none, so that the validation figures have to do.
        device: to compute on.
        batch_size: images at once.
    """
    path = folder / "best.safetensors"
    model, preprocess, header = checkpoint.load_model(path)
    model.to(device)
    preprocess.to(device)
    torch.set_float32_matmul_precision("highest")

    def logits_of(split: Split) -> Tensor:
        return predict_logits(model, preprocess, split.to(device), batch_size).cpu()

    logits = {"val": logits_of(val)} | ({} if test is None else {"test": logits_of(test)})
    labels = {"val": val.labels.cpu()} | ({} if test is None else {"test": test.labels.cpu()})
    temperature = fit_temperature(logits["val"], labels["val"])
    metrics = {name: measure(logits[name] / temperature, labels[name], name) for name in logits}
    uncalibrated = {f"{name}_uncalibrated": measure(logits[name], labels[name], name) for name in logits}
    shown = "val" if test is None else "test"
    strange = report_out_of_distribution(folder, header.run.labels, val, lambda split: logits_of(split) / temperature)
    report = Report(
        preset=header.run.preset,
        dataset=header.run.dataset,
        parameters=count_parameters(model),
        training_pictures=len(train),
        epoch=header.epoch,
        temperature=temperature,
        checkpoint_sha256=checkpoint.digest(path),
        note=NOTES[shown],
        **metrics,
        **uncalibrated,
        most_confused=report_errors(folder, logits[shown], temperature, labels[shown], header.run.labels),
        superclasses=report_superclasses(logits[shown], labels[shown], header.run),
        confidence=(measure_confidence(logits[shown] / temperature, labels[shown], SPLITS[shown]), *strange),
    )
    partial = folder / f"{report_schema.FILE}.partial"
    partial.write_text(report.model_dump_json(indent=2) + "\n", encoding="utf-8")
    partial.replace(folder / report_schema.FILE)
    return report


def report_superclasses(logits: Tensor, labels: Tensor, run: RunConfig) -> tuple[SuperclassMetrics, ...]:
    """The figures of each superclass; none where the data set has no superclasses."""
    if run.superclasses is None or run.superclass_names is None:
        return ()
    return tuple(measure_superclasses(logits, labels, run.superclasses, run.superclass_names))


def report_errors(
    folder: Path, logits: Tensor, temperature: float, targets: Tensor, labels: Sequence[str]
) -> tuple[ConfusedPair, ...]:
    """Draw the worst confusions and the reliability diagrams; returns the confusions.

    Args:
        folder: of the run.
        logits: float32 [N, K].
        temperature: of the second diagram.
        targets: int64 [N].
        labels: names of the K classes.
    """
    before, after = (calibration_bins(scaled, targets) for scaled in (logits, logits / temperature))
    save_reliability(before, after, folder / "reliability.png")
    pairs = most_confused(targets, logits.argmax(-1), labels)
    save_confusion(pairs, folder / "confusion.png")
    return tuple(pairs)


def report_out_of_distribution(
    folder: Path, labels: Sequence[str], val: Split, answer: Callable[[Split], Tensor]
) -> list[Confidence]:
    """Ask about images out of distribution and draw some with the answers; returns how sure those were.

    Args:
        folder: of the run.
        labels: names of the K classes.
        val: validation images; an even choice of them is turned and cropped.
        answer: calibrated logits, float32 [N, K] on the CPU.
    """
    chosen = torch.linspace(0, len(val) - 1, min(COUNT, len(val))).round().long()
    result, rows = [], {}
    for kind, images in out_of_distribution(val.images.cpu()[chosen].numpy()).items():
        targets = val.labels.cpu()[chosen] if kind in ALTERED else torch.zeros(len(images), dtype=torch.int64)
        logits = answer(Split(torch.from_numpy(images), targets))
        result.append(measure_confidence(logits, targets if kind in ALTERED else None, kind))
        sure, first = logits.softmax(-1).max(-1)
        words = [f"{shorten(labels[i], 20)} {p:.0%}" for i, p in zip(first.tolist(), sure.tolist(), strict=True)]
        rows[kind] = list(zip(images, words, strict=True))[:IMAGES_PER_KIND]
    save_answers(rows, folder / "out_of_distribution.png")
    return result
