"""Golden pictures: real ones, from the validation split, with the logits that torch gives for them in float32.

Shape letters: K golden pictures, H and W the input size in pixels, C classes.
"""

from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import nn

from export.errors import ExportError
from export.graph.trained import reference_logits
from export.source import Source
from service.repository.folder import Golden
from training.data import cifar
from training.data.dataset import DataError, DataSet, Split
from training.data.load import load_for

DATA_FOLDER = Path("data")

T = TypeVar("T", bound=np.generic)


def data_path(source: Source, path: Path | None) -> Path:
    """Return where the data of a run are: where the user says, else where they were while training, else `data/`."""
    return path or (Path(source.run.data) if source.run.data else DATA_FOLDER)


def load_data(source: Source, path: Path | None) -> DataSet:
    """Load the data set of the run.

    Args:
        source: what is exported.
        path: where the data are; None: where they were while training, or CIFAR-100 in `data/`.

    Raises:
        ExportError: it is not there, or has other classes.
    """
    chosen = data_path(source, path)
    wanted = "golden pictures are real validation pictures, so the data that the run was trained on is needed"
    if path is None and not chosen.exists():
        raise ExportError(f"{chosen}: does not exist; {wanted}: name its folder by --data.")
    if source.run.data is None and cifar.find(chosen) is None:
        raise ExportError(f"{chosen}: holds no {cifar.FOLDER}; {wanted}: name its folder by --data.")
    try:
        loaded = load_for(source.run, chosen)
    except DataError as error:
        raise ExportError(f"{error} ({wanted}.)") from error
    if loaded.labels != source.run.labels:
        raise ExportError(
            f"{chosen}: has other classes than the run was trained on; name the run's own data by --data."
        )
    return loaded


def has_changed(source: Source, loaded: DataSet) -> bool:
    """Tell whether the data are others than the run was trained on, or are divided otherwise; False if unknown."""
    return source.run.pictures_sha256 not in (None, loaded.digest())


def real_golden(model: nn.Module, split: Split, count: int) -> Golden:
    """Take `count` pictures, evenly spread over a split; no more than there are.

    Args:
        model: the training form.
        split: the validation pictures.
        count: K.
    """
    images = spread(split.images.numpy(), count)
    return Golden(images, spread(split.labels.numpy(), count), reference_logits(model, images))


def spread(values: NDArray[T], count: int) -> NDArray[T]:
    """Take up to `count` of [N, ...], evenly spread."""
    index = np.linspace(0, len(values) - 1, min(count, len(values))).round().astype(np.int64)
    chosen: NDArray[T] = values[index]
    return chosen


def noise_golden(model: nn.Module, input_size: tuple[int, int], count: int) -> Golden:
    """Make `count` pictures of seeded noise for a model of random weights; the labels are those that torch gives."""
    images = np.random.default_rng(0).integers(0, 256, (count, *input_size, 3), dtype=np.uint8)
    logits = reference_logits(model, images)
    return Golden(images, logits.argmax(axis=1), logits)
