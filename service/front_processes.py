"""The processes that speak HTTP, all together: started, told, asked, replaced.

One Python process can parse and decode some thousand requests a second, which is less than a GPU can classify. So HTTP
may have processes of its own (`http_processes`). Each has listening sockets of its own on the same address, among which
the kernel spreads the connections; their pictures meet in the one batcher of the live model.
"""

import asyncio
import logging
import socket
import time
from collections.abc import Sequence
from typing import Final

from starlette.types import ASGIApp

from service.front_peer import FrontProcess
from service.ledger import IN_FLIGHT, Ledger, Totals
from service.state import Service

logger = logging.getLogger(__name__)

TELL_SECONDS: Final = 0.02  # how late a new state may be noticed
ASK_SECONDS: Final = 1.0  # between two askings for counts
HANG_SECONDS: Final = 30.0  # a process that has not answered for so long is replaced
START_SECONDS: Final = 60.0  # likewise one that does not come to listen
FIRST_PAUSE_SECONDS: Final = 0.1  # before a process that has ended is started anew; doubled each time
LONGEST_PAUSE_SECONDS: Final = 5.0
MOST_FAILURES: Final = 3  # to start, in a row


class FrontProcesses:
    """All processes that speak HTTP. Belongs to one event loop.

    Args:
        service: what they are the front of; what is in its house is what they let in.
        routes: the application behind all other routes than /predict.
        addresses: sockets bound to where they listen; see `service.sockets.reserve`.
        processes: how many.

    Attributes:
        settings: what each process is told at its start.
    """

    def __init__(self, service: Service, routes: ASGIApp, addresses: Sequence[socket.socket], processes: int) -> None:
        self._service = service
        self._ledger = Ledger(processes)
        self._drain_until = 0.0
        # Made once: a process that is started later must not ask for other keys, whatever became of their file.
        self.settings = service.settings.for_http_process()
        self._fronts = [FrontProcess(row, self, service, routes, self._ledger, addresses) for row in range(processes)]
        self._tasks: list[asyncio.Task[None]] = []
        service.house = Totals(self._ledger)
        service.metrics.http_processes.set_function(lambda: sum(front.is_listening.is_set() for front in self._fronts))
        service.metrics.each_http_process.pids = self.pids

    @property
    def in_flight(self) -> int:
        """Requests to /predict that are being answered."""
        return self._ledger.total(IN_FLIGHT)

    @property
    def drain_seconds(self) -> float:
        """Seconds left to finish what was accepted."""
        return max(0.0, self._drain_until - time.monotonic())

    def pids(self) -> dict[int, int]:
        """Return the ids of those processes that have not ended, by number."""
        return {front.row: pid for front in self._fronts if (pid := front.pid) is not None}

    def start(self) -> None:
        """Start the processes."""
        self._tasks = [asyncio.create_task(self._keep(front), name=f"front-{front.row}") for front in self._fronts]
        self._tasks += [asyncio.create_task(self._tell_for_ever()), asyncio.create_task(self._ask_for_ever())]
        for task in self._tasks:
            task.add_done_callback(self._ended)

    async def listening(self) -> None:
        """Return when all accept connections."""
        for front in self._fronts:
            await front.is_listening.wait()

    def tell(self) -> None:
        """Tell each what is true now, unless it knows."""
        for front in self._fronts:
            front.tell()

    async def ask_all(self) -> None:
        """Return when what was counted until now has been counted here."""
        await asyncio.gather(*(front.ask() for front in self._fronts))

    def drain(self, seconds: float) -> None:
        """Let each finish what it has accepted and end, within so many seconds."""
        self._drain_until = time.monotonic() + seconds
        self._service.draining = True  # not before: each is told once that it drains, and how long it may
        self.tell()

    @property
    def is_running(self) -> bool:
        """Whether any process has not ended."""
        return any(front.pid is not None for front in self._fronts)

    async def stop(self) -> None:
        """End those that have not."""
        for front in self._fronts:
            front.kill()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self._service.fail(f"the HTTP processes are not looked after any more: {error!r}")

    async def _keep(self, front: FrontProcess) -> None:
        """Start a process, and another in its place when it ends."""
        pause = FIRST_PAUSE_SECONDS
        failures = 0
        while not self._is_ending:
            begun = time.monotonic()
            how = await self._run(front)
            if self._is_ending:
                return
            failures = 0 if front.has_listened else failures + 1
            if failures >= MOST_FAILURES and not any(other.is_listening.is_set() for other in self._fronts):
                self._service.fail(f"the HTTP process {front.row} ended {failures} times before it could listen: {how}")
                return
            logger.error("the HTTP process %d %s; it is started anew", front.row, how)
            self._service.metrics.http_process_restarts.inc()
            pause = FIRST_PAUSE_SECONDS if time.monotonic() - begun > 60 else min(2 * pause, LONGEST_PAUSE_SECONDS)
            await asyncio.sleep(pause)

    async def _run(self, front: FrontProcess) -> str:
        """Start a process; say how it ended."""
        try:
            return f"has ended with status {await front.run()}"
        except OSError as error:  # no memory, no process, no open file left
            return f"could not be started: {error}"

    @property
    def _is_ending(self) -> bool:
        return self._service.leaving or self._service.draining or bool(self._service.failure)

    async def _tell_for_ever(self) -> None:
        while True:
            self._ledger.beat()
            self.tell()
            await asyncio.sleep(TELL_SECONDS)

    async def _ask_for_ever(self) -> None:
        while True:
            await asyncio.sleep(ASK_SECONDS)
            await self.ask_all()
            for front in self._fronts:
                patience = HANG_SECONDS if front.is_listening.is_set() else START_SECONDS
                if front.pid is not None and time.monotonic() - front.heard > patience:
                    logger.critical("the HTTP process %d has hung for %g s; it is killed", front.row, patience)
                    front.kill()
