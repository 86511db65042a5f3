"""Files that are made to cost a decoder seconds or gigabytes, while others send small images.

Small requests beside each of them are compared with small requests beside as many ordinary photographs: a service that
keeps its promise makes no difference.
"""

import asyncio
import contextlib
import multiprocessing
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Final, cast

import numpy as np
from PIL import Image

from benchmarks.rivals.process_tree import tree_cpu_seconds
from benchmarks.server import rss_bytes
from tests.chaos.client import IMAGES, Wire
from tests.imaging.files import encode, pixels
from tests.imaging.test_costly import HARMLESS, REFUSED

CPU_S: Final = 1.0  # for an image
MEMORY_BYTES: Final = 300 << 20  # likewise
PROCESSES: Final = 2
SETTINGS: Final = (
    f"--decode-processes={PROCESSES}",
    f"--decode-cpu-s={CPU_S}",
    f"--decode-memory-bytes={MEMORY_BYTES}",
    "--decode-timeout-s=100",  # CPU time is what is judged, however busy the machine is
    "--request-timeout-ms=120000",
)
SENDERS: Final = 4
PROBERS: Final = 2
RESTART_CPU_S: Final = 1.0  # of a process, and what small requests take meanwhile
SPARE_BYTES: Final = 64 << 20
COPIES: Final = 4  # of a body: as it came, joined, on its way to a process, and there
ANSWER_TIMEOUT_S: Final = 150.0
MAX_RATIO: Final = 4.0
DESERVED: Final = frozenset({200, 400, 413, 415})
FORM: Final = "multipart/form-data; boundary=b"
EMPTY_PART: Final = b'--b\r\nContent-Disposition: form-data; name="f"; filename=""\r\n\r\n\r\n'


def photograph() -> bytes:
    """An ordinary image of two megapixels."""
    return encode(pixels(1200, 1600), "JPEG", quality=90)


