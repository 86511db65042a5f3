"""What a user should know of a run before it begins, though nothing is wrong."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from training.checkpoint import RunConfig
from training.config import Preset
from training.dataset import DataSet
from training.pictures import SUFFIXES
from training.transfer import has_other_pictures


def notes_on(run: RunConfig, data_set: DataSet, preset: Preset | None) -> Iterator[str]:
    """What a user should know of a run, a sentence each.

    Args:
        run: what is about to be trained.
        data_set: its pictures.
        preset: what was asked for; None where a run is resumed.
    """
    if preset is not None and run.train.batch_size != preset.train.batch_size:
        yield (
            f"{len(data_set.train)} training pictures are few: a step takes {run.train.batch_size} of them and not the "
            f"preset's {preset.train.batch_size}, so that an epoch has more steps (--batch-size decides otherwise)."
        )
    if data_set.passed_over:
        suffixes = Counter(printable(file.suffix or file.name) for file in data_set.passed_over)
        shown = ", ".join(f"{count} {suffix}" for suffix, count in suffixes.most_common(5))
        first = printable(data_set.passed_over[0])
        count = len(data_set.passed_over)
        yield (
            f"{count} {'files are' if count > 1 else 'file is'} passed over ({shown}), the first is {first}: "
            f"pictures lie in their class's own folder and end with {' '.join(sorted(SUFFIXES))}."
        )
    for flag, origin in (("--init", run.init), ("--teacher", run.teacher)):
        if preset is None or origin is None:
            continue
        if has_other_pictures(run, origin.run, Path(run.data) if run.data else None):
            yield (
                f"the pictures are not those of the run that {flag} names: where one folder of them was divided anew, "
                "some that validate now have trained that run, and flatter this one. Folders train/ and val/ keep them "
                "apart."
            )
        elif validates_on_more(run, origin.run, data_set):
            yield (
                f"of the pictures that validate now some have trained the run that {flag} names, and flatter this one: "
                f"--validation-fraction {origin.run.train.validation_fraction} or less keeps them apart."
            )
    if preset is not None and run.init is not None and (grid := run.init.run.model.grid) != run.model.grid:
        yield (
            f"positions are interpolated from a grid of {grid} x {grid} patches to one of {run.model.grid} x "
            f"{run.model.grid}."
        )
    seen = set(data_set.val.labels.tolist())
    unseen = [label for index, label in enumerate(run.labels) if index not in seen]
    if unseen:
        shown = ", ".join(unseen[:5]) + (f" and {len(unseen) - 5} more" if len(unseen) > 5 else "")
        yield f"no validation picture of {shown}: no figure tells how well that is known; a class needs two pictures."


def validates_on_more(run: RunConfig, theirs: RunConfig, data_set: DataSet) -> bool:
    """Whether a run holds out a larger share of the same pictures than another did."""
    return (
        not data_set.own_val
        and theirs.labels == run.labels
        and run.train.validation_fraction > theirs.train.validation_fraction
    )


def printable(path: Path | str) -> str:
    """A path as text that any terminal takes, whatever bytes it is made of."""
    return os.fsencode(path).decode(errors="replace")
