"""What is in the house, counted by several processes: each writes a row of its own, and all read the sum.

Nothing is locked: between the look at the sum and the entry another process may enter something too, so a limit can be
exceeded by what one request holds for each other process. It is never exceeded for longer than those requests stay.
"""

import mmap
import os
import time
from typing import Final

from service.admission import Admission, Ticket

PICTURES: Final = 0
BYTES: Final = 1
CONNECTIONS: Final = 2
IN_FLIGHT: Final = 3
RATE: Final = 4  # pictures that leave in a thousand seconds
BYTE_RATE: Final = 5  # bytes that leave in a second
COLUMNS: Final = 6


class Ledger:
    """Whole numbers in memory that processes share.

    Args:
        rows: one for each process that writes.
        descriptor: of the memory of another process's ledger; -1 makes a new one.

    Attributes:
        rows: as given.
        descriptor: to be passed on to other processes.
    """

    def __init__(self, rows: int, descriptor: int = -1) -> None:
        size = (rows * COLUMNS + 1) * 8
        is_new = descriptor < 0
        if is_new:
            descriptor = os.memfd_create("ledger")
            os.truncate(descriptor, size)
        self.rows = rows
        self.descriptor = descriptor
        cells = memoryview(mmap.mmap(descriptor, size)).cast("q")
        self._cells, self._beat = cells[:-1], cells[-1:]
        if is_new:
            self.beat()

    def write(self, row: int, column: int, value: int) -> None:
        """Enter a number. Only the process that the row belongs to may."""
        self._cells[row * COLUMNS + column] = value

    def read(self, row: int, column: int) -> int:
        """Return a number."""
        return self._cells[row * COLUMNS + column]

    def total(self, column: int) -> int:
        """Return the sum over all rows."""
        return sum(self._cells[column::COLUMNS].tolist())

    def clear(self, row: int) -> None:
        """Forget a process that has ended."""
        for column in range(COLUMNS):
            self.write(row, column, 0)

    def beat(self) -> None:
        """Show that the process which made this ledger is not stuck. Only that process may."""
        self._beat[0] = time.monotonic_ns()

    def silence(self) -> float:
        """Return the seconds since it did."""
        return (time.monotonic_ns() - self._beat[0]) / 1e9


class Totals:
    """What all processes have let in; a `House`."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    @property
    def pictures(self) -> int:
        """Pictures."""
        return self._ledger.total(PICTURES)

    @property
    def bytes(self) -> int:
        """Bytes of bodies."""
        return self._ledger.total(BYTES)


class SharedAdmission(Admission):
    """An `Admission` whose limits hold for all processes of a ledger together.

    Args:
        max_pictures: pictures that may be in the house at once.
        max_bytes: bytes of request bodies that may be held at once.
        ledger: where this process enters what it has taken.
        row: its row.
    """

    def __init__(self, max_pictures: int, max_bytes: int, ledger: Ledger, row: int) -> None:
        super().__init__(max_pictures, max_bytes)
        self._ledger = ledger
        self._row = row

    def is_full(self, pictures: int = 1, size: int = 0) -> bool:
        """Whether there is no room for so many pictures, or for so many bytes, counting what all processes hold."""
        self._look_elsewhere()
        return super().is_full(pictures, size)

    def retry_after(self, size: int = 0) -> float:
        """Seconds until what is in the house will have left, at the rate of all processes."""
        self._look_elsewhere()
        self.rate_elsewhere = self._elsewhere(RATE) / 1000
        self.byte_rate_elsewhere = self._elsewhere(BYTE_RATE)
        return super().retry_after(size)

    def _elsewhere(self, column: int) -> int:
        return self._ledger.total(column) - self._ledger.read(self._row, column)

    def _look_elsewhere(self) -> None:
        self.pictures_elsewhere = self._ledger.total(PICTURES) - self.pictures
        self.bytes_elsewhere = self._ledger.total(BYTES) - self.bytes

    def _take(self, ticket: Ticket, pictures: int, size: int) -> None:
        super()._take(ticket, pictures, size)
        self._enter()

    def _give_back(self, pictures: int, size: int) -> None:
        super()._give_back(pictures, size)
        self._enter()

    def _measure(self, elapsed: float) -> None:
        super()._measure(elapsed)
        self._ledger.write(self._row, RATE, round(1000 * self._rate))
        self._ledger.write(self._row, BYTE_RATE, round(self._byte_rate))

    def _enter(self) -> None:
        self._ledger.write(self._row, PICTURES, self.pictures)
        self._ledger.write(self._row, BYTES, self.bytes)
