"""The processes that speak HTTP, seen from the one that runs the model: started, told, listened to, replaced.

One Python process can parse and decode some thousand requests a second, which is less than a GPU can classify. So HTTP
may have processes of its own (`http_processes`). Each has listening sockets of its own on the same address, among which
the kernel spreads the connections; their pictures meet in the one batcher of the live model.
"""

import asyncio
import logging
import socket
import sys
import time
from collections.abc import Sequence
from itertools import groupby
from typing import Final

from starlette.types import ASGIApp

from service.errors import ServiceError
from service.fair_queue import Prediction
from service.ledger import IN_FLIGHT, Ledger, Totals
from service.link import Link
from service.messages import (
    Alive,
    Ask,
    Call,
    Called,
    Cancel,
    Counts,
    FromFront,
    Listening,
    Message,
    Released,
    State,
    Submit,
)
from service.models import LiveModel
from service.state import Service
from service.translation import Recorded, pack, refusal, scope_of

logger = logging.getLogger(__name__)

TELL_SECONDS: Final = 0.02  # how late a new state may be noticed
ASK_SECONDS: Final = 1.0  # between two askings for counts
HANG_SECONDS: Final = 30.0  # a process that has not answered for so long is replaced
PATIENCE_SECONDS: Final = 1.0  # that a scrape waits for the newest counts
FIRST_PAUSE_SECONDS: Final = 0.1  # before a process that has ended is started anew; doubled each time
LONGEST_PAUSE_SECONDS: Final = 5.0
MOST_FAILURES: Final = 3  # to start, in a row
STOP_SECONDS: Final = 3.0  # to end, after what was accepted has been answered


class Reply:
    """Where the answer to a process's request goes; an `Outcome`."""

    __slots__ = ("_front", "_is_cancelled", "_is_done", "_number")

    def __init__(self, front: "FrontProcess", number: int) -> None:
        self._front = front
        self._number = number
        self._is_done = self._is_cancelled = False

    def done(self) -> bool:
        """Whether it has ended, or nobody waits for it."""
        return self._is_done

    def cancelled(self) -> bool:
        """Whether nobody waits for it."""
        return self._is_cancelled

    def cancel(self) -> None:
        """Take note that nobody waits for it any more."""
        self._is_done = self._is_cancelled = True

    def set_result(self, result: list[Prediction]) -> None:
        """Send the answer."""
        self._is_done = True
        self._front.answer(self._number, result)

    def set_exception(self, exception: Exception) -> None:
        """Send the error."""
        self._is_done = True
        self._front.refuse(self._number, exception)


