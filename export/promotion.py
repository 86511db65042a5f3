"""What stands in a model folder before a version is written to it, and whether the version may come after that."""

import os
from contextlib import suppress
from pathlib import Path

from export.errors import ExportError
from export.source import Source
from service.engine.metadata import MODEL_FILE, MODEL_FILES, ArtifactError, ModelMetadata
from service.engine.onnx_engine import EngineError, read_metadata
from service.repository.folder import list_versions


def newest_metadata(folder: Path) -> ModelMetadata | None:
    """Return what the newest version that can be read says of itself, None where there is none."""
    for newest in reversed(list_versions(folder)):
        with suppress(ArtifactError, EngineError):
            return read_metadata(newest.path / MODEL_FILE)
    return None


def check_successor(out: Path, source: Source, *, other_classes: bool, even_if_worse: bool) -> None:
    """Refuse a model of other classes than the folder's newest version, or one that is right less often.

    A service that watches the folder would serve it seconds later, in that version's place.

    Args:
        out: the model folder.
        source: the model.
        other_classes: let other classes pass.
        even_if_worse: let a model pass that is right less often, or may be.

    Raises:
        ExportError: says how to do it all the same.
    """
    served = newest_metadata(out)
    if served is None:
        return
    if served.labels != source.run.labels:
        if other_classes:
            return
        raise ExportError(
            f"{out}: its newest version has not the classes of this model, which would be served in its place; "
            "name another --out, or say --other-classes."
        )
    theirs, mine = served.metrics, source.metrics
    if even_if_worse or theirs is None or served.dataset != source.run.dataset:
        return
    comparable = mine is not None and (theirs.split, theirs.n) == (mine.split, mine.n)
    if not comparable and source.report is None:
        raise ExportError(
            f"{out}: its newest version is right on {theirs.top1:.2%} of the {theirs.split} pictures, and of "
            "this model, which would be served in its place, nobody knows: its run has not ended with a report. Go on "
            "with it by `python -m training --resume`, name another --out, or say --even-if-worse."
        )
    if comparable and mine is not None and mine.top1 < theirs.top1:
        raise ExportError(
            f"{out}: its newest version is right on {theirs.top1:.2%} of the {theirs.split} pictures and this "
            f"model, which would be served in its place, on {mine.top1:.2%}; name another --out, or say "
            "--even-if-worse."
        )


def check_writable(out: Path) -> None:
    """Find out before the work, and not after it, that nothing can be written below `out`, or would not be served.

    Raises:
        ExportError: it can't.
    """
    if any((out / name).is_file() for name in MODEL_FILES.values()):
        raise ExportError(f"{out}: is one version of a model; name the folder of its versions, --out {out.parent}.")
    existing = next(path for path in (out, *out.resolve().parents) if path.exists())
    if not (existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)):
        raise ExportError(f"{out}: {existing} is no folder that can be written to; name another --out.")
