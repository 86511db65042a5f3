"""Image folders: ``DIR/<class>/*.jpg``, or the same below ``DIR/train``, ``DIR/val`` and ``DIR/test``."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from training.data.dataset import CIFAR100, DataError, DataSet, Split
from training.data.image_files import SUFFIXES, read_images

SPLITS = ("train", "val", "test")
# What others call the folder `val`: passed over, its images would be lost and some of train/ held out in their place.
VAL_ALIASES = ("val", "valid", "validation", "dev")
LAYOUT = "DIR/<class>/*.jpg, or DIR/train/<class>/*.jpg with val/ and test/ beside train/"


def _class_folders(path: Path) -> list[Path]:
    """Return the visible folders below ``path``, by name."""
    return sorted(child for child in path.iterdir() if child.is_dir() and not child.name.startswith("."))


def _images_of(folder: Path) -> list[Path]:
    """Return the image files of one class, by name; raises DataError when there are none."""
    files = (child for child in folder.iterdir() if child.is_file() and not child.name.startswith("."))
    images = sorted(file for file in files if file.suffix.lower() in SUFFIXES)
    if images:
        return images
    if _class_folders(folder):
        raise DataError(f"{folder}: has folders where a class has images; lay the images out as {LAYOUT}.")
    raise DataError(
        f"{folder}: this class folder has no images; put some in ({' '.join(sorted(SUFFIXES))}) or remove it."
    )


def _labels_of(path: Path) -> tuple[str, ...]:
    """Return the class names of the training folder; raises DataError when there are fewer than two."""
    labels = tuple(folder.name for folder in _class_folders(path))
    if len(labels) < 2:
        found = f"only one class folder ({labels[0]})" if labels else "no class folder"
        raise DataError(f"{path}: has {found}; a classifier needs at least two, laid out as {LAYOUT}.")
    told_apart: dict[str, str] = {}
    for label in labels:
        if (other := told_apart.setdefault(_plain(label), label)) != label:
            raise DataError(
                f"{path}: the names of the class folders {other!a} and {label!a} differ only by their Unicode "
                "form or by blanks around them; make them one folder, or rename one."
            )
        if label != label.encode(errors="replace").decode():
            raise DataError(f"{path}: the name of the class folder {label!r} is not UTF-8; rename it.")
    return labels


def _plain(name: str) -> str:
    """Return a name as people read it."""
    return unicodedata.normalize("NFC", name).strip()


@dataclass(frozen=True)
class _Listing:
    """Files of a split and their classes, before any of them is read."""

    paths: list[Path]
    labels: NDArray[np.int64]

    def read(self, size: int, description: str, unreadable: dict[Path, DataError]) -> Split:
        """Read the files; those that are no images are left out, and added to ``unreadable``."""
        images, file, errors = read_images(self.paths, size, description)
        unreadable |= {self.paths[index]: error for index, error in errors.items()}
        labels = self.labels
        if errors:
            labels = labels[np.setdiff1d(np.arange(len(labels)), list(errors))]
        return Split(images, torch.from_numpy(labels), file)

    def at(self, indices: NDArray[np.int64]) -> _Listing:
        return _Listing([self.paths[index] for index in indices], self.labels[indices])


def _list_split(path: Path, labels: tuple[str, ...]) -> _Listing:
    """List ``path/<class>/*``; raises DataError for a class without images or one that is not in ``labels``."""
    folders = _class_folders(path)
    unknown = [folder.name for folder in folders if folder.name not in labels]
    for name in unknown:
        for label in labels:
            if _plain(name) == _plain(label):
                raise DataError(
                    f"{path}: the name of the class folder {name!a} differs from {label!a} of the training "
                    "images only by its Unicode form or by blanks around it; rename one."
                )
    if unknown:
        raise DataError(
            f"{path}: has classes that the training images lack ({', '.join(unknown)}); "
            "add training images of them or remove their folders."
        )
    if not folders:
        raise DataError(f"{path}: has no class folder; lay it out as {LAYOUT}, or remove it.")
    images = [_images_of(folder) for folder in folders]
    indices = [labels.index(folder.name) for folder in folders]
    counts = [len(files) for files in images]
    return _Listing([file for files in images for file in files], np.repeat(indices, counts).astype(np.int64))


def stratified_split(
    labels: NDArray[np.int64], fraction: float, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Split indices 0..N-1 into (training, validation), both ascending, by class.

    Of every class ``fraction`` of the images, and at least one where it has two, go to validation, and at least one
    stays. The draw depends on the seed and on the class alone: images added to one class do not move the others'.
    """
    chosen = []
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        count = min(max(round(len(members) * fraction), 1), len(members) - 1)
        order = np.random.default_rng([seed, int(label)]).permutation(len(members))
        chosen.append(members[order[:count]])
    validation = np.sort(np.concatenate(chosen))
    return np.setdiff1d(np.arange(len(labels)), validation), validation


def _hold_out(full: _Listing, path: Path, fraction: float, seed: int) -> tuple[_Listing, _Listing]:
    training, validation = stratified_split(full.labels, fraction, seed)
    if len(validation) == 0:
        raise DataError(
            f"{path}: no class has two images, so none can be held out for validation; "
            "add images or a folder val/ beside train/."
        )
    return full.at(training), full.at(validation)


def _skipped_files(path: Path, places: Sequence[Path], taken: set[Path]) -> list[Path]:
    """Return the files at and below ``path`` that are not in ``taken``, sorted.

    Nothing that hides behind a dot, except the images of what would be a class without its dot.

    Args:
        path: of the data set.
        places: folders of which each folder is a class.
        taken: the images of the data set.
    """
    classes = [folder for place in places for folder in place.glob("*") if folder.is_dir()]
    links = [folder for folder in (*places, *classes) if folder.is_symlink()]  # which `rglob` does not enter
    below = (file for root in (path, *links) for file in root.rglob("*"))
    visible = (file for file in below if not any(part.startswith(".") for part in file.relative_to(path).parts))
    hidden = (file for folder in classes if folder.name.startswith(".") for file in folder.glob("[!.]*"))
    found = chain(visible, (file for file in hidden if file.suffix.lower() in SUFFIXES))
    # A link that leads nowhere is no file, and no folder.
    return sorted({file for file in found if file not in taken and not file.is_dir()})


def _check_readable(unreadable: dict[Path, DataError], labels: tuple[str, ...], train: Split, val: Split) -> None:
    """Raise DataError where what is left without the unreadable images is no data set."""
    lacking = sorted(set(range(len(labels))) - set(train.labels.tolist()))
    if lacking:
        raise DataError(f"{_listed(unreadable)}\nWithout them the class {labels[lacking[0]]} has no training image.")
    if not len(val):
        raise DataError(f"{_listed(unreadable)}\nWithout them no validation image is left.")


def _listed(unreadable: dict[Path, DataError]) -> str:
    """Return a sentence for one unreadable image, or a line for each of several."""
    errors = [str(error) for error in unreadable.values()]
    if len(errors) == 1:
        return errors[0]
    return "\n  ".join([f"{len(errors)} images cannot be read:", *errors])


def load(
    path: Path, *, input_size: int, validation_fraction: float, skip_unreadable: bool = False, seed: int = 0
) -> DataSet:
    """Read an image folder, every image brought to ``input_size`` x ``input_size`` once.

    Classes are the folders' names in order of the alphabet. Without ``val/`` a stratified, seeded part of the training
    images becomes validation; without ``test/`` there is no test split. Raises DataError for what cannot be used;
    all folders are looked through before the first image is read. Images that can't be read are told all at once, or
    left out with ``skip_unreadable``: which images validate does not depend on it.
    """
    # A class may itself be called "train" (of the railway kind): only a folder of folders is the split.
    has_splits = (path / "train").is_dir() and bool(_class_folders(path / "train"))
    train_path = path / "train" if has_splits else path
    if has_splits and not (path / "val").is_dir():
        for folder in _class_folders(path):
            if folder.name.lower() in VAL_ALIASES:
                raise DataError(f"{folder}: is passed over under this name; rename it val, or remove it.")
    labels = _labels_of(train_path)
    train = _list_split(train_path, labels)
    val, test = (
        _list_split(path / name, labels) if has_splits and (path / name).is_dir() else None for name in ("val", "test")
    )
    listings = [listing for listing in (train, val, test) if listing is not None]
    places = tuple(path / name for name in SPLITS) if has_splits else (path,)
    skipped_files = _skipped_files(path, places, {file for listing in listings for file in listing.paths})
    if val is None:
        train, val = _hold_out(train, train_path, validation_fraction, seed)
    unreadable: dict[Path, DataError] = {}
    train_split = train.read(input_size, "training images", unreadable)
    val_split = val.read(input_size, "validation images", unreadable)
    test_split = test.read(input_size, "test images", unreadable) if test is not None else None
    if unreadable and not skip_unreadable:
        raise DataError(f"{_listed(unreadable)}\nOr leave out what cannot be read: --skip-unreadable.")
    if unreadable:
        _check_readable(unreadable, labels, train_split, val_split)
    name = path.resolve().name
    return DataSet(
        name=f"{name}-folder" if name == CIFAR100 else name,  # which it is not, as far as anybody knows
        labels=labels,
        train=train_split,
        val=val_split,
        test=test_split,
        class_folders=places,
        has_val=has_splits and (path / "val").is_dir(),
        skipped_files=tuple(skipped_files),
        unreadable_files=tuple(unreadable),
    )
