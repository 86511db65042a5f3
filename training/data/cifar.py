"""CIFAR-100 in its official layout: three pickles of Python 2, read without running anything they may carry."""

from __future__ import annotations

import io
import pickle  # only the restricted Unpickler below is used
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from imaging.resize import resize_images
from training.data.dataset import CIFAR100, DataError, DataSet, Split

FOLDER = "cifar-100-python"
MEMBERS = ("meta", "test", "train")
SIDE = 32


def _dtype(spec: str | bytes, align: int = 0, copy: int = 0) -> np.dtype[Any]:
    """Build a dtype as pickles do; those of old numpy pass integers where new numpy wants booleans."""
    return np.dtype(spec, align=bool(align), copy=bool(copy))


def _encode(text: str, encoding: str) -> bytes:
    """Stand in for ``_codecs.encode``, with which Python 3 writes bytes into protocol 2."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"encoding {encoding!r} is not allowed")
    return text.encode("latin1")


# Taken from numpy's own answers, so that no private module is named here.
_ALLOWED = {
    ("multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
    ("multiarray", "scalar"): np.float64(0).__reduce__()[0],
    ("numeric", "_frombuffer"): np.empty(1).__reduce_ex__(5)[0],
}
_ALLOWED_GLOBALS: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): _dtype,
    ("_codecs", "encode"): _encode,
    **{(f"numpy.{core}.{module}", name): f for (module, name), f in _ALLOWED.items() for core in ("core", "_core")},
}


class _ArrayUnpickler(pickle.Unpickler):
    """Admits numpy arrays and plain containers; every other global is refused before it is imported."""

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        """Return the admitted object, or raise UnpicklingError."""
        try:
            return _ALLOWED_GLOBALS[module_name, global_name]
        except KeyError:
            raise pickle.UnpicklingError(f"{module_name}.{global_name} is not allowed") from None


def read_pickle(path: Path) -> dict[bytes, Any]:
    """Read a dictionary of arrays and plain containers with bytes keys.

    Raises DataError when the file is missing, damaged, names anything but arrays, or holds no dictionary.
    """
    try:
        content = _ArrayUnpickler(io.BytesIO(path.read_bytes()), encoding="bytes").load()
    except OSError as error:
        reason = error.strerror
        raise DataError(f"{path}: cannot be read ({reason}); the official file of that name must be there.") from error
    except Exception as error:  # a damaged pickle may raise anything, says the module's documentation
        raise DataError(
            f"{path}: is not the official CIFAR-100 file, or only a part of it ({error}); "
            "remove the folder and unpack the archive again."
        ) from error
    if not isinstance(content, Mapping):
        raise DataError(f"{path}: holds a {type(content).__name__} where the official file holds a dictionary.")
    return {key.encode() if isinstance(key, str) else key: value for key, value in content.items()}


def _names(path: Path, content: Mapping[bytes, Any], key: bytes) -> tuple[str, ...]:
    names = content.get(key)
    if not isinstance(names, list) or not names or not all(isinstance(name, bytes | str) for name in names):
        raise DataError(f"{path}: has no list of names under {key.decode()!r}, as the official file has.")
    return tuple(name.decode() if isinstance(name, bytes) else name for name in names)


def _class_indices(path: Path, content: Mapping[bytes, Any], key: bytes, count: int, classes: int) -> NDArray[np.int64]:
    """Return int64 [count] under ``key``, each within 0..classes-1."""
    values = content.get(key)
    values = list(values) if isinstance(values, list | np.ndarray) else []
    if len(values) != count or not all(isinstance(v, int | np.integer) and 0 <= v < classes for v in values):
        raise DataError(
            f"{path}: {key.decode()!r} must hold {count} numbers from 0 to {classes - 1}, one for each image."
        )
    return np.array(values, dtype=np.int64)


def _images(path: Path, content: Mapping[bytes, Any]) -> NDArray[np.uint8]:
    """Return uint8 [N, 32, 32, 3] from the file's rows of 3 x 32 x 32 values."""
    data = content.get(b"data")
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != 3 * SIDE * SIDE:
        raise DataError(f"{path}: 'data' must be an array of uint8 [N, {3 * SIDE * SIDE}], as in the official file.")
    if len(data) == 0:
        raise DataError(f"{path}: holds no image; the official file holds thousands.")
    return np.ascontiguousarray(data.reshape(-1, 3, SIDE, SIDE).transpose(0, 2, 3, 1))


def _superclasses(path: Path, fine: NDArray[np.int64], coarse: NDArray[np.int64], classes: int) -> tuple[int, ...]:
    """Return the superclass of each class, as the images' two labels tell it."""
    pairs = np.unique(np.stack([fine, coarse], axis=1), axis=0)
    if not np.array_equal(pairs[:, 0], np.arange(classes)):
        raise DataError(f"{path}: every one of the {classes} classes must have images, all of one superclass.")
    return tuple(int(index) for index in pairs[:, 1])


def find(path: Path) -> Path | None:
    """Return the folder of the official layout at ``path`` or directly below it, or None."""
    for folder in (path, path / FOLDER):
        if all((folder / member).is_file() for member in MEMBERS):
            return folder
    return None


def load(folder: Path, *, input_size: int, validation_fraction: float) -> DataSet:
    """Read CIFAR-100 with its fine labels; validation is the *last* part of the training images.

    Raises DataError when a file is missing, damaged or not what the official archive holds.
    """
    meta_path, train_path, test_path = (folder / name for name in ("meta", "train", "test"))
    meta = read_pickle(meta_path)
    labels, superclass_names = (_names(meta_path, meta, key) for key in (b"fine_label_names", b"coarse_label_names"))

    def read_split(path: Path) -> tuple[Split, Mapping[bytes, Any]]:
        content = read_pickle(path)
        images = resize_images(_images(path, content), input_size)
        indices = _class_indices(path, content, b"fine_labels", len(images), len(labels))
        return Split(torch.from_numpy(images), torch.from_numpy(indices)), content

    full, content = read_split(train_path)
    test, _ = read_split(test_path)
    coarse = _class_indices(train_path, content, b"coarse_labels", len(full), len(superclass_names))
    held_out = min(max(round(len(full) * validation_fraction), 1), len(full) - 1)
    first_held_out = len(full) - held_out
    return DataSet(
        name=CIFAR100,
        labels=labels,
        train=Split(full.images[:first_held_out], full.labels[:first_held_out]),
        val=Split(full.images[first_held_out:], full.labels[first_held_out:]),
        test=test,
        superclasses=_superclasses(train_path, full.labels.numpy(), coarse, len(labels)),
        superclass_names=superclass_names,
    )
