"""Writing a version of a model folder: whole or not at all, and one at a time."""

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from service.engine.metadata import ArtifactError
from service.repository.folder import list_versions
from training.file_lock import locked


@contextmanager
def new_version(folder: Path) -> Iterator[tuple[int, Path]]:
    """Write the next version of `folder` so that no reader ever sees a part of it, not even after a power cut.

    Yields the next version's number and a temporary sibling folder to write into; it is renamed to
    `folder/<number>` when the body succeeds and removed when the body raises. Who else wants to write a version
    waits meanwhile, so what the body finds in the folder is what its version comes after. What a killed process left
    is removed.

    Raises:
        ArtifactError: somebody took the number without waiting; an existing version is never overwritten.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder, wait=True) as alone:
        for entry in folder.iterdir() if alone else ():
            if re.fullmatch(r"\.\d+-export-\w+", entry.name):
                shutil.rmtree(entry, ignore_errors=True)
        number = max((version.number for version in list_versions(folder)), default=0) + 1
        temporary = Path(tempfile.mkdtemp(prefix=f".{number}-export-", dir=folder))
        try:
            yield number, temporary
            temporary.chmod(0o755)  # mkdtemp's 0o700 would hide the version from a service of another user
            for path in (*temporary.rglob("*"), temporary):
                _to_disk(path)
            _publish(temporary, folder / str(number))
            _to_disk(folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _publish(temporary: Path, target: Path) -> None:
    """Rename; the system refuses where the target is a folder with something in it, so no check can come too early."""
    try:
        temporary.rename(target)
    except OSError as error:
        if not target.exists():
            raise
        raise ArtifactError(f"{target}: this version exists already and is never overwritten") from error
