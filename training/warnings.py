"""What a user should know of a run before it begins, though nothing is wrong."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from training import seen_images
from training.checkpoint import RunConfig
from training.config import Preset
from training.data.dataset import DataSet
from training.data.image_files import SUFFIXES
from training.data.image_folder import LAYOUT, SPLITS, VAL_ALIASES
from training.transfer import validation_overlaps


def warnings_for(
    run: RunConfig, data_set: DataSet, preset: Preset | None, origins: Sequence[Path] = ()
) -> Iterator[str]:
    """What a user should know of a run, a sentence each.

    Args:
        run: what is about to be trained.
        data_set: its images.
        preset: what was asked for; None where a run is resumed.
        origins: folders of the checkpoints that it begins with and learns from.
    """
    if preset is not None and run.train.batch_size != preset.train.batch_size:
        yield (
            f"{len(data_set.train)} training images are few: a step takes {run.train.batch_size} of them and not the "
            f"preset's {preset.train.batch_size}, so that an epoch has more steps (--batch-size decides otherwise)."
        )
    if data_set.skipped_files:
        suffixes = Counter(printable(file.suffix or file.name) for file in data_set.skipped_files)
        shown = ", ".join(f"{count} {suffix}" for suffix, count in suffixes.most_common(5))
        first = printable(data_set.skipped_files[0])
        count = len(data_set.skipped_files)
        yield (
            f"{count} {'files are' if count > 1 else 'file is'} passed over ({shown}), the first is {first}: "
            "images lie in their class's own folder, whose name begins with no dot, and end with "
            f"{' '.join(sorted(SUFFIXES))}."
        )
    if data_set.unreadable_files:
        count = len(data_set.unreadable_files)
        first = printable(data_set.unreadable_files[0])
        yield f"{count} {'images are' if count > 1 else 'image is'} left out as unreadable, the first is {first}."
    splits = [label for label in data_set.labels if label.lower() in (*SPLITS, *VAL_ALIASES)]
    if splits and len(data_set.class_folders) == 1:  # where train/ is told from val/ and test/ there is no doubt
        shown = " and ".join(printable(data_set.class_folders[0] / name) for name in splits)
        yield f"{shown}: taken for a class of that name, since the images are not laid out as {LAYOUT}."
    if preset is not None:
        yield from overlap_warnings(run, data_set, origins)
        yield from copy_warnings(data_set)
    if preset is not None and run.init is not None and run.model.network == "perceiver":
        theirs = run.init.run.model
        if theirs.grid != run.model.grid:
            yield (
                f"positions are interpolated from a grid of {theirs.grid} x {theirs.grid} patches to one of "
                f"{run.model.grid} x {run.model.grid}."
            )
        if theirs.num_latents != run.model.num_latents:
            yield f"{run.model.num_latents} latents are interpolated from a grid of {theirs.num_latents}."
    yield from unseen_class_warnings(data_set)


def unseen_class_warnings(data_set: DataSet) -> Iterator[str]:
    """Tell the classes that no image validates, or tests."""
    few = "put some into val/" if data_set.has_val else "a class needs two images"
    for name, split, wanted in (("validation", data_set.val, few), ("test", data_set.test, "put some into test/")):
        if split is None:
            continue
        seen = set(split.labels.tolist())
        unseen = [printable(label) for index, label in enumerate(data_set.labels) if index not in seen]
        if unseen:
            shown = ", ".join(unseen[:5]) + (f" and {len(unseen) - 5} more" if len(unseen) > 5 else "")
            yield f"no {name} image of {shown}: no figure tells how well that is known; {wanted}."


def overlap_warnings(run: RunConfig, data_set: DataSet, origins: Sequence[Path]) -> Iterator[str]:
    """Tell where images that validate may have trained what the run begins with, learns from, or goes back to."""
    path = Path(run.data) if run.data else None
    found = validation_overlaps(run, path, has_val=data_set.has_val)
    if any(why == "images" for why, _ in found):
        yield (
            "the images are not those of the run that --init or --teacher names, or of one before it: where one "
            "folder of them was divided anew, some that validate now have trained that run, and flatter this one. "
            "Folders train/ and val/ keep them apart."
        )
    digests = np.concatenate([np.empty(0, np.uint64), *map(seen_images.read, origins)])
    for name, split in (("validation", data_set.val), ("test", data_set.test)):
        if split is not None and (count := seen_images.count_seen(split, digests)):
            yield (
                f"{count} of the {len(split)} {name} images have trained the run that --init or --teacher names, or "
                "one before it: the figures on these flatter."
            )
    shares = [theirs.train.validation_fraction for why, theirs in found if why == "share"]
    if shares:
        yield (
            "of the images that validate now some have trained the run that --init or --teacher names, or one before "
            f"it, and flatter this one: --validation-fraction {min(shares)} or less keeps them apart."
        )


def copy_warnings(data_set: DataSet) -> Iterator[str]:
    """Tell where what trains also validates or tests; of an image folder, whose copies somebody can take out."""
    if not data_set.class_folders:
        return
    for split, count in data_set.copies().items():
        among = f"{len(data_set.val)} validation" if split == "val" else f"{len(data_set.test or ())} test"
        yield (
            f"{count} of the {among} images {'is a copy' if count == 1 else 'are copies'} of training images: the "
            "figures on these flatter; take all but one of each out."
        )


def printable(path: Path | str) -> str:
    """A path as text that any terminal takes, whatever bytes it is made of."""
    return os.fsencode(path).decode(errors="replace")
