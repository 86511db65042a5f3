"""The model folder's layout: what export writes and the service reads. See docs/models.md.

    <folder>/<version>/model.onnx     the graph, with the metadata in its metadata_props
    <folder>/<version>/golden.npz     real images, and the logits and features that torch gave for them in float32
    <folder>/config.pbtxt             the same for Triton, beside the versions

Shape letters: K golden images, H and W the input size in pixels, C classes.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from service.engine.metadata import ArtifactError

GOLDEN_FILE: Final = "golden.npz"
CHECKPOINT_FILE: Final = "checkpoint.safetensors"  # what was exported; the service does not read it
OPTIONAL: Final = ("features", "unfamiliarity")  # arrays of the golden images that some graphs have
MAX_DIGITS: Final = 18  # of a version's number: it has to fit into 64 bits


@dataclass(frozen=True)
class Golden:
    """Images with known logits.

    Attributes:
        images: uint8 [K, H, W, 3], RGB.
        labels: int64 [K], the true classes.
        logits: float32 [K, C], from torch in float32.
        features: float32 [K, D], from torch in float32; None where the graph has no such output.
        unfamiliarity: float32 [K], of these features; None where the graph has no such output.
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    logits: NDArray[np.float32]
    features: NDArray[np.float32] | None = None
    unfamiliarity: NDArray[np.float32] | None = None

    def __post_init__(self) -> None:
        kinds = {"images": ("uint8", 4), "labels": ("int64", 1), "logits": ("float32", 2)}
        kinds |= {"features": ("float32", 2), "unfamiliarity": ("float32", 1)}
        for name, (dtype, ndim) in kinds.items():
            array = getattr(self, name)
            if array is None:
                continue
            if array.dtype != dtype or array.ndim != ndim:
                raise ArtifactError(
                    f"golden images: {name} must be {dtype} with {ndim} dimensions, "
                    f"and is {array.dtype} of shape {list(array.shape)}"
                )
        counts = {len(self.images), len(self.labels), len(self.logits)}
        if len(counts) != 1 or 0 in counts:
            raise ArtifactError(
                f"golden images: images, labels and logits must be equally many, and at least one each, "
                f"and are {len(self.images)}, {len(self.labels)} and {len(self.logits)}"
            )
        for name in OPTIONAL:
            array = getattr(self, name)
            if array is not None and not (len(array) == len(self) and np.isfinite(array).all()):
                raise ArtifactError(f"golden images: {name} must be as many as images, and finite")
        if self.images.shape[3] != 3 or not np.isfinite(self.logits).all():
            raise ArtifactError("golden images: images must have 3 channels and all logits must be finite")

    def __len__(self) -> int:
        return len(self.images)


def check_files(folder: Path) -> None:
    """Refuse a version folder with a named pipe, a socket or a device, of which a read may never end.

    Links are followed, as those of a Kubernetes ConfigMap.

    Raises:
        ArtifactError: an entry is neither a file nor a folder.
    """
    for entry in sorted(folder.iterdir()):
        if entry.exists() and not (entry.is_file() or entry.is_dir()):
            raise ArtifactError(f"{entry}: must be a regular file, and is none (a pipe, a socket or a device)")


def save_golden(path: Path, golden: Golden) -> None:
    """Write `golden.npz`, compressed."""
    arrays: dict[str, Any] = {"images": golden.images, "labels": golden.labels, "logits": golden.logits}
    arrays |= {name: array for name in OPTIONAL if (array := getattr(golden, name)) is not None}
    np.savez_compressed(path, **arrays)


def load_golden(path: Path) -> Golden:
    """Read `golden.npz`; nothing in it is ever unpickled.

    Raises:
        ArtifactError: the file is missing, is no npz archive, or holds other arrays than the contract says.
    """
    try:
        with path.open("rb") as stream:  # np.load leaves the file open if it is no archive
            archive = np.load(stream, allow_pickle=False)
            arrays = {name: archive[name] for name in ("images", "labels", "logits")}
            arrays |= {name: archive.get(name) for name in OPTIONAL}
    except FileNotFoundError as error:
        raise ArtifactError(f"{path}: the file is missing; a version must hold its golden images") from error
    except Exception as error:  # numpy, zipfile and zlib raise a dozen kinds on damaged files
        raise ArtifactError(
            f"{path}: must be an npz archive of images, labels and logits, and can't be read as one: {error}"
        ) from error
    try:
        return Golden(**arrays)
    except ArtifactError as error:
        raise ArtifactError(f"{path}: {error}") from error


@dataclass(frozen=True, order=True)
class ModelVersion:
    """One version folder; ordered by number."""

    number: int
    path: Path


def list_versions(folder: Path) -> list[ModelVersion]:
    """List the versions in `folder`, ascending; [] if there is no such folder.

    A version is a folder whose name is a positive integer of at most 18 digits without leading zeros: "3", not "03"
    or ".3-tmp".
    """
    try:
        entries = list(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted(ModelVersion(int(e.name), e) for e in entries if _is_version_name(e.name) and e.is_dir())


def _is_version_name(name: str) -> bool:
    return name.isascii() and name.isdigit() and not name.startswith("0") and len(name) <= MAX_DIGITS
