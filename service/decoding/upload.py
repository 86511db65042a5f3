"""An image file as a client sent it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")


@dataclass(slots=True)  # not frozen: that costs a microsecond
class Upload:
    """One image file as it was sent, and the name its sender gave it."""

    data: bytes
    filename: str | None = None


def which(uploads: Sequence[Upload], index: int) -> str:
    """Return what stands before a sentence about one of several images; "" where there is but one."""
    if len(uploads) == 1:
        return ""
    filename = uploads[index].filename
    name = f" ({filename[:80]!r})" if filename else ""
    return f"Image {index + 1} of {len(uploads)}{name}: "
