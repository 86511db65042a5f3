"""The official CIFAR-100 archive: downloaded once, resumed, its checksum verified, unpacked safely."""

from __future__ import annotations

import fcntl
import hashlib
import http.client
import shutil
import tarfile
import tempfile
import urllib.error
import urllib.request
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

from training.data.cifar import FOLDER, MEMBERS, find
from training.data.dataset import DataError

ARCHIVE_URL = "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz"
ARCHIVE_MD5 = "eb9058c3a382ffc7106e4002c42a8d85"

_CHUNK_BYTES = 1 << 18
_TIMEOUT_S = 30
_ATTEMPTS = 3
_HTTP_PARTIAL = 206
_HTTP_RANGE_NOT_SATISFIABLE = 416


def _request(url: str, offset: int) -> urllib.request.Request:
    headers = {"User-Agent": "perceiver-training", **({"Range": f"bytes={offset}-"} if offset else {})}
    return urllib.request.Request(url, headers=headers)  # noqa: S310 - the address is a constant of this file


def _receive(url: str, partial: Path) -> bool:
    """Append to ``partial`` what is missing; return whether the server's whole file has arrived."""
    offset = partial.stat().st_size if partial.exists() else 0
    try:
        response = urllib.request.urlopen(_request(url, offset), timeout=_TIMEOUT_S)  # noqa: S310 - as above
    except urllib.error.HTTPError as error:
        with error:
            if error.code == _HTTP_RANGE_NOT_SATISFIABLE:
                return True  # nothing is missing; the checksum says whether it is the right file
            raise
    with response:
        if response.status != _HTTP_PARTIAL:
            offset = 0  # the server does not resume and sends everything
        length = response.headers.get("Content-Length")
        total = offset + int(length) if length else None
        with (
            partial.open("ab" if offset else "wb") as file,
            tqdm(desc=partial.stem, initial=offset, total=total, unit="B", unit_scale=True, disable=None) as bar,
        ):
            while chunk := response.read(_CHUNK_BYTES):
                file.write(chunk)
                bar.update(len(chunk))
    return total is None or partial.stat().st_size >= total


def _receive_all(url: str, partial: Path) -> None:
    """Download ``url`` into ``partial``, going on after an interruption; raises DataError when it cannot be had."""
    reason = "the connection broke off"
    for _ in range(_ATTEMPTS):
        try:
            if _receive(url, partial):
                return
        except (OSError, http.client.HTTPException) as error:  # URLError and time-outs are OSErrors
            reason = str(getattr(error, "reason", error))
    raise DataError(
        f"{url}: cannot be downloaded ({reason}); run the same command again to go on where it stopped, or pass "
        f"--data with a local folder that holds {FOLDER}/ or one folder of images for each class."
    )


def _md5(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def download(url: str, md5: str, archive: Path) -> None:
    """Download ``url`` to ``archive`` through ``<archive>.partial``, which a later call resumes.

    Raises DataError when the network fails, or when the checksum differs; the wrong file is deleted then.
    """
    partial = archive.with_name(archive.name + ".partial")
    _receive_all(url, partial)
    actual = _md5(partial)
    if actual != md5:
        partial.unlink()
        raise DataError(
            f"{partial}: came with the MD5 checksum {actual} where {md5} is right; the damaged file has been deleted, "
            "run the same command to download it again."
        )
    partial.rename(archive)


def _check_archive(archive: Path, md5: str) -> None:
    """Raise DataError when an archive that lay there already, and is not ours to delete, has another checksum."""
    actual = _md5(archive)
    if actual != md5:
        raise DataError(
            f"{archive}: has the MD5 checksum {actual} where {md5} is right; remove it and it will be downloaded again."
        )


def unpack(archive: Path, folder: Path) -> None:
    """Unpack the three files of the data set, and nothing else, into ``folder``, which appears whole or not at all.

    Only the bytes are taken from the archive, no path, link or mode. Raises DataError when a file is missing.
    """
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".unpacking-") as temporary:
        whole = Path(temporary) / folder.name
        whole.mkdir()
        try:
            with tarfile.open(archive, "r:gz") as tar:
                for name in MEMBERS:
                    member = tar.getmember(f"{FOLDER}/{name}")
                    source = tar.extractfile(member) if member.isreg() else None
                    if source is None:
                        raise DataError(f"{archive}: {member.name} must be a plain file; download the archive again.")
                    with source, (whole / name).open("wb") as target:
                        shutil.copyfileobj(source, target)
        except (tarfile.TarError, KeyError, EOFError, OSError, zlib.error) as error:
            if isinstance(error, OSError) and error.errno is not None:  # the disk's; gzip's own has no number
                raise DataError(f"{archive}: cannot be unpacked to {folder.parent} ({error.strerror}).") from error
            raise DataError(
                f"{archive}: is not the official archive ({error}); remove it and download it again."
            ) from error
        if folder.exists():
            shutil.rmtree(folder)
        whole.rename(folder)


@contextmanager
def _lock_cache(folder: Path) -> Iterator[None]:
    """Let the processes of one machine (torchrun starts several) download and unpack one after the other."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("w", encoding="utf-8")
    except OSError as error:
        raise DataError(
            f"{folder}: cannot be written ({error.strerror}), so CIFAR-100 cannot be downloaded there; "
            f"pass --data with a local folder that holds {FOLDER}/ or one folder of images for each class."
        ) from error
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def ensure_cifar100(cache_dir: Path, *, url: str = ARCHIVE_URL, md5: str = ARCHIVE_MD5) -> Path:
    """Return the folder of CIFAR-100 below ``cache_dir``, downloading and unpacking only what is not there yet.

    Raises DataError when it cannot be had.
    """
    if found := find(cache_dir):
        return found
    folder, archive = cache_dir / FOLDER, cache_dir / f"{FOLDER}.tar.gz"
    with _lock_cache(cache_dir):
        if find(folder) is None:  # another process may have been first
            if archive.is_file():
                _check_archive(archive, md5)
            else:
                download(url, md5, archive)
            unpack(archive, folder)
    return folder
