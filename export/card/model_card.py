"""The model card: README.md of a version folder, written from metadata, report and the gate's result."""

from collections.abc import Mapping, Sequence

from export.card.error_analysis import failures
from export.card.markdown import bullet, code, literal, paragraph, picture, table
from export.card.training_record import making
from export.parity import Comparison, summary
from export.quantization.gate import describe
from export.quantization.variants import Variant
from export.source import Source
from service.engine.metadata import MODEL_FILES, ModelMetadata
from training.data.dataset import CIFAR100
from training.report_schema import CURVES, PLOTS

SPLIT_NAMES = {"val": "validation"}


def title(source: Source, metadata: ModelMetadata, operations: int) -> str:
    """Return the name, and what the model is in one sentence."""
    task = f"tells {len(metadata.labels)} classes of {literal(metadata.dataset)} apart"
    if source.checkpoint is None:
        task = "has random weights: for measurements of speed, not for answers"
    return (
        f"# {literal(metadata.name)}\n\n"
        f"A Perceiver (Jaegle et al. 2021) that {task}.\n"
        f"Preset `{metadata.preset}`, {metadata.parameters:,} parameters, {operations / 1e9:.3g} GFLOP a picture."
    )


def figures(source: Source) -> str:
    """Describe what was measured, before and after calibration; nothing for random weights."""
    report = source.report
    rows = [("validation, at the end of the epoch", source.metrics)]
    if report is not None:
        rows = [
            ("validation, before the temperature", report.val_uncalibrated),
            ("test, before the temperature", report.test_uncalibrated),
            ("**test, as served**", report.test),
            ("**validation, as served**", None if report.test else report.val),
        ]
    cells = [
        (name, f"{m.n:,}", f"{m.top1:.2%}", f"{m.top5:.2%}", f"{m.loss:.4f}", f"{m.ece:.4f}") for name, m in rows if m
    ]
    if not cells:
        return ""
    words = (
        f"Loss in nats; ECE: expected calibration error, 15 bins. Temperature {source.temperature:.4f}, in the graph."
    )
    if len(source.run.labels) <= 5:
        words += (
            f" Of {len(source.run.labels)} classes the right one is always among the first five: top-5 says nothing."
        )
    parts = ["## Figures", table(("pictures", "n", "top-1", "top-5", "loss", "ECE"), cells), words]
    captions = {CURVES: "learning curves", "reliability.png": PLOTS["reliability.png"]}
    parts += [picture(captions[path.name], path.name) for path in source.pictures if path.name in captions]
    return "\n\n".join(parts)


def data(source: Source, metadata: ModelMetadata, *, flattered: bool, copies: Mapping[str, int]) -> str:
    """Say what it was trained, chosen and tested on; nothing for random weights."""
    if source.checkpoint is None:
        return ""
    words = f"The pictures of {code(metadata.dataset)}"
    if metadata.dataset == CIFAR100:
        words = (
            "CIFAR-100 (Krizhevsky 2009), fine labels: photographs of 32 x 32 pixels found on the web, of 100 classes "
            "in 20 superclasses, as many of each. A tenth of its test pictures have near-duplicates among the training "
            "pictures (Barz and Denzler 2020), for every model that is measured on it"
        )
    report = source.report
    if report is not None and report.training_pictures is not None:
        words += f". {report.training_pictures:,} trained it, {report.val.n:,} others chose checkpoint and temperature"
        words += (
            f", {report.test.n:,} more were read once to test it" if report.test else ", and there were none to test it"
        )
    if copies:
        counts = " and ".join(f"{count:,} of {SPLIT_NAMES.get(name, name)}" for name, count in copies.items())
        words += f". Copies of training pictures, pixel for pixel, are among these: {counts}, which flatter the figures"
    words += f". {nothing_else(source, flattered=flattered)}"
    return f"## Data\n\n{paragraph(words)}"


def nothing_else(source: Source, *, flattered: bool) -> str:
    """Say whether other pictures had a part in it.

    Args:
        source: the run.
        flattered: whether pictures that validate now may have trained one of the runs that led to it.
    """
    mine = (source.run.dataset, source.run.labels)
    runs = [*(origin.run for origin in source.run.ancestry()), source.run]
    others = dict.fromkeys(code(run.dataset) for run in runs if (run.dataset, run.labels) != mine)
    words = "Nothing else was used: no other pictures, and no weights that others have trained."
    if others:
        began = "It began with weights" if all(run.teacher is None for run in runs) else "It goes back to models"
        words = f"{began} that had been trained on {' and '.join(others)}."
    if flattered:
        words += (
            " The data changed between its runs, or were divided otherwise: some of the pictures that chose checkpoint "
            "and temperature may have trained an earlier one, so that figures on them flatter."
        )
    return words