class FrontProcess:
    """One process that speaks HTTP, its link, and what it waits for. Outlives the process: another may take its place.

    Args:
        row: its number, and its row in the ledger.
        house: it and those like it.
        service: what they are the front of.
        routes: the application behind all other routes than /predict.
        ledger: what is in the house.
        sockets: that it listens on.

    Attributes:
        is_listening: whether it accepts connections.
        has_listened: whether the process that ran last has come so far.
        heard: when it last said something, by `time.monotonic`.
    """

    def __init__(
        self,
        row: int,
        house: "FrontProcesses",
        service: Service,
        routes: ASGIApp,
        ledger: Ledger,
        sockets: Sequence[socket.socket],
    ) -> None:
        self.row = row
        self.is_listening = asyncio.Event()
        self.has_listened = False
        self.heard = 0.0
        self._house = house
        self._service = service
        self._routes = routes
        self._ledger = ledger
        self._sockets = sockets
        self._link: Link | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._replies: dict[int, Reply] = {}
        self._answers: list[tuple[int, list[Prediction]]] = []
        self._calls: set[asyncio.Task[None]] = set()
        self._models: dict[int, LiveModel] = {}  # those that it holds, by number
        self._newest = 0
        self._told: State | None = None
        self._asked = 0
        self._alive = asyncio.Event()

    # The process

    async def run(self) -> int:
        """Start the process, and serve it until it has ended; return its exit status."""
        ours, theirs = socket.socketpair()
        with theirs:
            descriptors = [theirs.fileno(), self._ledger.descriptor, *(one.fileno() for one in self._sockets)]
            numbers = [descriptors[0], descriptors[1], self._ledger.rows, self.row, *descriptors[2:]]
            self._process = process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "service.front_process",
                *map(str, numbers),
                stdin=asyncio.subprocess.PIPE,
                pass_fds=descriptors,
            )
        self.has_listened = False
        self._link = link = Link(FromFront, self._received, lambda: None, self._collect)
        await Link.open(ours, link)
        self.tell()
        try:
            await process.communicate(self._house.settings)
            return await process.wait()
        finally:
            self._process = None
            self._end()

    def kill(self) -> None:
        """End the process at once."""
        if self._process is not None:
            self._process.kill()

    @property
    def pid(self) -> int | None:
        """Of the process, unless it has ended."""
        return None if self._process is None else self._process.pid

    def _end(self) -> None:
        """Nobody waits any more."""
        if self._link is not None:
            self._link.close()
            self._link = None
        self.is_listening.clear()
        self._ledger.clear(self.row)
        for reply in self._replies.values():
            reply.cancel()
        self._replies.clear()
        self._answers.clear()
        for model in self._models.values():
            model.__exit__()
        self._models.clear()
        self._told = None
        for task in self._calls:
            task.cancel()

    # What it is told

    def tell(self) -> None:
        """Tell it what is true now, unless it knows."""
        if self._link is None:
            return
        service = self._service
        live = service.store.live
        told = self._told
        is_new = live is not None and self._models.get(self._newest) is not live
        if told is not None and not is_new and (told.status, told.failure) == (service.status, service.failure):
            return
        version, metadata = 0, b""
        if live is not None:
            version = live.version
            if is_new:
                self._newest += 1
                self._models[self._newest] = live.__enter__()
                metadata = live.metadata.model_dump_json().encode()
        seconds = self._house.drain_seconds
        self._told = State(service.status, service.failure, self._newest, version, metadata, seconds)
        self._link.send(self._told)

    async def ask(self) -> None:
        """Return when it has sent what it has counted, or after a while without."""
        if self._link is None or not self.is_listening.is_set():
            return
        self._asked += 1
        self._alive.clear()
        self._link.send(Ask(self._asked))
        try:
            async with asyncio.timeout(PATIENCE_SECONDS):
                await self._alive.wait()
        except TimeoutError:
            logger.warning("the HTTP process %d takes long to answer", self.row)

    def answer(self, number: int, predictions: list[Prediction]) -> None:
        """Send an answer, with all others of this turn."""
        self._replies.pop(number, None)
        self._answers.append((number, predictions))
        if self._link is not None:
            self._link.wake()

    def refuse(self, number: int, error: Exception) -> None:
        """Send an error."""
        self._replies.pop(number, None)
        if self._link is not None:
            self._link.send(refusal(number, error))

    def _collect(self) -> None:
        """Make messages of the answers."""
        answers, self._answers = self._answers, []
        if answers and self._link is not None:
            for _, alike in groupby(answers, key=lambda answer: answer[1][0].outputs.logits.shape[1]):
                self._link.send(pack(alike))

    # What it says

    def _received(self, messages: Sequence[Message]) -> None:
        self.heard = time.monotonic()
        for message in messages:
            match message:
                case Submit():
                    self._submit(message)
                case Cancel():
                    if (reply := self._replies.pop(message.number, None)) is not None:
                        reply.cancel()
                case Call():
                    task = asyncio.create_task(self._call(message))
                    self._calls.add(task)
                    task.add_done_callback(self._calls.discard)
                case Counts():
                    self._count(message)
                case Alive():
                    if message.number == self._asked:
                        self._alive.set()
                case Listening():
                    self.has_listened = True
                    self.is_listening.set()
                case Released():
                    self._models.pop(message.model).__exit__()

    def _submit(self, message: Submit) -> None:
        number, model = message.number, self._models[message.model]
        reply = self._replies[number] = Reply(self, number)
        try:
            model.batcher.post(message.pictures, reply, message.deadline)
        except Exception as error:
            self.refuse(number, error)

    async def _call(self, message: Call) -> None:
        """Answer a request for another route."""
        if message.path == "/metrics":
            await self._house.ask_all()
        answer = Recorded()
        try:
            await self._routes(scope_of(message), answer.receive, answer.send)
        except Exception as error:
            if not isinstance(error, ServiceError):
                logger.exception("request %s failed", message.request_id, extra={"request_id": message.request_id})
            if not answer.status:
                self.refuse(message.number, error)
                return
        self._house.tell()  # a reload should be true everywhere before its answer is read
        if self._link is not None:
            self._link.send(Called(message.number, answer.status, answer.headers, b"".join(answer.body)))

    def _count(self, counts: Counts) -> None:
        metrics = self._service.metrics
        for route, status, number in counts.answered:
            metrics.request(route, status, number)
        for code, number in counts.rejected:
            metrics.rejected(code, number)
        for seconds, request_id in counts.request_seconds:
            metrics.predicted(seconds, request_id)
        for seconds in counts.decode_seconds:
            metrics.decoded(seconds)


class FrontProcesses:
    """All processes that speak HTTP. Belongs to one event loop.

    Args:
        service: what they are the front of; what is in its house is what they let in.
        routes: the application behind all other routes than /predict.
        sockets: of each process, those that it listens on.

    Attributes:
        settings: what each process is told at its start.
    """

    def __init__(self, service: Service, routes: ASGIApp, sockets: Sequence[Sequence[socket.socket]]) -> None:
        self._service = service
        self._sockets = sockets
        self._ledger = Ledger(len(sockets))
        self._drain_until = 0.0
        # Made once: a process that is started later must not ask for other keys, whatever became of their file.
        self.settings = service.settings.for_http_process()
        self._fronts = [FrontProcess(row, self, service, routes, self._ledger, own) for row, own in enumerate(sockets)]
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
        self.tell()
        for own in self._sockets:
            for one in own:
                one.close()  # or the kernel would go on taking connections in

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
        while True:
            begun = time.monotonic()
            status = await front.run()
            if self._service.draining or self._service.failure:
                return
            failures = 0 if front.has_listened else failures + 1
            if failures >= MOST_FAILURES:
                self._service.fail(f"the HTTP process {front.row} ended {failures} times before it could listen")
                return
            logger.error("the HTTP process %d has ended with status %d; it is started anew", front.row, status)
            self._service.metrics.http_process_restarts.inc()
            pause = FIRST_PAUSE_SECONDS if time.monotonic() - begun > 60 else min(2 * pause, LONGEST_PAUSE_SECONDS)
            await asyncio.sleep(pause)

    async def _tell_for_ever(self) -> None:
        while True:
            self.tell()
            await asyncio.sleep(TELL_SECONDS)

    async def _ask_for_ever(self) -> None:
        while True:
            await asyncio.sleep(ASK_SECONDS)
            await self.ask_all()
            for front in self._fronts:
                if front.is_listening.is_set() and time.monotonic() - front.heard > HANG_SECONDS:
                    logger.critical("the HTTP process %d has hung for %g s; it is killed", front.row, HANG_SECONDS)
                    front.kill()
