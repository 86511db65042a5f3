"""Promotion: whether a new version may follow the newest one of a model folder."""

import os
from contextlib import suppress
from pathlib import Path

from export.errors import ExportError
from export.source import Source
from service.engine.metadata import MODEL_FILE, MODEL_FILES, ArtifactError, ModelMetadata
from service.engine.session import EngineError, read_metadata
from service.repository.folder import list_versions


def newest_metadata(folder: Path) -> ModelMetadata | None:
    """Return the metadata of the newest readable version; None where there is none."""
    for newest in reversed(list_versions(folder)):
        with suppress(ArtifactError, EngineError):
            return read_metadata(newest.path / MODEL_FILE)
    return None


def check_promotion(out: Path, source: Source, *, other_classes: bool, even_if_worse: bool) -> None:
    """Refuse a model with other classes than the folder's newest version, or with a lower top-1 on the same images.

    A service that watches the folder would replace that version within seconds.

    Args:
        out: the model folder.
        source: the model.
        other_classes: allow other classes.
        even_if_worse: allow a lower top-1, or an unknown one.

    Raises:
        ExportError: says how to allow it.
    """
    newest = newest_metadata(out)
    if newest is None:
        return
    if newest.labels != source.run.labels:
        if other_classes:
            return
        raise ExportError(
            f"{out}: its newest version has other classes than this model, which would be served in its place; "
            "name another --out, or pass --other-classes."
        )
    served, own = newest.metrics, source.metrics
    if even_if_worse or served is None or newest.dataset != source.run.dataset:
        return
    comparable = own is not None and (served.split, served.n) == (own.split, own.n)
    if not comparable and source.report is None:
        raise ExportError(
            f"{out}: its newest version has a top-1 of {served.top1:.2%} on {served.split} images. That of this model, "
            "which would be served in its place, is unknown: its run has not ended with a report. Continue the run by "
            "`python -m training --resume`, name another --out, or pass --even-if-worse."
        )
    if comparable and own is not None and own.top1 < served.top1:
        raise ExportError(
            f"{out}: its newest version has a top-1 of {served.top1:.2%} on {served.split} images and this model, "
            f"which would be served in its place, of {own.top1:.2%}; name another --out, or pass --even-if-worse."
        )


def check_out(out: Path) -> None:
    """Check before the work that a version can be written below `out`, and would be served.

    Raises:
        ExportError: it can't.
    """
    if any((out / name).is_file() for name in MODEL_FILES.values()):
        raise ExportError(f"{out}: is one version of a model; name the folder of its versions, --out {out.parent}.")
    existing = next(path for path in (out, *out.resolve().parents) if path.exists())
    if not (existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)):
        raise ExportError(f"{out}: {existing} is not a writable folder; name another --out.")