# What no structure tells: it is stopped while it is decoded, or is as cheap as its pixels are many.
LARGE: dict[str, Callable[[], bytes]] = {
    "PNG, 49 million pixels": lambda: encode(Image.new("RGB", (7000, 7000)), "PNG"),
    "PNG, 49 million pixels with alpha": lambda: encode(Image.new("RGBA", (7000, 7000)), "PNG"),
    "WebP, 16 million pixels": lambda: encode(Image.new("RGBA", (4000, 4000)), "WEBP", quality=0, method=0),
    "TIFF, 49 million pixels": lambda: encode(Image.new("L", (7000, 7000)), "TIFF", compression="tiff_lzw"),
    "JPEG, progressive, 16 million pixels": lambda: encode(Image.new("L", (4000, 4000)), "JPEG", progressive=True),
}
FORMS: dict[str, Callable[[], bytes]] = {
    "form, 4 MB of empty files": lambda: EMPTY_PART * ((4 << 20) // len(EMPTY_PART)) + b"--b--\r\n",
}
ROWS: Final[dict[str, Callable[[], bytes]]] = {
    **REFUSED,
    **{f"{name}, passed over": make for name, make in HARMLESS.items()},
    **LARGE,
    **FORMS,
}


@dataclass
class Seen:
    """What sending one file again and again has done.

    Attributes:
        size: bytes of the file.
        statuses: how often each was the answer.
        cpu_s: CPU time of the service and its processes for one such request.
        memory: bytes that these had at most, above what they had before.
        latencies: seconds of the small requests beside it.
        small_statuses: their answers.
    """

    size: int
    statuses: Counter[int] = field(default_factory=Counter)
    cpu_s: float = 0.0
    memory: int = 0
    latencies: list[float] = field(default_factory=list)
    small_statuses: Counter[int] = field(default_factory=Counter)

    @property
    def p99(self) -> float:
        """Of the small requests, in seconds."""
        return float(np.percentile(self.latencies, 99))

    def row(self, name: str, ratio: float) -> str:
        """One line of the report."""
        answers = " ".join(f"{status} x {count}" for status, count in sorted(self.statuses.items()))
        return (
            f"{name:52} {self.size / 1000:8.0f} KB {self.cpu_s * 1000:7.1f} ms CPU {self.memory >> 20:5} MiB "
            f"p99 beside it {self.p99 * 1000:6.1f} ms ({ratio:4.2f}), {answers}"
        )

    def complaints(self, name: str) -> list[str]:
        """What was not as promised; times of the small requests are not judged here."""
        found = []
        if not set(self.statuses) <= DESERVED or not self.statuses:
            found.append(f"{name}: was answered {dict(self.statuses)}")
        if set(self.small_statuses) != {200}:
            found.append(f"{name}: small requests beside it were answered {dict(self.small_statuses)}")
        if self.cpu_s > CPU_S + RESTART_CPU_S:
            found.append(f"{name}: took {self.cpu_s:.2f} s of CPU time")
        most = PROCESSES * MEMORY_BYTES + COPIES * SENDERS * self.size + SPARE_BYTES
        if self.memory > most:
            found.append(f"{name}: took {self.memory >> 20} MiB, and may take {most >> 20}")
        return found


Sample = tuple[list[float], Counter[int]]  # seconds of the small requests, and their answers


class Probers:
    """Send small requests in a process of their own: a client that writes megabytes would delay them itself."""

    def __init__(self, address: tuple[str, int]) -> None:
        spawn = multiprocessing.get_context("spawn")
        self._connection, theirs = spawn.Pipe()
        self._process = spawn.Process(target=answer_commands, args=(theirs, address), daemon=True)
        self._process.start()

    def begin(self) -> None:
        """Start sending."""
        self._connection.send("begin")
        self._connection.recv()

    def end(self) -> Sample:
        """Stop sending; what was seen."""
        self._connection.send("end")
        return cast(Sample, self._connection.recv())

    def close(self) -> None:
        """End the process."""
        self._connection.close()
        self._process.join()


def answer_commands(connection: Connection, address: tuple[str, int]) -> None:
    """Probe between each two commands, until the other side has closed."""
    with contextlib.suppress(EOFError):
        while connection.recv():
            connection.send("begun")
            connection.send(asyncio.run(probe(address, connection)))


async def probe(address: tuple[str, int], connection: Connection) -> Sample:
    """Send small images until there is a command."""
    latencies: list[float] = []
    statuses: Counter[int] = Counter()

    async def prober() -> None:
        while not connection.poll():
            begun = time.perf_counter()
            statuses[await send(address, IMAGES["PNG"], "image/png")] += 1
            latencies.append(time.perf_counter() - begun)
            await asyncio.sleep(0.005)

    await asyncio.gather(*(prober() for _ in range(PROBERS)))
    connection.recv()
    return latencies, statuses


async def send(address: tuple[str, int], data: bytes, kind: str) -> int:
    """Post a body over a connection of its own; its status."""
    reader, writer = await asyncio.open_connection(*address)
    try:
        with contextlib.suppress(ConnectionError):
            await Wire(reader, writer).post(data, kind)
        async with asyncio.timeout(ANSWER_TIMEOUT_S):
            return int((await reader.readline()).split()[1])
    finally:
        writer.close()


async def press(
    address: tuple[str, int], pid: int, probers: Probers, body: bytes, content_type: str, seconds: float
) -> Seen:
    """Send a file over several connections for so long, and small images beside it."""
    seen = Seen(len(body))
    probers.begin()
    until = time.monotonic() + seconds
    before, cpu_before = memory_of(pid), tree_cpu_seconds(pid) or 0.0

    async def sender() -> None:
        while not seen.statuses or time.monotonic() < until:
            seen.statuses[await send(address, body, content_type)] += 1

    async def watcher() -> None:
        while True:
            seen.memory = max(seen.memory, memory_of(pid) - before)
            await asyncio.sleep(0.005)

    watching = asyncio.create_task(watcher())
    await asyncio.gather(*(sender() for _ in range(SENDERS)))
    watching.cancel()
    seen.latencies, seen.small_statuses = probers.end()
    seen.cpu_s = ((tree_cpu_seconds(pid) or 0.0) - cpu_before) / seen.statuses.total()
    return seen


def memory_of(pid: int) -> int:
    """Bytes resident in a service and its processes."""
    return sum(rss_bytes(other) or 0 for other in (pid, *children(pid)))


def children(pid: int) -> list[int]:
    try:
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def costly(address: tuple[str, int], pid: int, seconds: float, names: list[str] | None = None) -> list[str]:
    """Send each row, print what it did, return what was not as promised; ratios are judged where all rows are sent."""
    complaints: list[str] = []
    with contextlib.closing(Probers(address)) as probers:
        ordinary = asyncio.run(press(address, pid, probers, photograph(), "image/jpeg", 2 * seconds))
        print(ordinary.row("an ordinary photograph", 1.0), flush=True)
        for name in names or ROWS:
            kind = FORM if name in FORMS else "application/octet-stream"
            seen = asyncio.run(press(address, pid, probers, ROWS[name](), kind, seconds))
            ratio = seen.p99 / ordinary.p99
            print(seen.row(name, ratio), flush=True)
            complaints += seen.complaints(name)
            if names is None and ratio > MAX_RATIO:
                complaints.append(f"{name}: the p99 of small requests was {ratio:.1f} times that beside photographs")
    return complaints
