"""``metrics.jsonl`` of a run: a line of JSON for each epoch."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

FILE = "metrics.jsonl"
# What tells of the machine and not of the model: no curve is drawn of it.
MACHINE_FIELDS = ("device", "processes", "threads")

MetricsEntry = dict[str, Any]


def read_metrics(folder: Path) -> list[MetricsEntry]:
    """The epochs of a run; one that a killed run left unfinished is not among them.

    Raises:
        ValueError: a line is damaged; a sentence for the user.
    """
    path = folder / FILE
    if not path.exists():
        return []
    lines = []
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), 1):
        if not line.endswith(b"\n"):
            continue
        try:
            lines.append(json.loads(line))
        except ValueError as error:  # UnicodeDecodeError is one
            raise ValueError(
                f"{path}: line {number} is damaged ({error}); take it out, or restore the file."
            ) from error
    return lines


def append_metrics(folder: Path, line: MetricsEntry) -> None:
    """Add an epoch."""
    with (folder / FILE).open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def truncate_after(folder: Path, epoch: int) -> None:
    """Drop epochs that were written after the checkpoint, by a run killed between the two."""
    write_metrics(folder, [line for line in read_metrics(folder) if line["epoch"] <= epoch])


def write_metrics(folder: Path, lines: Iterable[MetricsEntry]) -> None:
    """Write these epochs in place of all, where those are others."""
    text = "".join(json.dumps(line) + "\n" for line in lines)
    path, partial = folder / FILE, folder / f"{FILE}.partial"
    if path.exists() and path.read_text(encoding="utf-8") == text:
        return
    # Under another name first: where the disk is full, the epochs that there are stay.
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