def contract(source: Source, metadata: ModelMetadata) -> str:
    """Describe input and output, and what becomes of a picture of another size."""
    height, width = metadata.input_size
    views = ""
    if source.run.model.test_time_flip:
        views = " They are the mean of those of the picture and of its mirror image."
    brought = {"center": "is cropped to its largest centred region of that shape", "none": "is stretched to that shape"}
    logits = (
        f"`logits`: float32 `[batch, {len(metadata.labels)}]`; their softmax is the probabilities.{views} The labels "
        "stand in the file's metadata."
    )
    return f"""## Input and output

- `images`: uint8 `[batch, {height}, {width}, 3]`, RGB, 0..255. Normalisation and resize are inside the graph.
{bullet(logits)}
- A picture that is not {width} x {height} {brought[metadata.resize.crop]}
  and resized ({metadata.resize.filter}, antialiased) by the service."""


def limits(source: Source, metadata: ModelMetadata) -> str:
    """Say what the model is not for; nothing for random weights, which are for no picture at all."""
    if source.checkpoint is None:
        return ""
    height, width = metadata.input_size
    sure = "the probabilities are calibrated on pictures like those it was trained on, and on no others."
    if source.report is None:  # nor was a temperature fitted
        sure = "the probabilities are not calibrated on any pictures, since the run has no report."
    lines = [
        f"It knows the {len(metadata.labels)} classes of {literal(metadata.dataset)} and nothing else. A picture of "
        f"anything else gets one of these labels too, and may get it with confidence: {sure}",
        f"It sees {width} x {height} pixels. What can't be told apart at that size, it can't tell apart.",
        "It names one class for the whole picture. It doesn't find where the object is, and doesn't count.",
        "It shows how a Perceiver is trained and served. Nobody has examined it for fairness or safety: let it decide "
        "nothing about people, and nothing that can hurt anyone.",
    ]
    if metadata.metrics is not None:
        share, split = f"{1 - metadata.metrics.top1:.1%}", metadata.metrics.split
        lines.insert(0, f"Its first answer is wrong for {share} of the {SPLIT_NAMES.get(split, split)} pictures.")
    return "## What it is not for\n\n" + "\n".join(map(bullet, lines))


def verification(operations: Sequence[tuple[str, int]], comparisons: Sequence[Comparison]) -> str:
    """Tell the gate's result and the operations of each form."""
    counts = ", ".join(f"{count / 1e9:.3g} {name}" for name, count in operations)
    rows = [(c.name, str(c.n), f"{c.max_abs_difference:.1e}", str(c.labels_differ)) for c in comparisons]
    return f"""## Verification

The file, run by the service's own engine, against torch in float32: {summary(comparisons)}.
GFLOP a picture: {counts}. Verify it again on any machine by `python -m export --verify FOLDER`.

{table(("pictures", "n", "largest difference", "labels differ"), rows)}"""


def faster_files(variants: Sequence[Variant]) -> str:
    """Describe the files beside model.onnx; nothing where there are none."""
    if not variants:
        return ""
    lines = []
    for variant in variants:
        gate = variant.metadata.gate
        result = "random weights: no gate" if gate is None else describe(gate)
        lines.append(
            bullet(f"`{MODEL_FILES[variant.precision]}`, {variant.precision}: {variant.description}; {result}.")
        )
    words = (
        "The service takes the fastest file for where it runs; its setting `--precision float32` takes `model.onnx`, "
        "whose labels are torch's. A variant's labels may differ from those by what stands here."
    )
    return "## Faster files\n\n" + paragraph(words) + "\n\n" + "\n".join(lines)


def write_card(
    source: Source,
    metadata: ModelMetadata,
    operations: Sequence[tuple[str, int]],
    comparisons: Sequence[Comparison],
    variants: Sequence[Variant],
    *,
    flattered: bool,
    copies: Mapping[str, int],
) -> str:
    """Write the card.

    Args:
        source: the run.
        metadata: as attached to the model.
        operations: operations a picture, by name of the form; the last is the one that serves.
        comparisons: result of the gate.
        variants: files beside the float32 one.
        flattered: whether pictures that validated it may have trained one of the runs that led to it.
        copies: validation and test pictures that trained it as well, by split.
    """
    parts = [
        title(source, metadata, operations[-1][1]),
        figures(source),
        contract(source, metadata),
        data(source, metadata, flattered=flattered, copies=copies),
        limits(source, metadata),
        failures(source),
        making(source, metadata),
        verification(operations, comparisons),
        faster_files(variants),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"
