"""Figures of a run, drawn without a display: learning curves, the worst confusions, the reliability diagram."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from numpy.typing import ArrayLike

# Okabe and Ito's palette, which colour-blind readers can tell apart.
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#8A8A8A"
_DPI = 130


@dataclass(frozen=True)
class ConfusedPair:
    """Pictures of one class that were taken for another.

    count: pictures of ``true`` that were predicted as ``predicted``.
    share: ``count`` over all pictures of ``true``, 0..1.
    """

    true: str
    predicted: str
    count: int
    share: float


def most_confused(
    targets: ArrayLike, predictions: ArrayLike, labels: Sequence[str], limit: int = 20
) -> list[ConfusedPair]:
    """Return the at most ``limit`` ordered pairs of classes confused most often, worst first.

    targets, predictions: int64 [N], indices into ``labels``. Of pairs with equal shares the earlier classes come first.
    """
    matrix = np.zeros((len(labels), len(labels)), np.int64)
    np.add.at(matrix, (np.asarray(targets), np.asarray(predictions)), 1)
    share = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    np.fill_diagonal(share, 0)
    order = np.argsort(-share, axis=None, kind="stable")[:limit]
    pairs = zip(*np.unravel_index(order, share.shape), strict=True)
    return [
        ConfusedPair(labels[i], labels[j], int(matrix[i, j]), float(share[i, j])) for i, j in pairs if share[i, j] > 0
    ]


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


def _draw_accuracy(axes: Axes, epochs: Sequence[float], top1: Sequence[float], top5: Sequence[float]) -> None:
    _line(axes, epochs, top5, "top-5", GREEN)
    _line(axes, epochs, top1, "top-1", BLUE)
    best = int(np.argmax(top1))
    axes.plot(epochs[best], top1[best], marker="o", markersize=9, markerfacecolor="none", color=ORANGE, linestyle="")
    axes.annotate(
        f"best {top1[best]:.1%}\nepoch {epochs[best]:g}",
        (epochs[best], top1[best]),
        xytext=(-6, -12) if top1[best] > 0.2 else (-6, 30),  # clear of the axis
        textcoords="offset points",
        ha="right",
        va="top",
        color=ORANGE,
    )
    axes.set_ylim(0, 1)
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    _style(axes, "Validation accuracy", "epoch", "share of the pictures")
    axes.legend(frameon=False, loc="upper left")


def save_curves(metrics: Sequence[Mapping[str, float]], path: Path) -> None:
    """Draw the rows of ``metrics.jsonl`` as ``path`` (PNG): loss, accuracy, learning rate, speed, each over epochs.

    Each row has epoch, train_loss, val_loss (nats), val_top1, val_top5 (0..1), learning_rate, pictures_per_second.
    Raises ValueError without a row.
    """
    if not metrics:
        raise ValueError("there are no curves before the first epoch has ended")
    columns = {name: [row[name] for row in metrics] for name in metrics[0]}
    epochs = columns["epoch"]
    figure = Figure(figsize=(11, 7.5), dpi=_DPI, layout="constrained")
    (loss, accuracy), (rate, speed) = figure.subplots(2, 2)
    _line(loss, epochs, columns["train_loss"], "training (augmented, with dropout)", GREY)
    _line(loss, epochs, columns["val_loss"], "validation", BLUE)
    _style(loss, "Loss", "epoch", "cross-entropy, nats a picture")
    loss.legend(frameon=False, loc="best")
    _draw_accuracy(accuracy, epochs, columns["val_top1"], columns["val_top5"])
    _line(rate, epochs, columns["learning_rate"], "learning rate", ORANGE)
    rate.set_ylim(0, 1.1 * max(columns["learning_rate"]) or 1)
    _style(rate, "Learning rate", "epoch", "learning rate at the epoch's end")
    _line(speed, epochs, columns["pictures_per_second"], "speed", GREEN)
    speed.set_ylim(0, 1.1 * max(columns["pictures_per_second"]) or 1)
    _style(speed, "Speed", "epoch", "training pictures a second")
    for axes in (loss, accuracy, rate, speed):
        axes.set_xlim(0, 1.03 * max(epochs))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.savefig(path)


def save_confusion(pairs: Sequence[ConfusedPair], path: Path) -> None:
    """Draw the pairs (of `most_confused`) as horizontal bars, worst on top, into ``path`` (PNG)."""
    figure = Figure(figsize=(9, 1.4 + 0.3 * max(len(pairs), 3)), dpi=_DPI, layout="constrained")
    axes = figure.subplots()
    rows = range(len(pairs))
    bars = axes.barh(rows, [pair.share for pair in pairs], color=BLUE, height=0.7)
    axes.bar_label(bars, [f"{pair.share:.1%}  ({pair.count})" for pair in pairs], padding=4, color="#444444")
    axes.set_yticks(rows, [f"{pair.true}  →  {pair.predicted}" for pair in pairs])
    axes.set_ylim(len(pairs) - 0.4, -0.6)
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.xaxis.set_major_locator(MaxNLocator(steps=[1, 2, 5, 10]))
    axes.set_xlim(0, 1.15 * max((pair.share for pair in pairs), default=1))
    _style(axes, "Most confused: the class  →  what it was taken for", "share (and number) of the class's pictures", "")
    axes.grid(visible=False, axis="y")
    figure.savefig(path)


def save_reliability(bins: ArrayLike, path: Path) -> None:
    """Draw the reliability diagram into ``path`` (PNG): accuracy against confidence, and where the confidences lie.

    bins: float64 [bins, 3], share of the pictures, mean confidence and accuracy in equal bins of confidence, zeros
        where a bin is empty, as `training.evaluate.calibration_bins` returns them.
    """
    share, confidence, accuracy = np.asarray(bins, dtype=np.float64).T
    edges = np.linspace(0, 1, len(share) + 1)
    width = edges[1] - edges[0]
    filled = share > 0
    error = float((share * np.abs(confidence - accuracy)).sum())
    figure = Figure(figsize=(6.2, 7.2), dpi=_DPI, layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    top.bar(edges[:-1][filled], accuracy[filled], width, align="edge", color=BLUE, edgecolor="white", label="accuracy")
    top.plot(confidence[filled], accuracy[filled], color=ORANGE, marker="o", markersize=4, label="at mean confidence")
    top.plot([0, 1], [0, 1], color=GREY, linestyle="--", linewidth=1.2, label="perfectly calibrated")
    _style(top, f"Reliability: expected calibration error {error:.2%}", "", "accuracy")
    top.legend(frameon=False, loc="upper left")
    bottom.bar(edges[:-1], share, width, align="edge", color=GREY, edgecolor="white")
    _style(bottom, "Pictures", "confidence: probability of the most likely class", "share")
    top.set_ylim(0, 1)
    for axis in (top.xaxis, top.yaxis, bottom.yaxis):
        axis.set_major_formatter(PercentFormatter(1, decimals=0))
    bottom.set_xlim(0, 1)
    figure.savefig(path)
