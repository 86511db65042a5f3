"""The list of tags that begins a TIFF file, and a block of EXIF, which is a small one."""

import struct
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

MAX_TAGS: Final = 4096
# Bytes of a value by its type's number; what is not here is read by nobody.
SIZES: Final = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
INTEGERS: Final = {1: "u1", 3: "u2", 4: "u4", 8: "i2", 9: "i4", 13: "u4", 16: "u8"}


class DirectoryError(ValueError):
    """The bytes are no such list."""


@dataclass(slots=True)
class Entry:
    """A tag's place.

    Attributes:
        kind: number of its values' type.
        count: of its values.
        raw: the entry as it lies in the file.
        start: where its values begin in the file.
        size: bytes that they take.
    """

    kind: int
    count: int
    raw: bytes
    start: int
    size: int


@dataclass(slots=True)
class Directory:
    """The first list of tags in `data`.

    Attributes:
        order: "<" little-endian, ">" big-endian.
        is_big: BigTIFF, whose numbers have 64 bits.
        entries: by tag; of a tag that comes twice the first.
        count: of the tags in the file.
    """

    data: bytes
    order: str
    is_big: bool
    entries: dict[int, Entry]
    count: int

    def first(self, tag: int, default: int | None = None) -> int | None:
        """Return a tag's first value; the default where there is no such tag, or no whole number in it."""
        entry = self.entries.get(tag)
        if entry is None or entry.kind not in INTEGERS or not entry.count:
            return default
        size = SIZES[entry.kind]
        value = self.data[entry.start : entry.start + size]
        if len(value) < size:
            raise DirectoryError
        return int.from_bytes(value, "little" if self.order == "<" else "big", signed=entry.kind in (8, 9))

    def all(self, tag: int) -> NDArray[Any]:
        """Return a tag's whole numbers, int [count]; empty where there is no such tag."""
        entry = self.entries.get(tag)
        if entry is None or entry.kind not in INTEGERS:
            return np.empty(0, np.int64)
        if entry.start + entry.size > len(self.data):
            raise DirectoryError
        return np.frombuffer(self.data, self.order + INTEGERS[entry.kind], entry.count, entry.start)


def read_directory(data: bytes) -> Directory:
    """Read the list of tags that a TIFF header points to.

    Raises:
        DirectoryError: there is no header, or the list is not whole.
    """
    order = {b"II": "<", b"MM": ">"}.get(data[:2])
    if order is None or len(data) < 8:
        raise DirectoryError
    is_big = 43 in data[2:4]
    try:
        if is_big:
            (offset,) = struct.unpack_from(order + "Q", data, 8)
            (count,) = struct.unpack_from(order + "Q", data, offset)
            begin, form, number = offset + 8, struct.Struct(order + "HHQ8s"), struct.Struct(order + "Q")
        else:
            (offset,) = struct.unpack_from(order + "I", data, 4)
            (count,) = struct.unpack_from(order + "H", data, offset)
            begin, form, number = offset + 2, struct.Struct(order + "HHI4s"), struct.Struct(order + "I")
    except (struct.error, OverflowError) as error:
        raise DirectoryError from error
    read = min(count, MAX_TAGS)
    end = begin + read * form.size
    if end > len(data):
        raise DirectoryError
    entries: dict[int, Entry] = {}
    inline = number.size
    for position in range(begin, end, form.size):
        tag, kind, values, raw = form.unpack_from(data, position)
        if kind not in SIZES or tag in entries:
            continue
        size = values * SIZES[kind]
        start = position + form.size - inline if size <= inline else number.unpack(raw)[0]
        entries[tag] = Entry(kind, values, data[position : position + form.size], start, size)
    return Directory(data, order, is_big, entries, count)
