"""Whether a folder may become a run's: nobody's run is overwritten, and no two runs write to one folder."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from pydantic import ValidationError

from training.checkpoint import RunConfig
from training.data.dataset import DataSet
from training.file_lock import locked


def check_unused(folder: Path | None) -> None:
    """Raise ValueError when the folder holds a run that can be resumed (or when a file is in its place)."""
    if folder is None:
        return
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--out {folder}: is a file; name a folder for the run.")
    if (folder / "last.safetensors").exists():
        raise ValueError(f"{folder} holds a run already: go on with it by --resume {folder}, or name another --out.")
    if (folder / "report.json").exists():
        raise ValueError(f"{folder} holds a run that has ended, without last.safetensors: name another --out.")
    if (folder / "best.safetensors").exists():
        raise ValueError(
            f"{folder} holds the weights of a run, best.safetensors: export it, or begin with them by --init {folder}; "
            "either way name another --out."
        )
    # A run that ended before its first checkpoint may be started again where it was.
    if folder.is_dir() and any(folder.iterdir()) and not _is_run_config(folder / "config.json"):
        raise ValueError(f"--out {folder}: holds other files; name a folder of the run's own.")


def _is_run_config(config: Path) -> bool:
    """Whether a file is a run's configuration; other trainers call theirs so, too."""
    try:
        RunConfig.model_validate_json(config.read_bytes())
    except (FileNotFoundError, ValidationError):
        return False
    return True


def check_outside_classes(folder: Path, data_set: DataSet) -> None:
    """Raise ValueError when the run would lie among the class folders: the next run would take it for a class."""
    for classes in data_set.class_folders:
        if folder.resolve().is_relative_to(classes.resolve()):
            raise ValueError(
                f"--out {folder}: lies in {classes}, where each folder is a class; name a folder elsewhere."
            )


@contextmanager
def lock_run_dir(folder: Path) -> Iterator[None]:
    """Make the folder where it is missing, and hold its lock, which ends with the process at the latest.

    Raises:
        ValueError: another process holds it, or it can't be written to.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK | os.X_OK):  # before TensorBoard's thread finds out, with a traceback
        raise ValueError(
            f"{folder}: can't be written to; go on with a copy of the run elsewhere, or name another --out."
        )
    with ExitStack() as held:  # entered apart, so that the body's own errors are not taken for the lock's
        try:
            held.enter_context(locked(folder, wait=False))
        except BlockingIOError as error:
            raise ValueError(
                f"{folder}: another training is writing to it; wait for its end, or name another --out."
            ) from error
        yield
