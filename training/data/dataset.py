"""What every source of images becomes: uint8 tensors, labels, and their names.

Shape letters: N images, H rows, W columns.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from training.data.decoded import map_images

CIFAR100 = "cifar100"


class DataError(Exception):
    """The data cannot be used: one sentence with the path, what is wrong and what would be right."""


@dataclass(frozen=True)
class Split:
    """Images with their labels.

    images: uint8 [N, H, W, 3], RGB, 0..255.
    labels: int64 [N], indices into ``DataSet.labels``.
    file: the images are mapped from; None where they lie in memory.
    """

    images: torch.Tensor
    labels: torch.Tensor
    file: Path | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def __getstate__(self) -> dict[str, Any]:
        """What another process needs: it maps the same file."""
        return vars(self) | ({} if self.file is None else {"images": tuple(self.images.shape)})

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take what `__getstate__` gave."""
        file = state["file"]
        vars(self).update(state | ({} if file is None else {"images": map_images(file, state["images"])}))

    def to(self, device: torch.device | str) -> Split:
        """Return the same split on ``device``; images that are mapped from a file stay where they are."""
        images = self.images if self.file is not None else self.images.to(device)
        return Split(images, self.labels.to(device), self.file)

    def batches(self, size: int) -> Iterator[Split]:
        """The split in parts of at most ``size`` images, in order."""
        for images, labels in zip(self.images.split(size), self.labels.split(size), strict=True):
            yield Split(images, labels)

    def digest(self) -> str:
        """SHA-256 of all images and labels, in their order."""
        sha256 = hashlib.sha256(self.images.contiguous().numpy().data)
        sha256.update(self.labels.contiguous().numpy().data)
        return sha256.hexdigest()

    def digests(self) -> list[bytes]:
        """A digest of each image, whatever its label."""
        images = self.images.contiguous().numpy()
        return [hashlib.blake2b(image.data, digest_size=16).digest() for image in images]


@dataclass(frozen=True)
class DataSet:
    """Training, validation and test images of one size over one list of labels.

    name: short name, `CIFAR100` or that of the image folder.
    labels: class names; the position is the class index.
    test: None where the source has no test images.
    superclasses: index of the superclass of each class, None where the source has none.
    superclass_names: the superclasses' names, None where the source has none.
    class_folders: folders of which each folder is a class, or would be; none where the source is no image folder.
    has_val: whether the source itself tells the validation images from the training images.
    skipped_files: files there, and in the other splits, that were not taken for images.
    unreadable_files: images that were left out since they can't be read.
    """

    name: str
    labels: tuple[str, ...]
    train: Split
    val: Split
    test: Split | None
    superclasses: tuple[int, ...] | None = None
    superclass_names: tuple[str, ...] | None = None
    class_folders: tuple[Path, ...] = ()
    has_val: bool = False
    skipped_files: tuple[Path, ...] = ()
    unreadable_files: tuple[Path, ...] = ()

    def digest(self) -> str:
        """SHA-256 of what a run learns and chooses from: training and validation images and labels."""
        return hashlib.sha256((self.train.digest() + self.val.digest()).encode()).hexdigest()

    def copies(self) -> dict[str, int]:
        """How many images of "val" and of "test" are training images as well, pixel for pixel; none: left out."""
        trained = set(self.train.digests())
        others = {"val": self.val} | ({} if self.test is None else {"test": self.test})
        found = {name: sum(digest in trained for digest in split.digests()) for name, split in others.items()}
        return {name: count for name, count in found.items() if count}
