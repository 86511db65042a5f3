"""The model card: README.md of a version folder, written from metadata, report and the gate's result."""

import textwrap
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel

from export.source import Source
from export.verify import Comparison, summary
from service.artifact import ModelMetadata
from training.config import PRESETS

CIFAR100 = "cifar100"  # the data set that is downloaded where none is named
SPLIT_NAMES = {"val": "validation"}


def non_defaults(config: BaseModel) -> dict[str, Any]:
    """Return the fields of a configuration that are not at their default."""
    fields = type(config).model_fields
    return {name: value for name, value in config if value != fields[name].default}


def changed_fields(config: BaseModel, base: BaseModel) -> dict[str, Any]:
    """Return the fields of a configuration that differ from another."""
    return {name: value for name, value in config if value != getattr(base, name)}


def training_command(source: Source) -> str:
    """Return the command that trains the model again: the preset and every flag that differs from it."""
    run = source.run
    words = ["python -m training", f"--preset {run.preset}"]
    if run.data and run.dataset != CIFAR100:
        words.append("--data DATA")  # where it was on the trainer's machine is nobody else's matter
    preset = PRESETS.get(run.preset)
    changes = (changed_fields(run.model, preset.model) | changed_fields(run.train, preset.train)) if preset else {}
    changes.pop("num_classes", None)  # the data decide it
    for name, value in changes.items():
        flag = name.replace("_", "-")
        words.append(f"--{'' if value else 'no-'}{flag}" if isinstance(value, bool) else f"--{flag} {value}")
    return " ".join(words)


def duration(seconds: float) -> str:
    """Return "1 h 23 min", "23 min" or "45 s"."""
    minutes = round(seconds / 60)
    if minutes < 2:
        return f"{seconds:.0f} s"
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def bullet(text: str) -> str:
    """Return an item of a Markdown list, wrapped."""
    return textwrap.fill(
        text, 116, initial_indent="- ", subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
    )


def title(source: Source, metadata: ModelMetadata, operations: int) -> str:
    """Return the name, and what the model is in one sentence."""
    task = f"tells {len(metadata.labels)} classes of {metadata.dataset} apart"
    if source.checkpoint is None:
        task = "has random weights: for measurements of speed, not for answers"
    return (
        f"# {metadata.name}\n\n"
        f"A Perceiver (Jaegle et al. 2021) that {task}.\n"
        f"Preset `{metadata.preset}`, {metadata.parameters:,} parameters, {operations / 1e9:.3g} GFLOP a picture."
    )


def figures(source: Source) -> str:
    """Describe what was measured, before and after calibration; nothing for random weights."""
    report = source.report
    rows = [("validation, at the end of the epoch", source.metrics)]
    if report is not None:
        rows = [
            ("validation, before the temperature", report.val),
            ("test, before the temperature", report.test_uncalibrated),
            ("**test, as served**", report.test),
        ]
    cells = [
        (name, f"{m.n:,}", f"{m.top1:.2%}", f"{m.top5:.2%}", f"{m.loss:.4f}", f"{m.ece:.4f}") for name, m in rows if m
    ]
    if not cells:
        return ""
    words = (
        f"Loss in nats; ECE: expected calibration error, 15 bins. Temperature {source.temperature:.4f}, in the graph."
    )
    curves = "\n\n![learning curves](curves.png)" if source.curves else ""
    return f"## Figures\n\n{table(('pictures', 'n', 'top-1', 'top-5', 'loss', 'ECE'), cells)}\n\n{words}{curves}"


def contract(metadata: ModelMetadata) -> str:
    """Describe input and output, and what becomes of a picture of another size."""
    height, width = metadata.input_size
    brought = {"center": "is cropped to its largest centred region of that shape", "none": "is stretched to that shape"}
    return f"""## Input and output

- `images`: uint8 `[batch, {height}, {width}, 3]`, RGB, 0..255. Normalisation and resize are inside the graph.
- `logits`: float32 `[batch, {len(metadata.labels)}]`; their softmax is the probabilities. The labels stand in the
  file's metadata.
- A picture that is not {width} x {height} {brought[metadata.resize.crop]}
  and resized ({metadata.resize.filter}, antialiased) by the service."""


def limits(source: Source, metadata: ModelMetadata) -> str:
    """Say what the model is not for; nothing for random weights, which are for no picture at all."""
    if source.checkpoint is None:
        return ""
    height, width = metadata.input_size
    lines = [
        f"It knows the {len(metadata.labels)} classes of {metadata.dataset} and nothing else. A picture of anything "
        "else gets one of these labels too, and may get it with confidence: the probabilities are calibrated on "
        "pictures like those it was trained on, and on no others.",
        f"It sees {width} x {height} pixels. What can't be told apart at that size, it can't tell apart.",
        "It names one class for the whole picture. It doesn't find where the object is, and doesn't count.",
        "It shows how a Perceiver is trained and served. Nobody has examined it for fairness or safety: let it decide "
        "nothing about people, and nothing that can hurt anyone.",
    ]
    if metadata.metrics is not None:
        share, split = f"{1 - metadata.metrics.top1:.1%}", metadata.metrics.split
        lines.insert(0, f"Its first answer is wrong for {share} of the {SPLIT_NAMES.get(split, split)} pictures.")
    return "## What it is not for\n\n" + "\n".join(map(bullet, lines))


def making(source: Source, metadata: ModelMetadata) -> str:
    """Say where the weights come from and what it takes to make them again."""
    command = f"python -m export --random {metadata.preset}"
    words = "Random weights:"
    if source.checkpoint is not None:
        command = training_command(source)
        took = f", in {duration(source.training_seconds)} of training" if source.training_seconds else ""
        words = f"The weights of epoch {source.epoch}{took}. Train it again by:"
    settings = [
        bullet(f"{name}: {', '.join(f'{key} {value}' for key, value in non_defaults(config).items())}.")
        for name, config in (("Model", source.run.model), ("Recipe", source.run.train))
    ]
    versions = ", ".join(f"{name} {version}" for name, version in metadata.provenance.versions.items())
    return "\n".join(
        [
            f"## How it was made\n\n{words}\n\n    {command}\n",
            *settings,
            f"- Trained by the source tree of commit `{source.git_commit or 'unknown'}`.",
            f"- Checkpoint's SHA-256: `{metadata.provenance.checkpoint_sha256}`.",
            f"- Exported {metadata.provenance.created} with {versions}.",
        ]
    )


def verification(operations: Sequence[tuple[str, int]], comparisons: Sequence[Comparison]) -> str:
    """Tell the gate's result and the operations of each form."""
    counts = ", ".join(f"{count / 1e9:.3g} {name}" for name, count in operations)
    rows = [(c.name, str(c.n), f"{c.max_abs_difference:.1e}", str(c.labels_differ)) for c in comparisons]
    return f"""## Verification

The file, run by the service's own engine, against torch in float32: {summary(comparisons)}.
GFLOP a picture: {counts}. Verify it again on any machine by `python -m export --verify FOLDER`.

{table(("pictures", "n", "largest difference", "labels differ"), rows)}"""


def write_card(
    source: Source,
    metadata: ModelMetadata,
    operations: Sequence[tuple[str, int]],
    comparisons: Sequence[Comparison],
) -> str:
    """Write the card.

    Args:
        source: the run.
        metadata: as attached to the model.
        operations: operations a picture, by name of the form; the last is the one that serves.
        comparisons: result of the gate.
    """
    parts = [
        title(source, metadata, operations[-1][1]),
        figures(source),
        contract(metadata),
        limits(source, metadata),
        making(source, metadata),
        verification(operations, comparisons),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"
