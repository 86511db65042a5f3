"""From a path, or from nothing, to a data set: CIFAR-100 by download or from a folder, or the user's own images."""

from __future__ import annotations

from pathlib import Path

from training.checkpoint import RunConfig
from training.config import Preset
from training.data import cifar, image_folder
from training.data.dataset import DataError, DataSet
from training.data.download import ensure_cifar100

_LAYOUTS = f"{cifar.FOLDER}/ (files meta, test and train), or {image_folder.LAYOUT}"


def _check(path: Path) -> None:
    """Raise DataError unless ``path`` is a folder that may hold folders of images."""
    if not path.exists():
        raise DataError(f"{path}: does not exist; --data takes a folder laid out as {_LAYOUTS}.")
    if not path.is_dir():
        raise DataError(f"{path}: is a file; --data takes a folder laid out as {_LAYOUTS}.")
    for folder in (path, path / cifar.FOLDER):
        missing = [name for name in cifar.MEMBERS if not (folder / name).is_file()]
        if len(missing) < len(cifar.MEMBERS) and not any(child.is_dir() for child in folder.iterdir()):
            raise DataError(f"{folder}: lacks {' and '.join(missing)}; unpack the whole {cifar.FOLDER} archive there.")
    if not any(child.is_dir() for child in path.iterdir()):
        raise DataError(f"{path}: has no folders of images in it; --data takes a folder laid out as {_LAYOUTS}.")


def load(
    path: Path | None,
    *,
    input_size: int,
    cache_dir: Path = Path("data"),
    validation_fraction: float = 0.1,
    skip_unreadable: bool = False,
) -> DataSet:
    """Load a data set with every image as uint8 [input_size, input_size, 3].

    path: None for CIFAR-100 (downloaded into ``cache_dir`` when it is not there), else a folder: the official
        ``cifar-100-python`` layout (itself or its parent), or an image folder (see ``training.data.image_folder``).
    input_size: side in pixels; other images are centre-cropped to a square and resized (bicubic) once.
    validation_fraction: share of the training images held out, in (0, 1): the last ones of CIFAR-100, a stratified
        draw of an image folder, the same in every run; ignored where the folder has its own ``val/``. Of the same
        images, what a smaller share holds out is part of what a larger one does.
    skip_unreadable: leave out images of an image folder that can't be read.

    Raises DataError, with a sentence for the user, when there is no usable data.
    """
    if path is not None and str(path) != str(path).encode(errors="replace").decode():
        raise DataError(f"{str(path)!r}: this path is not UTF-8, which the run's configuration is; rename the folder.")
    if not 0 < validation_fraction < 1:
        raise DataError(f"validation_fraction is {validation_fraction}; it must lie between 0 and 1.")
    if path is None:
        folder: Path | None = ensure_cifar100(cache_dir)
    else:
        folder = cifar.find(path)
    if folder is not None:
        return cifar.load(folder, input_size=input_size, validation_fraction=validation_fraction)
    assert path is not None
    _check(path)
    return image_folder.load(
        path, input_size=input_size, validation_fraction=validation_fraction, skip_unreadable=skip_unreadable
    )


def load_for(run: Preset | RunConfig, path: Path | None) -> DataSet:
    """Load a data set at the size of a run's images, divided as the run wants it; see `load`."""
    return load(
        path,
        input_size=run.model.input_size,
        validation_fraction=run.train.validation_fraction,
        skip_unreadable=run.train.skip_unreadable,
    )
