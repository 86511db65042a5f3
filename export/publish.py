"""Writing a version of a model folder: atomically, and one at a time."""

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
    """Write the next version of `folder` atomically, also across a power cut.

    Other writers wait meanwhile. What a killed writer left is removed.

    Yields:
        The version's number, and a temporary sibling folder to write into. It is renamed to `folder/<number>` when the
        body succeeds and removed when it raises.

    Raises:
        ArtifactError: a writer that does not wait took the number; an existing version is never overwritten.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder, wait=True) as exclusive:
        for entry in folder.iterdir() if exclusive else ():
            if re.fullmatch(r"\.\d+-export-\w+", entry.name):
                shutil.rmtree(entry, ignore_errors=True)
        number = max((version.number for version in list_versions(folder)), default=0) + 1
        temporary = Path(tempfile.mkdtemp(prefix=f".{number}-export-", dir=folder))
        try:
            yield number, temporary
            temporary.chmod(0o755)  # mkdtemp's 0o700 would hide it from a service of another user
            for path in (*temporary.rglob("*"), temporary):
                _fsync(path)
            _publish(temporary, folder / str(number))
            _fsync(folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _publish(temporary: Path, target: Path) -> None:
    """Rename; the system refuses a target that is not empty, so that two writers can't race."""
    try:
        temporary.rename(target)
    except OSError as error:
        if not target.exists():
            raise
        raise ArtifactError(f"{target}: this version exists already, and a version is never overwritten") from error
