"""The card's section on how a model fails: superclasses, confusions, pictures out of distribution."""

from collections.abc import Sequence

from export.card.markdown import literal, paragraph, picture, table
from export.source import Source
from training.evaluate import Confidence, SuperclassMetrics
from training.report_schema import PLOTS


def failures(source: Source) -> str:
    """Tell where the model is wrong and where it is wrongly sure; nothing without a report."""
    report = source.report
    if report is None:
        return ""
    drawn = {path.name: picture(PLOTS[path.name], path.name) for path in source.pictures if path.name in PLOTS}
    parts = [
        "## How it fails",
        by_superclass(report.superclasses),
        confusions(source),
        drawn.get("confusion.png", ""),
        strangers(report.confidence),
        drawn.get("out_of_distribution.png", ""),
    ]
    return "\n\n".join(part for part in parts if part)


def by_superclass(superclasses: Sequence[SuperclassMetrics]) -> str:
    """Tell the figures of each superclass, the best first; nothing where there are none."""
    if not superclasses:
        return ""
    ranked = sorted(superclasses, key=lambda each: -each.top1)
    total = sum(each.n for each in ranked)
    share = sum(each.n * each.superclass_top1 for each in ranked) / total
    words = paragraph(
        f"By superclass, the best first. For {share:.1%} of the pictures the first answer is at least of the right "
        "superclass (the last column)."
    )
    rows = [(e.name, f"{e.n:,}", f"{e.top1:.1%}", f"{e.top5:.1%}", f"{e.superclass_top1:.1%}") for e in ranked]
    return f"{words}\n\n{table(('superclass', 'n', 'top-1', 'top-5', 'superclass top-1'), rows)}"


def confusions(source: Source) -> str:
    """Name the three pairs that are confused most."""
    pairs = source.report.most_confused[:3] if source.report else ()
    if not pairs:
        return ""
    named = [(literal(pair.true), literal(pair.predicted), pair.share) for pair in pairs]
    words = [
        f"{true} is taken for {predicted} ({share:.0%} of the {true} pictures)" for true, predicted, share in named
    ]
    return paragraph(f"Confused most: {'; '.join(words)}.")


def strangers(confidence: Sequence[Confidence]) -> str:
    """Tell how sure it is of pictures that it knows nothing of; nothing where the report is older than that."""
    if not confidence:
        return ""
    known, *strange = confidence
    count = sum(each.n for each in strange)
    mean = sum(each.n * each.mean for each in strange) / count
    words = paragraph(
        "It has no answer for what it does not know: it names one of its classes for noise, too. On "
        f"{count} pictures out of distribution (drawn from a seed; or validation pictures turned by 180 degrees, or a "
        f"ninth of them enlarged) the probability of its first answer is {mean:.1%} on average, against "
        f"{known.mean:.1%} on the {known.pictures}."
    )
    rows = [
        (e.pictures, f"{e.n:,}", f"{e.mean:.1%}", f"{e.above_half:.1%}", "" if e.top1 is None else f"{e.top1:.1%}")
        for e in confidence
    ]
    return f"{words}\n\n{table(('pictures', 'n', 'mean probability', 'above 50 %', 'top-1'), rows)}"
