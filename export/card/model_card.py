"""The model card, written from metadata, report and the gates' results."""

from collections.abc import Mapping, Sequence

from export.card.error_analysis import error_analysis
from export.card.markdown import bullet, code, image, literal, paragraph, table
from export.card.training_record import training_record
from export.exported import ExportedModel
from export.parity import Comparison, summary
from export.quantization.gate import describe
from export.quantization.variants import Variant
from export.source import Source, top5
from export.unfamiliarity import PASSING, Flagged
from service.engine.metadata import MODEL_FILES, ModelMetadata
from training.data.dataset import CIFAR100
from training.near_duplicates import CORRELATION
from training.report_schema import CURVES, PLOTS, describe_readings

SPLIT_NAMES = {"val": "validation"}


def title(source: Source, metadata: ModelMetadata, flops: int) -> str:
    """Return the name, and what the model is in one sentence."""
    task = f"classifies images into the {len(metadata.labels)} classes of {literal(metadata.dataset)}"
    if source.checkpoint is None:
        task = "has random weights: to measure speed, not to classify"
    return (
        f"# {literal(metadata.name)}\n\n"
        f"A Perceiver (Jaegle et al. 2021) that {task}.\n"
        f"Preset `{metadata.preset}`, {metadata.parameters:,} parameters, {flops / 1e9:.3g} GFLOP an image."
    )


def evaluation(source: Source) -> str:
    """Return the metrics before and after calibration; empty for random weights."""
    report = source.report
    rows = [("validation, at the end of the epoch", source.metrics)]
    if report is not None:
        rows = [
            ("validation, before the temperature", report.val_uncalibrated),
            ("test, before the temperature", report.test_uncalibrated),
            ("**test, as served**", report.test),
            ("**validation, as served**", None if report.test else report.val),
            ("of these, without near-duplicates of training images", report.distinct),
        ]
    cells = [
        (name, f"{m.n:,}", f"{m.top1:.2%}", *top5(source, f"{m.top5:.2%}"), f"{m.loss:.4f}", f"{m.ece:.4f}")
        for name, m in rows
        if m
    ]
    if not cells:
        return ""
    text = (
        f"Loss in nats; ECE: expected calibration error, 15 bins. Temperature {source.temperature:.4f}, in the graph."
    )
    if report is not None and report.distinct is not None:
        text += f" A near-duplicate has a correlation of {CORRELATION} or more with a training image."
    of_stages = f" of all {source.stages} stages" if source.stages else ""
    captions = {CURVES: f"learning curves{of_stages}", "reliability.png": PLOTS["reliability.png"]}
    plots = [image(captions[path.name], path.name) for path in source.plots if path.name in captions]
    head = ("images", "n", "top-1", *top5(source, "top-5"), "loss", "ECE")
    return "\n\n".join(["## Evaluation", table(head, cells), text, *plots])


def training_data(source: Source, metadata: ModelMetadata, *, leakage: bool, duplicates: Mapping[str, int]) -> str:
    """Return which images trained, validated and tested the model; empty for random weights.

    Leakage and duplicates as in `ExportedModel`.
    """
    if source.checkpoint is None:
        return ""
    text = f"The images of {code(metadata.dataset)}"
    if metadata.dataset == CIFAR100:
        text = (
            "CIFAR-100 (Krizhevsky 2009), fine labels: photographs of 32 x 32 pixels found on the web, in equal "
            "numbers of 100 classes in 20 superclasses. A tenth of its test images have near-duplicates among the "
            "training images (Barz and Denzler 2020), for every model that is measured on it"
        )
    report = source.report
    if report is not None and report.training_pictures is not None:
        tested = "there were none to test it"
        if report.test is not None:
            own = report.test_readings or 1
            readings = describe_readings(own, source.run.lineage_test_readings(own))
            tested = f"{report.test.n:,} more tested it, and were read {readings}"
        text += (
            f". {report.training_pictures:,} trained it, {report.val.n:,} others chose checkpoint and temperature, and "
            f"{tested}"
        )
    if duplicates:
        counts = " and ".join(f"{count:,} of {SPLIT_NAMES.get(name, name)}" for name, count in duplicates.items())
        text += f". Some images are exact copies of training images, which makes the metrics too good: {counts}"
    seen = report.seen if report is not None and report.seen else {}
    if earlier := {name: count for name, count in seen.items() if count > duplicates.get(name, 0)}:
        counts = " and ".join(f"{count:,} of {SPLIT_NAMES.get(name, name)}" for name, count in earlier.items())
        text += f". Some images trained an earlier run that led to it, which makes the metrics too good: {counts}"
    return f"## Training data\n\n{paragraph(f'{text}. {other_data(source, leakage=leakage)}')}"


def other_data(source: Source, *, leakage: bool) -> str:
    """Return which other data sets had a part in the weights, and whether validation images leaked."""
    own = (source.run.dataset, source.run.labels)
    runs = [*(origin.run for origin in source.run.ancestry()), source.run]
    others = dict.fromkeys(code(run.dataset) for run in runs if (run.dataset, run.labels) != own)
    text = "Nothing else was used: no other images, and no pretrained weights."
    if others:
        relation = (
            "Training started from weights" if not any(run.teachers for run in runs) else "It goes back to models"
        )
        text = f"{relation} trained on {' and '.join(others)}."
    if leakage:
        text += (
            " The data or their split changed between its runs: some of the images that chose checkpoint and "
            "temperature may have trained an earlier run, which makes the metrics on them too good."
        )
    return text


def input_output(source: Source, metadata: ModelMetadata) -> str:
    """Return the graph's input and output, and how images of other sizes are resized."""
    height, width = metadata.input_size
    views = ""
    if source.run.model.test_time_flip:
        views = " They are the mean over the image and its mirror image."
    crop = {"center": "is cropped to its largest centred region of that shape", "none": "is stretched to that shape"}
    logits = (
        f"`logits`: float32 `[batch, {len(metadata.labels)}]`; their softmax is the probabilities.{views} The file's "
        "metadata has the labels."
    )
    features = ""
    if metadata.feature_dim is not None:
        text = f"`features`: float32 `[batch, {metadata.feature_dim}]`; what the head classifies, where asked for."
        features = f"\n{bullet(text)}"
    if metadata.unfamiliarity is not None:
        features += f"\n{bullet('`unfamiliarity`: float32 `[batch]`; see below.')}"
    return f"""## Input and output

- `images`: uint8 `[batch, {height}, {width}, 3]`, RGB, 0..255. Normalisation and resize are inside the graph.
{bullet(logits)}{features}
- An image that is not {width} x {height} {crop[metadata.resize.crop]}
  and resized ({metadata.resize.filter}, antialiased) by the service."""


def unfamiliar_images(metadata: ModelMetadata, flagged: Sequence[Flagged]) -> str:
    """Return which images are flagged as unlike the training images; empty where the graph does not tell."""
    fit = metadata.unfamiliarity
    if fit is None:
        return ""
    text = (
        "The output `unfamiliarity` is the Mahalanobis distance of the features to the nearest class mean, under one "
        f"covariance for all classes (Lee et al. 2018), from {fit.training_images:,} training images. `/predict` says "
        f"`unfamiliar` above {fit.threshold:.4g}, so {PASSING:.0%} of the validation images are not flagged. The drawn "
        "images show nothing that has a class; photographs of other things are not measured here. An image that is "
        "not flagged may be of no class too."
    )
    rows = [(SPLIT_NAMES.get(fit.split, fit.split), f"{fit.n:,}", f"{fit.flagged:.1%}")]
    rows += [
        (each.images if each.images == "test" else f"drawn: {each.images}", f"{each.n:,}", f"{each.share:.1%}")
        for each in flagged
    ]
    return "\n\n".join(["## Unfamiliar images", table(("images", "n", "flagged"), rows), paragraph(text)])


def limitations(source: Source, metadata: ModelMetadata) -> str:
    """Return what the model is not for; empty for random weights."""
    if source.checkpoint is None:
        return ""
    height, width = metadata.input_size
    calibration = "probabilities are calibrated on images like those of its training, and on no others."
    if source.report is None:
        calibration = "probabilities are not calibrated, since the run has no report."
    lines = [
        f"It knows the {len(metadata.labels)} classes of {literal(metadata.dataset)} and nothing else. An image of "
        f"anything else gets one of these labels too, and may get it with confidence: {calibration}",
        f"It sees {width} x {height} pixels, and can't distinguish what looks the same at that size.",
        "It predicts one class for the whole image. It does not locate or count objects.",
        "It shows how a Perceiver is trained and served. Nobody has examined it for fairness or safety: do not let it "
        "decide anything about people, or anything that can hurt someone.",
    ]
    if metadata.metrics is not None:
        share, split = f"{1 - metadata.metrics.top1:.1%}", metadata.metrics.split
        lines.insert(0, f"Its predicted class is wrong for {share} of the {SPLIT_NAMES.get(split, split)} images.")
    return "## Limitations\n\n" + "\n".join(map(bullet, lines))


def verification(flops: Sequence[tuple[str, int]], comparisons: Sequence[Comparison]) -> str:
    """Return the result of the parity check and the operations of each form."""
    counts = ", ".join(f"{count / 1e9:.3g} {name}" for name, count in flops)
    rows = [(c.name, str(c.n), f"{c.max_abs_difference:.1e}", str(c.labels_differ)) for c in comparisons]
    return f"""## Verification

The file, run by the service's own engine, against torch in float32: {summary(comparisons)}.
GFLOP an image: {counts}. Verify it again on any machine by `python -m export --verify FOLDER`.

{table(("images", "n", "largest difference", "labels differ"), rows)}"""


def variant_files(variants: Sequence[Variant]) -> str:
    """Return the files beside model.onnx; empty where there are none."""
    if not variants:
        return ""
    lines = []
    for variant in variants:
        gate = variant.metadata.gate
        result = "random weights: no gate" if gate is None else describe(gate)
        file = MODEL_FILES[variant.precision]
        lines.append(bullet(f"`{file}`, {variant.precision}: {variant.description}; {result}."))
    text = (
        "The service takes the fastest file for its device; its setting `--precision float32` takes `model.onnx`, "
        "whose labels are torch's. A variant's labels may differ from those by the share given here."
    )
    return "## Variants\n\n" + paragraph(text) + "\n\n" + "\n".join(lines)


def write_card(source: Source, exported: ExportedModel) -> str:
    """Return the card as Markdown."""
    metadata, flops = exported.metadata, exported.flops
    parts = [
        title(source, metadata, flops[-1][1]),
        evaluation(source),
        input_output(source, metadata),
        training_data(source, metadata, leakage=exported.leakage, duplicates=exported.duplicates),
        unfamiliar_images(metadata, exported.flagged),
        limitations(source, metadata),
        error_analysis(source),
        training_record(source, metadata),
        verification(flops, exported.comparisons),
        variant_files(exported.variants),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"
