"""What a run tells: a line, curves and TensorBoard events each epoch, and at the end its report."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from training import checkpoint
from training.dataset import Split
from training.evaluate import calibration_bins, fit_temperature, measure, predict_logits
from training.model import count_parameters
from training.plots import most_confused, save_confusion, save_curves, save_reliability

Line = dict[str, float]

# What to think of a report's figures, by the split that they are of.
NOTES = {
    "test": "checkpoint and temperature were chosen by the validation pictures; the test pictures were read once",
    "val": "no test pictures: the validation figures flatter, since checkpoint and temperature were chosen by them",
}


def read_lines(folder: Path) -> list[Line]:
    """The epochs of ``metrics.jsonl``; one that a killed run left unfinished is not among them."""
    path = folder / "metrics.jsonl"
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def append_line(folder: Path, line: Line) -> None:
    """Add an epoch to ``metrics.jsonl``."""
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")


def forget_lines_after(folder: Path, epoch: int) -> None:
    """Drop epochs that were written after the checkpoint, by a run killed between the two."""
    kept = [line for line in read_lines(folder) if line["epoch"] <= epoch]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))


def announce(folder: Path, events: SummaryWriter) -> None:
    """Show the last epoch of ``metrics.jsonl`` on the terminal, in TensorBoard's events and in ``curves.png``."""
    lines = read_lines(folder)
    line = lines[-1]
    for key, value in line.items():
        if key not in ("epoch", "step"):
            events.add_scalar(key, value, int(line["epoch"]))
    events.flush()
    save_curves(lines, folder / "curves.png")
    tqdm.write(
        f"epoch {line['epoch']:3d}  train loss {line['train_loss']:.4f}  val loss {line['val_loss']:.4f}  "
        f"top-1 {line['val_top1']:.2%}  top-5 {line['val_top5']:.2%}  {line['pictures_per_second']:.0f} pictures/s"
    )
    sys.stdout.flush()  # for whoever reads along in a log file


def write_report(folder: Path, val: Split, test: Split | None, device: torch.device, batch_size: int) -> dict[str, Any]:
    """Measure ``best`` in float32 and write ``report.json``, ``confusion.png`` and ``reliability.png``.

    The temperature is fitted to the validation pictures; ``val`` and ``test`` are figures at that temperature, those
    called uncalibrated at temperature 1 (top-1 and top-5 are the same). The test pictures are read here, once.

    Args:
        folder: of the run.
        val: validation pictures.
        test: test pictures; None where the data has none, so that the validation figures have to do.
        device: to compute on.
        batch_size: pictures at once.

    Returns:
        What ``report.json`` holds.
    """
    path = folder / "best.safetensors"
    model, preprocess, header = checkpoint.load_model(path)
    model.to(device)
    preprocess.to(device)
    torch.set_float32_matmul_precision("highest")
    splits = {"val": val.to(device)} | ({} if test is None else {"test": test.to(device)})
    logits = {name: predict_logits(model, preprocess, split, batch_size) for name, split in splits.items()}
    temperature = fit_temperature(logits["val"], splits["val"].labels)
    shown = "val" if test is None else "test"
    result: dict[str, Any] = {
        "preset": header.run.preset,
        "dataset": header.run.dataset,
        "parameters": count_parameters(model),
        "epoch": header.epoch,
        "temperature": temperature,
        "checkpoint_sha256": checkpoint.digest(path),
        "note": NOTES[shown],
        "test": None,
        "test_uncalibrated": None,
    }
    for name, split in splits.items():
        result[name] = measure(logits[name] / temperature, split.labels, name).model_dump()
        result[f"{name}_uncalibrated"] = measure(logits[name], split.labels, name).model_dump()
    calibrated, targets = logits[shown] / temperature, splits[shown].labels
    result["most_confused"] = draw_mistakes(folder, calibrated, targets, header.run.labels)
    (folder / "report.json").write_text(json.dumps(result, indent=2) + "\n")
    return result


def draw_mistakes(
    folder: Path, logits: torch.Tensor, targets: torch.Tensor, labels: tuple[str, ...]
) -> list[dict[str, Any]]:
    """Draw the worst confusions and the reliability diagram; returns the confusions.

    Args:
        folder: of the run.
        logits: float32 [N, K].
        targets: int64 [N].
        labels: names of the K classes.
    """
    save_reliability(calibration_bins(logits, targets).cpu(), folder / "reliability.png")
    pairs = most_confused(targets.cpu(), logits.argmax(-1).cpu(), labels)
    save_confusion(pairs, folder / "confusion.png")
    return [vars(pair) for pair in pairs]
