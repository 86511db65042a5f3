"""Decoded images on disk, mapped into memory: decoded once, shared by processes, more than memory holds.

Shape letters: N images, S their height and width in pixels.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Iterable, Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import imaging

FOLDER = Path("data") / "decoded"
MIN_BYTES = 1 << 30  # fewer are decoded anew by each run, and lie in memory


@cache
def decoder() -> str:
    """What decodes: the versions of its libraries, and a digest of the code in `imaging`."""
    code = hashlib.blake2b(digest_size=16)
    for file in sorted(Path(imaging.__file__).parent.rglob("*.py")):
        code.update(file.read_bytes())
    return f"pillow {version('pillow')}, simplejpeg {version('simplejpeg')}, imaging {code.hexdigest()}"


def cache_key(paths: Sequence[Path], size: int) -> str:
    """Digest of what the files hold, in their order, of the size that they are decoded to, and of the decoder."""
    whole = hashlib.blake2b(f"{decoder()}, {size}".encode(), digest_size=16)
    for path in paths:
        try:
            with path.open("rb") as file:
                whole.update(hashlib.file_digest(file, "blake2b").digest())
        except OSError:
            whole.update(b"unreadable")
    return whole.hexdigest()


def map_images(file: Path, shape: Sequence[int]) -> Tensor:
    """Map a file of pixels into memory: only what is looked at takes some.

    Args:
        file: written by `store`.
        shape: [N, S, S, 3].

    Returns:
        uint8 of that shape. Writing to it changes this process's copy alone.
    """
    count = torch.Size(shape).numel()
    if count == 0:  # an empty file can't be mapped
        return torch.empty(*shape, dtype=torch.uint8)
    return torch.from_file(str(file), shared=False, size=count, dtype=torch.uint8).view(*shape)


def store(key: str, decoded: Iterable[NDArray[np.uint8] | None]) -> tuple[Path, list[int]]:
    """Write decoded images to disk, unless they are there.

    Args:
        key: of `cache_key`.
        decoded: uint8 [S, S, 3] of each file, None where it can't be read; asked for only where nothing is there.

    Returns:
        The file with the pixels of those that can be read, and the indices of the others.

    Raises:
        OSError: there is no room for them.
    """
    file, notes = FOLDER / f"{key}.rgb", FOLDER / f"{key}.json"
    if file.is_file() and notes.is_file():
        unreadable: list[int] = json.loads(notes.read_text(encoding="utf-8"))
        return file, unreadable
    FOLDER.mkdir(parents=True, exist_ok=True)
    partial, unreadable = file.with_suffix(f".{os.getpid()}.partial"), []
    try:
        with partial.open("wb") as stream:
            for index, image in enumerate(decoded):
                if image is None:
                    unreadable.append(index)
                else:
                    stream.write(image.data)
        partial.replace(file)
        # Last, and whole or not at all: without it the pixels are not taken for whole.
        partial.write_text(json.dumps(unreadable), encoding="utf-8")
        partial.replace(notes)
    finally:
        partial.unlink(missing_ok=True)
    print(f"decoded images are kept in {file} ({file.stat().st_size / 1e9:.1f} GB)", file=sys.stderr)
    return file, unreadable
