"""The load: requests at given times (open loop), as fast as answers come (closed loop), or each of a list once.

All over keep-alive connections. In the open loop the arrival times are fixed in advance and latency counts from them,
whatever the server does: a request that had to wait because all connections were busy has waited, and is not left out
("coordinated omission").

This runs in a process of its own, see `benchmarks.processes`; nothing here knows what an image is.
"""

import asyncio
import itertools
import resource
import selectors
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from benchmarks.client import Client, DisconnectedError

MAX_CONNECTIONS = 900  # in one process: select() takes descriptors below 1,024
RECONNECT_S = 0.02

TIMED_OUT, DISCONNECTED = "client_timeout", "disconnected"


@dataclass(frozen=True)
class Plan:
    """What one process sends.

    Attributes:
        host, port: the server.
        requests: whole requests, sent in turn.
        connections: how many at once, at most.
        seconds: how long the load lasts; None: each request once, in order.
        arrivals: open loop: seconds after the start, ascending; None: closed loop.
        first, stride: of the numbered requests this process sends number `first` and every `stride`th after it.
        timeout_s: seconds from a request's scheduled time after which its client gives up.
        keep_bodies: keep every answer's body, not only those of errors.
        apart: send head and body in two writes.
    """

    host: str
    port: int
    requests: Sequence[bytes]
    connections: int
    seconds: float | None = None
    arrivals: NDArray[np.float64] | None = None
    timeout_s: float = 30.0
    keep_bodies: bool = False
    apart: bool = False
    first: int = 0
    stride: int = 1


@dataclass
class Records:
    """What happened, one entry a request, in the order of the answers. Times in seconds of the monotonic clock.

    Attributes:
        number: of the request, counted over all processes; modulo the list's length its place in the plan's list.
        scheduled: when it was to be sent; in a closed loop, when its connection became free.
        sent: when it was sent.
        ended: when its answer was complete.
        status: HTTP status; 0 where there was no answer.
        failure: why there was none; "" where there was.
        server_timing: value of that header.
        body: of errors, and of all with `keep_bodies`; else b"".
        cpu_seconds: CPU time of the sending process.
    """

    number: list[int] = field(default_factory=list)
    scheduled: list[float] = field(default_factory=list)
    sent: list[float] = field(default_factory=list)
    ended: list[float] = field(default_factory=list)
    status: list[int] = field(default_factory=list)
    failure: list[str] = field(default_factory=list)
    server_timing: list[bytes] = field(default_factory=list)
    body: list[bytes] = field(default_factory=list)
    cpu_seconds: float = 0.0

    def __len__(self) -> int:
        return len(self.number)

    def extend(self, other: "Records") -> None:
        """Append another process's records."""
        for name in ("number", "scheduled", "sent", "ended", "status", "failure", "server_timing", "body"):
            getattr(self, name).extend(getattr(other, name))
        self.cpu_seconds += other.cpu_seconds


def arrival_times(rate: float, seconds: float, kind: Literal["poisson", "even"], seed: int = 0) -> NDArray[np.float64]:
    """Fix when requests arrive.

    Args:
        rate: mean arrivals a second.
        seconds: length of the load.
        kind: "poisson" as from many clients that know nothing of each other; "even" at equal distances.
        seed: of the Poisson process.

    Returns:
        float64 [n], seconds in [0, seconds), ascending.
    """
    if kind == "even":
        return np.arange(int(np.floor(rate * seconds))) / rate
    rng = np.random.default_rng(seed)
    return np.sort(rng.uniform(0, seconds, rng.poisson(rate * seconds)))


