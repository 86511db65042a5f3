"""The card's section on the model's errors: superclasses, confusions, corruptions, images out of distribution."""

from collections.abc import Sequence

from export.card.markdown import image, literal, paragraph, table
from export.source import Source, top5
from training.evaluate import Confidence, Corruption, SuperclassMetrics
from training.report_schema import PLOTS


def error_analysis(source: Source) -> str:
    """Return the section; empty without a report."""
    report = source.report
    if report is None:
        return ""
    plots = {path.name: image(PLOTS[path.name], path.name) for path in source.plots if path.name in PLOTS}
    parts = [
        "## Error analysis",
        by_superclass(source, report.superclasses),
        confusions(source),
        plots.get("confusion.png", ""),
        robustness(report.corruptions),
        out_of_distribution(report.confidence),
        plots.get("out_of_distribution.png", ""),
    ]
    return "\n\n".join(part for part in parts if part)


def by_superclass(source: Source, superclasses: Sequence[SuperclassMetrics]) -> str:
    """Return the accuracy of each superclass, the best first; empty where there are none."""
    if not superclasses:
        return ""
    ranked = sorted(superclasses, key=lambda each: -each.top1)
    total = sum(each.n for each in ranked)
    share = sum(each.n * each.superclass_top1 for each in ranked) / total
    text = paragraph(
        f"By superclass, the best first. For {share:.1%} of the images the predicted class is at least of the right "
        "superclass (the last column)."
    )
    rows = [
        (e.name, f"{e.n:,}", f"{e.top1:.1%}", *top5(source, f"{e.top5:.1%}"), f"{e.superclass_top1:.1%}")
        for e in ranked
    ]
    return f"{text}\n\n{table(('superclass', 'n', 'top-1', *top5(source, 'top-5'), 'superclass top-1'), rows)}"


def confusions(source: Source) -> str:
    """Return the three most confused pairs of classes; empty where there are none."""
    pairs = source.report.most_confused[:3] if source.report else ()
    if not pairs:
        return ""
    named = [(literal(pair.true), literal(pair.predicted), pair.share) for pair in pairs]
    parts = [f"{true} as {predicted} ({share:.0%} of the {true} images)" for true, predicted, share in named]
    return paragraph(f"Confused most: {'; '.join(parts)}.")


def robustness(corruptions: Sequence[Corruption]) -> str:
    """Return the accuracy on corrupted images; empty where the report has none."""
    if not corruptions:
        return ""
    clean = corruptions[0]
    text = paragraph(f"On {clean.n:,} of the images, as they are and corrupted at the size that the model sees:")
    rows = [
        (e.name, f"{e.top1:.1%}", f"{100 * (e.top1 - clean.top1):+.1f}" if e is not clean else "") for e in corruptions
    ]
    return f"{text}\n\n{table(('corruption', 'top-1', 'points'), rows)}"


def out_of_distribution(confidence: Sequence[Confidence]) -> str:
    """Return the confidence on images out of distribution; empty where the report has none."""
    if not confidence:
        return ""
    known, *unknown = confidence
    count = sum(each.n for each in unknown)
    mean = sum(each.n * each.mean for each in unknown) / count
    text = paragraph(
        "The model can't reject an image: noise gets one of its labels, too. On "
        f"{count} images out of distribution (drawn from a seed; or validation images turned by 180 degrees, or a "
        f"ninth of them enlarged) the probability of the predicted class is {mean:.1%} on average, against "
        f"{known.mean:.1%} on the {known.pictures}."
    )
    rows = [
        (e.pictures, f"{e.n:,}", f"{e.mean:.1%}", f"{e.above_half:.1%}", "" if e.top1 is None else f"{e.top1:.1%}")
        for e in confidence
    ]
    return f"{text}\n\n{table(('images', 'n', 'mean probability', 'above 50 %', 'top-1'), rows)}"
