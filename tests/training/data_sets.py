"""Small data sets, fabricated: CIFAR-100 as Python 2 wrote it, and folders of images."""

from __future__ import annotations

import io
import pickle
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from training.data.dataset import DataSet, Split
from training.data.download import download


class Python2Pickler(pickle._Pickler):
    """Writes as Python 2 and its numpy wrote the official files: one kind of string, integers for booleans."""

    dispatch = pickle._Pickler.dispatch.copy()

    def save_string(self, obj: str | bytes) -> None:
        raw = obj.encode("latin1") if isinstance(obj, str) else obj
        self.write(pickle.BINSTRING + struct.pack("<i", len(raw)) + raw)
        self.memoize(obj)

    dispatch[bytes] = save_string
    dispatch[str] = save_string

    def save_bool(self, obj: bool) -> None:
        self.save_long(int(obj))

    dispatch[bool] = save_bool

    def save_global(self, obj: object, name: str | None = None) -> None:
        # Python 2 knew numpy before it was reorganised.
        module = obj.__module__.replace("numpy._core", "numpy.core")
        self.write(pickle.GLOBAL + f"{module}\n{name or obj.__qualname__}\n".encode())
        self.memoize(obj)

    dispatch[type] = save_global
    dispatch[type(len)] = save_global
    dispatch[type(download)] = save_global


def python2_pickle(content: object) -> bytes:
    file = io.BytesIO()
    Python2Pickler(file, protocol=2).dump(content)
    return file.getvalue()


def cifar_split(count: int, seed: int) -> dict[str, object]:
    """``count`` images of four classes, of which 0 and 2 are of superclass 1 and the others of superclass 0."""
    fine = [index % 4 for index in range(count)]
    return {
        "batch_label": "a batch",
        "fine_labels": fine,
        "coarse_labels": [1 - label % 2 for label in fine],
        "data": np.random.default_rng(seed).integers(0, 256, (count, 3072), dtype=np.uint8),
        "filenames": [f"image_{index}.png" for index in range(count)],
    }


META = {"fine_label_names": ["ant", "oak_tree", "bee", "elm"], "coarse_label_names": ["plants", "insects"]}
CONTENTS = {"meta": META, "train": cifar_split(20, 1), "test": cifar_split(6, 2)}


def write_cifar(folder: Path, dump: Callable[[object], bytes] = python2_pickle) -> Path:
    folder.mkdir(parents=True)
    for name, content in CONTENTS.items():
        (folder / name).write_bytes(dump(content))
    return folder


def write_image(path: Path, colour: tuple[int, int, int] = (10, 20, 30), size: tuple[int, int] = (8, 8)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


def write_folder(path: Path, counts: dict[str, int]) -> Path:
    """``counts[name]`` images of each class, each of a grey of its own."""
    for label, (name, count) in enumerate(counts.items()):
        for index in range(count):
            write_image(path / name / f"{index:03d}.png", (100 * label + index,) * 3)
    return path


def first_pixels(split: Split) -> list[int]:
    return split.images[:, 0, 0, 0].tolist()


def assert_same(one: DataSet, other: DataSet) -> None:
    assert one.labels == other.labels
    for a, b in zip((one.train, one.val, one.test), (other.train, other.val, other.test), strict=True):
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.labels, b.labels)