def split_plan(plan: Plan, processes: int) -> list[Plan]:
    """Deal a plan out to processes: requests in turn, connections as evenly as can be; none gets no connection."""
    n = min(processes, plan.connections)
    shares = [plan.connections // n + (index < plan.connections % n) for index in range(n)]
    return [replace(plan, connections=share, first=index, stride=n) for index, share in enumerate(shares)]


class Generator:
    """Runs one plan in the current event loop."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._clients = [Client(plan.host, plan.port, apart=plan.apart) for _ in range(plan.connections)]
        self._records = Records()

    async def connect(self) -> None:
        """Open the connections of a closed loop, so that the load does not begin with that; of an open loop the first.

        Raises:
            DisconnectedError: nobody listens.
        """
        for client in self._clients if self._plan.arrivals is None else self._clients[-1:]:
            await client.connect()

    async def run(self, start: float) -> Records:
        """Send from `start` (monotonic clock, seconds) on, and wait for all answers."""
        before = cpu_seconds()
        await sleep_until(start)
        if self._plan.arrivals is None:
            await self._closed_loop(self._numbers(start + (self._plan.seconds or 0)))
        else:
            await self._open_loop(self._plan.arrivals + start)
        for client in self._clients:
            client.close()
        self._records.cpu_seconds = cpu_seconds() - before
        return self._records

    def _numbers(self, end: float) -> Iterator[int]:
        """Yield the numbers of this process's requests: until `end`, or each of the list once."""
        if self._plan.seconds is None:
            yield from range(self._plan.first, len(self._plan.requests), self._plan.stride)
            return
        for number in itertools.count(self._plan.first, self._plan.stride):
            if time.monotonic() >= end:
                return
            yield number

    async def _closed_loop(self, numbers: Iterator[int]) -> None:
        async def drive(client: Client) -> None:
            for number in numbers:
                await self._send(client, number, time.monotonic())

        async with asyncio.TaskGroup() as group:
            for client in self._clients:
                group.create_task(drive(client))

    async def _open_loop(self, moments: NDArray[np.float64]) -> None:
        # Last in, first out: no more connections are opened than the load needs.
        free: asyncio.LifoQueue[Client] = asyncio.LifoQueue()
        for client in self._clients:
            free.put_nowait(client)

        async def send(client: Client, number: int, scheduled: float) -> None:
            await self._send(client, number, scheduled)
            free.put_nowait(client)

        async with asyncio.TaskGroup() as group:
            for number in range(self._plan.first, len(moments), self._plan.stride):
                scheduled = float(moments[number])
                await sleep_until(scheduled)
                group.create_task(send(await free.get(), number, scheduled))

    async def _send(self, client: Client, number: int, scheduled: float) -> None:
        plan, records = self._plan, self._records
        sent = time.monotonic()
        status, failure, timing, body = 0, "", b"", b""
        remaining_s = scheduled + plan.timeout_s - sent
        try:
            if remaining_s <= 0:
                raise TimeoutError
            answer = await client.send(plan.requests[number % len(plan.requests)], remaining_s)
            status, timing = answer.status, answer.server_timing
            body = answer.body if status != 200 or plan.keep_bodies else b""
        except TimeoutError:
            failure = TIMED_OUT
        except DisconnectedError:
            failure = DISCONNECTED
        ended = time.monotonic()
        records.number.append(number)
        records.scheduled.append(scheduled)
        records.sent.append(sent)
        records.ended.append(ended)
        records.status.append(status)
        records.failure.append(failure)
        records.server_timing.append(timing)
        records.body.append(body)
        if failure == DISCONNECTED:
            await asyncio.sleep(RECONNECT_S)  # a server that is gone must not be asked in a tight loop


async def sleep_until(moment: float) -> None:
    """Sleep until a moment of the monotonic clock; not at all when it has passed."""
    delay = moment - time.monotonic()
    if delay > 0:
        await asyncio.sleep(delay)


def new_event_loop() -> asyncio.AbstractEventLoop:
    """Make a loop whose timers are exact; those of epoll and of uvloop are rounded up to whole milliseconds.

    With 64 connections it costs as little as uvloop does.
    """
    return asyncio.SelectorEventLoop(selectors.SelectSelector())


def cpu_seconds() -> float:
    """CPU time of this process, user and system, in seconds."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime
