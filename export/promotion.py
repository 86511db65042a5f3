"""Promotion: whether a new version may follow the newest one of a model folder."""

import math
import os
from contextlib import suppress
from pathlib import Path

from export.errors import ExportError
from export.source import Source, read_report
from service.engine.metadata import MODEL_FILE, MODEL_FILES, ArtifactError, ModelMetadata
from service.engine.session import EngineError, read_metadata
from service.repository.folder import list_versions
from training.evaluate import Metrics


def newest_version(folder: Path) -> tuple[ModelMetadata, Metrics | None] | None:
    """Return metadata and validation metrics of the newest readable version; None where there is none."""
    for newest in reversed(list_versions(folder)):
        with suppress(ArtifactError, EngineError):
            metadata = read_metadata(newest.path / MODEL_FILE)
            report, _ = read_report(newest.path, metadata.provenance.checkpoint_sha256)
            val = Metrics(**metadata.metrics.model_dump()) if metadata.metrics else None
            return metadata, report.val if report else val if val is not None and val.split == "val" else None
    return None


def check_promotion(out: Path, source: Source, *, other_classes: bool, even_if_worse: bool) -> None:
    """Refuse a model with other classes than the folder's newest version, or with a lower top-1 on validation images.

    A service that watches the folder would replace that version within seconds. Test images choose nothing, so they
    do not choose this.

    Args:
        out: the model folder.
        source: the model.
        other_classes: allow other classes.
        even_if_worse: allow a lower top-1, or an unknown one.

    Raises:
        ExportError: says how to allow it.
    """
    found = newest_version(out)
    if found is None:
        return
    newest, served = found
    if newest.labels != source.run.labels:
        if other_classes:
            return
        raise ExportError(
            f"{out}: its newest version has other classes than this model, which would be served in its place; "
            "name another --out, or pass --other-classes."
        )
    own = source.val
    if even_if_worse or served is None or newest.dataset != source.run.dataset:
        return
    if own is None:
        raise ExportError(
            f"{out}: its newest version has a top-1 of {served.top1:.2%} on validation images. That of this model, "
            "which would be served in its place, is unknown: its checkpoint was written within an epoch. Name the "
            "run's best.safetensors, another --out, or pass --even-if-worse."
        )
    if is_worse(own, served):
        raise ExportError(
            f"{out}: its newest version has a top-1 of {served.top1:.2%} on validation images and this model, "
            f"which would be served in its place, of {own.top1:.2%}; name another --out, or pass --even-if-worse."
        )


def is_worse(own: Metrics, served: Metrics) -> bool:
    """Whether the top-1 is lower; on another number of images, by more than three standard errors of the difference."""
    error = 0.0 if own.n == served.n else math.sqrt(sum(each.top1 * (1 - each.top1) / each.n for each in (own, served)))
    return own.top1 < served.top1 - 3 * error


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
