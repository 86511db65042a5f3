"""What a run tells: a line, curves and TensorBoard events each epoch, and at the end its report."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from training import checkpoint, report_schema, robustness, seen_images
from training.checkpoint import RunConfig
from training.data.dataset import Split
from training.evaluate import (
    Confidence,
    ConfusedPair,
    Corruption,
    Metrics,
    SuperclassMetrics,
    calibration_bins,
    fit_temperature,
    measure,
    measure_confidence,
    measure_superclasses,
    most_confused,
    predict_logits,
)
from training.metrics_log import MACHINE_FIELDS, MetricsEntry, read_metrics, write_metrics
from training.near_duplicates import near_duplicates
from training.network import count_parameters
from training.out_of_distribution import ALTERED, COUNT, out_of_distribution
from training.plots import save_answers, save_confusion, save_curves, save_reliability, shorten
from training.recipe_run import read_stages, recipe_run_of
from training.report_schema import Report, describe_readings, read_test_readings

SPLITS = {"test": "test images", "val": "validation images"}
IMAGES_PER_KIND = 6  # images of each kind

VAL_NOTE = "no test images: the validation figures flatter, since checkpoint and temperature were chosen by them"
TEST_NOTE = "checkpoint and temperature were chosen by the validation images; the test images chose nothing"


def log_epoch(folder: Path, events: SummaryWriter, run: RunConfig) -> None:
    """Show the last epoch of ``metrics.jsonl`` on the terminal, in TensorBoard's events and in ``curves.png``."""
    lines = read_metrics(folder)
    line = lines[-1]
    for key, value in line.items():
        if key not in ("epoch", "step", *MACHINE_FIELDS) and (key != "val_top5" or run.with_top5):
            events.add_scalar(key, value, int(line["epoch"]))
    events.flush()
    draw_curves(folder, lines, run)
    log_stages(folder, run)
    top5 = f"  top-5 {line['val_top5']:.2%}" if run.with_top5 else ""
    tqdm.write(
        f"epoch {line['epoch']:3d}  train loss {line['train_loss']:.4f}  val loss {line['val_loss']:.4f}  "
        f"top-1 {line['val_top1']:.2%}{top5}  {line['pictures_per_second']:.0f} images/s"
    )
    sys.stdout.flush()  # for whoever reads along in a log file


def log_stages(folder: Path, run: RunConfig) -> None:
    """Write ``metrics.jsonl`` and ``curves.png`` of the recipe's run that this run is a stage of, if it is one."""
    above = recipe_run_of(folder, run.stage)
    if above is None:
        return
    lines = read_stages(above)
    write_metrics(above, lines)
    if lines:  # a recipe may begin with a mean of weights
        draw_curves(above, lines, run)


def draw_curves(folder: Path, lines: Sequence[MetricsEntry], run: RunConfig) -> None:
    """Draw epochs as ``curves.png``, without a top-5 that says nothing of so few classes."""
    if not run.with_top5:
        lines = [{name: value for name, value in line.items() if name != "val_top5"} for line in lines]
    save_curves(lines, folder / report_schema.CURVES, run.train.best_by)


def write_report(
    folder: Path, train: Split, val: Split, test: Split | None, device: torch.device, batch_size: int
) -> Report:
    """Measure ``best`` in float32 and write ``report.json`` and its images (`training.report_schema.PLOTS`).

    The temperature is fitted to the validation images. The test images are read here, in one pass that all their
    figures come from but those of corrupted ones.

    Args:
        folder: of the run; an earlier report in it tells how often the test images have been read before.
        train: training images, which near-duplicates are looked for among.
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
        return predict_logits(model, preprocess, split, batch_size).cpu()

    logits = {"val": logits_of(val)} | ({} if test is None else {"test": logits_of(test)})
    labels = {"val": val.labels.cpu()} | ({} if test is None else {"test": test.labels.cpu()})
    temperature = fit_temperature(logits["val"], labels["val"])
    metrics = {name: measure(logits[name] / temperature, labels[name], name) for name in logits}
    uncalibrated = {f"{name}_uncalibrated": measure(logits[name], labels[name], name) for name in logits}
    shown = "val" if test is None else "test"
    split = val if test is None else test
    readings, lineage_readings = 0, 0
    if test is not None:
        readings = 1 + (read_test_readings(folder) or 0)
        lineage_readings = header.run.lineage_test_readings(readings)
    strange = report_out_of_distribution(folder, header.run.labels, val, lambda split: logits_of(split) / temperature)
    report = Report(
        preset=header.run.preset,
        dataset=header.run.dataset,
        parameters=count_parameters(model),
        training_pictures=len(train),
        epoch=header.epoch,
        temperature=temperature,
        checkpoint_sha256=checkpoint.digest(path),
        note=VAL_NOTE
        if test is None
        else f"{TEST_NOTE}, and were read {describe_readings(readings, lineage_readings)}",
        **metrics,
        **uncalibrated,
        test_readings=readings,
        lineage_test_readings=lineage_readings,
        distinct=report_distinct(split, train, logits[shown] / temperature, shown),
        corruptions=report_corruptions(split, logits[shown], logits_of),
        seen=report_seen(folder, {"val": val, "test": test}),
        most_confused=report_errors(folder, logits[shown], temperature, labels[shown], header.run.labels),
        superclasses=report_superclasses(logits[shown], labels[shown], header.run),
        confidence=(measure_confidence(logits[shown] / temperature, labels[shown], SPLITS[shown]), *strange),
    )
    partial = folder / f"{report_schema.FILE}.partial"
    partial.write_text(report.model_dump_json(indent=2) + "\n", encoding="utf-8")
    partial.replace(folder / report_schema.FILE)
    return report


def report_seen(folder: Path, splits: Mapping[str, Split | None]) -> dict[str, int]:
    """How many images of each split this run or one that led to it was trained on; without the splits without any."""
    digests = seen_images.read(folder)
    counts = {name: seen_images.count_seen(split.to("cpu"), digests) for name, split in splits.items() if split}
    return {name: count for name, count in counts.items() if count}


def report_distinct(split: Split, train: Split, logits: Tensor, name: str) -> Metrics | None:
    """The figures of those images that are no near-duplicate of a training image; None where all are.

    Args:
        split: N images.
        train: training images.
        logits: calibrated, float32 [N, K] on the CPU.
        name: of the split.
    """
    distinct = ~near_duplicates(split.images.to(train.images.device), train.images)
    return measure(logits[distinct], split.labels.cpu()[distinct], name) if distinct.any() else None


def report_corruptions(split: Split, logits: Tensor, answer: Callable[[Split], Tensor]) -> list[Corruption]:
    """The figures of an even choice of a split's images: as they are, then corrupted.

    Args:
        split: N images.
        logits: of these as they are, float32 [N, K] on the CPU.
        answer: logits, float32 [n, K] on the CPU.
    """
    chosen = even_choice(len(split), robustness.COUNT)
    images, labels = split.images.cpu()[chosen], split.labels.cpu()[chosen]
    answers = {"none": logits[chosen]}
    answers |= {name: answer(Split(changed, labels)) for name, changed in robustness.corrupted(images)}
    return [
        Corruption(name=name, n=len(chosen), top1=(answer.argmax(-1) == labels).double().mean().item())
        for name, answer in answers.items()
    ]


def even_choice(count: int, most: int) -> Tensor:
    """At most ``most`` indices below ``count``, evenly spaced, int64, ascending."""
    return torch.linspace(0, count - 1, min(most, count)).round().long()


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
    chosen = even_choice(len(val), COUNT)
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
