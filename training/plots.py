"""Figures of a run, drawn without a display: learning curves, confusions, reliability, images of another kind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from numpy.typing import ArrayLike, NDArray

from training.evaluate import ConfusedPair

# Okabe and Ito's palette, which colour-blind readers can tell apart.
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#8A8A8A"
_DPI = 130


def shorten(name: str, max_length: int) -> str:
    """Return a name on one line, without its middle where it has more than ``max_length`` characters."""
    name = " ".join(name.split())
    tail = max_length // 3
    return name if len(name) <= max_length else f"{name[: max_length - tail - 1]}…{name[-tail:]}"


def _style(axes: Axes, title: str, x_label: str, y_label: str) -> None:
    axes.set_title(title, loc="left", fontweight="bold", fontsize=11)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.grid(visible=True, color="#E4E4E4", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _line(axes: Axes, x: Sequence[float], y: Sequence[float], label: str, colour: str) -> None:
    # A run of one epoch has no line to see, only its point.
    axes.plot(x, y, label=label, color=colour, linewidth=1.8, marker="o", markersize=3 if len(x) <= 60 else 0)


def _draw_accuracy(axes: Axes, columns: Mapping[str, Sequence[float]], best_by: str) -> None:
    epochs, top1 = columns["epoch"], columns["val_top1"]
    highest = columns.get("val_top5", top1)
    if "val_top5" in columns:
        _line(axes, epochs, highest, "top-5", GREEN)
    _line(axes, epochs, top1, "top-1", BLUE)
    loss = columns["val_loss"]

    def rank(row: int) -> tuple[float, ...]:  # as `TrainState.is_best`
        return (-loss[row],) if best_by == "loss" else (top1[row], -loss[row])

    # Of stages the last one is kept, and others may have had other validation images.
    stages = columns.get("stage", [0] * len(top1))
    best = max((row for row in range(len(top1)) if stages[row] == stages[-1]), key=rank)
    whose = f" of stage {stages[best]}" if "stage" in columns else ""
    has_dips = stages[0] != stages[-1]  # where a stage begins
    axes.plot(epochs[best], top1[best], marker="o", markersize=9, markerfacecolor="none", color=ORANGE, linestyle="")
    axes.annotate(
        f"best{whose} by {best_by.replace('top1', 'top-1')}: {top1[best]:.1%}\nepoch {epochs[best]:g}",
        (epochs[best], top1[best]),
        xytext=(-6, (-60 if has_dips else -12) if top1[best] > 0.2 else 30),  # clear of curve and axis
        textcoords="offset points",
        ha="right",
        va="top",
        color=ORANGE,
    )
    axes.set_ylim(0, 1)
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    _style(axes, "Validation accuracy", "epoch", "share of the images")
    # Clear of both curves: those of a run that began with trained weights have nothing below them, those of stages
    # nothing below their end.
    of_one = "lower left" if highest[0] > 0.6 else "upper left"
    axes.legend(frameon=False, loc="lower right" if has_dips else of_one)


def save_curves(metrics: Sequence[Mapping[str, float]], path: Path, best_by: str) -> None:
    """Draw the rows of ``metrics.jsonl`` as ``path`` (PNG): loss, accuracy, learning rate, speed, each over epochs.

    Each row has epoch, train_loss, val_loss (nats), val_top1 (0..1), learning_rate, pictures_per_second, and val_top5
    (0..1) where that is to be drawn. Those of a recipe's run have the number of its stage, too.
    The epoch that ``best_by`` (of `TrainConfig`) chooses, of the last stage, is marked.

    Raises:
        ValueError: there is no row.
    """
    if not metrics:
        raise ValueError("there are no curves before the first epoch has ended")
    columns = {name: [row[name] for row in metrics] for name in metrics[0]}
    epochs = columns["epoch"]
    figure = Figure(figsize=(11, 7.5), dpi=_DPI, layout="constrained")
    (loss, accuracy), (rate, speed) = figure.subplots(2, 2)
    _line(loss, epochs, columns["train_loss"], "training objective, augmented images", GREY)
    _line(loss, epochs, columns["val_loss"], "validation, cross-entropy", BLUE)
    _style(loss, "Loss", "epoch", "nats an image")
    loss.legend(frameon=False, loc="best")
    _draw_accuracy(accuracy, columns, best_by)
    _line(rate, epochs, columns["learning_rate"], "learning rate", ORANGE)
    rate.set_ylim(0, 1.1 * max(columns["learning_rate"]) or 1)
    _style(rate, "Learning rate", "epoch", "learning rate at the epoch's end")
    _line(speed, epochs, columns["pictures_per_second"], "speed", GREEN)
    speed.set_ylim(0, 1.1 * max(columns["pictures_per_second"]) or 1)
    _style(speed, "Speed", "epoch", "training images a second")
    for axes in (loss, accuracy, rate, speed):
        axes.set_xlim(0, 1.03 * max(epochs))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if "stage" in columns:
            _mark_stages(axes, epochs, columns["stage"])
    figure.savefig(path)


def _mark_stages(axes: Axes, epochs: Sequence[float], stages: Sequence[float]) -> None:
    """Draw a line where each stage begins, with its number; one without epochs has none."""
    axes.set_xlabel("epoch; dotted: where a stage begins")
    first = dict(zip(reversed(stages), reversed(epochs), strict=True))
    for stage, epoch in first.items():
        axes.axvline(epoch - 0.5, color=GREY, linewidth=0.9, linestyle=":")
        axes.annotate(
            f"{stage:g}",
            (epoch - 0.5, 0),
            xycoords=("data", "axes fraction"),
            xytext=(2, 2),
            textcoords="offset points",
            fontsize=7,
            color=GREY,
        )


def save_confusion(pairs: Sequence[ConfusedPair], path: Path) -> None:
    """Draw the pairs (of `most_confused`) as horizontal bars, worst on top, into ``path`` (PNG)."""
    figure = Figure(figsize=(9, 1.4 + 0.3 * max(len(pairs), 3)), dpi=_DPI, layout="constrained")
    axes = figure.subplots()
    rows = range(len(pairs))
    bars = axes.barh(rows, [pair.share for pair in pairs], color=BLUE, height=0.7)
    axes.bar_label(bars, [f"{pair.share:.1%}  ({pair.count})" for pair in pairs], padding=4, color="#444444")
    # Names are text, whatever signs are in them: of two dollar signs matplotlib would make a formula.
    names = [(shorten(pair.true, 36), shorten(pair.predicted, 36)) for pair in pairs]
    axes.set_yticks(rows, [f"{true}  →  {predicted}" for true, predicted in names], parse_math=False)
    axes.set_ylim(len(pairs) - 0.4, -0.6)
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.xaxis.set_major_locator(MaxNLocator(steps=[1, 2, 5, 10]))
    axes.set_xlim(0, 1.15 * max((pair.share for pair in pairs), default=1))
    _style(axes, "Most confused: the class  →  what it was taken for", "share (and number) of the class's images", "")
    axes.grid(visible=False, axis="y")
    figure.savefig(path)


def save_reliability(before: ArrayLike, after: ArrayLike, path: Path) -> None:
    """Draw the reliability diagrams before and after temperature scaling into ``path`` (PNG), side by side.

    before, after: float64 [bins, 3], share of the images, mean confidence and accuracy in equal bins of confidence,
        zeros where a bin is empty, as `training.evaluate.calibration_bins` returns them.
    """
    figure = Figure(figsize=(11, 6.4), dpi=_DPI, layout="constrained")
    grid = figure.subplots(2, 2, sharex=True, sharey="row", height_ratios=(3, 1))
    for column, (name, bins) in enumerate((("before", before), ("after", after))):
        _draw_reliability(grid[0, column], grid[1, column], np.asarray(bins, dtype=np.float64), name)
    grid[0, 0].legend(frameon=False, loc="upper left")
    grid[0, 0].set_ylabel("accuracy")
    grid[1, 0].set_ylabel("share")
    figure.savefig(path)


def _draw_reliability(top: Axes, bottom: Axes, bins: NDArray[np.float64], name: str) -> None:
    """Draw accuracy against confidence, and below it where the confidences lie."""
    share, confidence, accuracy = bins.T
    edges = np.linspace(0, 1, len(share) + 1)
    width = edges[1] - edges[0]
    filled = share > 0
    error = float((share * np.abs(confidence - accuracy)).sum())
    top.bar(edges[:-1][filled], accuracy[filled], width, align="edge", color=BLUE, edgecolor="white", label="accuracy")
    top.plot(confidence[filled], accuracy[filled], color=ORANGE, marker="o", markersize=4, label="at mean confidence")
    top.plot([0, 1], [0, 1], color=GREY, linestyle="--", linewidth=1.2, label="perfectly calibrated")
    _style(top, f"Reliability {name} temperature scaling: ECE {error:.2%}", "", "")
    bottom.bar(edges[:-1], share, width, align="edge", color=GREY, edgecolor="white")
    _style(bottom, "Images", "confidence: probability of the most likely class", "")
    top.set_ylim(0, 1)
    for axis in (top.xaxis, top.yaxis, bottom.yaxis):
        axis.set_major_formatter(PercentFormatter(1, decimals=0))
    bottom.set_xlim(0, 1)


def save_answers(rows: Mapping[str, Sequence[tuple[NDArray[np.uint8], str]]], path: Path) -> None:
    """Draw images, each with what the model answers below it, a row of each kind, into ``path`` (PNG).

    rows: for each kind, images (uint8 [H, W, 3]) and the words below them.
    """
    columns = max(map(len, rows.values()))
    figure = Figure(figsize=(1.6 * columns + 1.2, 1.75 * len(rows)), dpi=_DPI, layout="constrained")
    grid = figure.subplots(len(rows), columns, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for line, (kind, answers) in zip(grid, rows.items(), strict=True):
        line[0].text(-0.12, 0.5, kind, transform=line[0].transAxes, ha="right", va="center", fontweight="bold")
        for axes, (image, words) in zip(line, answers, strict=False):
            axes.imshow(image, interpolation="nearest")
            axes.text(0.5, -0.06, words, transform=axes.transAxes, ha="center", va="top", fontsize=8, parse_math=False)
    figure.savefig(path)
