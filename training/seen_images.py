"""Which images a model and those that led to it were trained on: a digest of each, in a small file beside a checkpoint.

A digest is of the pixels at the model's size, so that copies are found, and nothing that was resized in between.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from training.data.dataset import Split

FILE = "training_images.npy"

Digests = NDArray[np.uint64]


def digests_of(split: Split) -> Digests:
    """A digest of each image, whatever its label; uint64 [N]."""
    return np.frombuffer(b"".join(digest[:8] for digest in split.digests()), np.uint64)


def read(folder: Path) -> Digests:
    """What the model in a folder was trained on, as far as a file there tells; uint64 [N]."""
    try:
        digests = np.load(folder / FILE, allow_pickle=False)
    except (OSError, EOFError, ValueError):
        return np.empty(0, np.uint64)
    return digests if digests.dtype == np.uint64 else np.empty(0, np.uint64)


def write(folder: Path, train: Split, origins: Iterable[Path]) -> None:
    """Write what a run trains on, and what those that it begins with or learns from were trained on.

    Args:
        folder: of the run.
        train: its training images.
        origins: folders of the others.
    """
    np.save(folder / FILE, np.unique(np.concatenate([digests_of(train), *map(read, origins)])))


def count_seen(split: Split, digests: Digests) -> int:
    """How many images of a split are among those that were trained on."""
    return int(np.isin(digests_of(split), digests).sum())
