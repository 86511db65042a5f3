"""One process that speaks HTTP, seen from the one that runs the model: its start and end, what it is told and says."""

import asyncio
import logging
import socket
import time
from collections.abc import Sequence
from itertools import groupby
from typing import Protocol

from starlette.types import ASGIApp

from service.asks import Asks
from service.errors import ServiceError
from service.fair_queue import Prediction
from service.front_start import spawn
from service.ledger import Ledger
from service.link import Link
from service.messages import (
    Alive,
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


class House(Protocol):
    """All processes that speak HTTP: `service.front_processes.FrontProcesses`."""

    @property
    def settings(self) -> bytes:
        """What each process is told at its start."""

    @property
    def drain_seconds(self) -> float:
        """Seconds left to finish what was accepted."""

    def tell(self) -> None:
        """Tell each what is true now, unless it knows."""

    async def ask_all(self) -> None:
        """Return when what was counted until now has been counted here."""


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
        addresses: sockets bound to where it listens.

    Attributes:
        is_listening: whether it accepts connections.
        has_listened: whether the process that ran last has come so far.
        heard: when it last said something, by `time.monotonic`.
    """

    def __init__(
        self,
        row: int,
        house: House,
        service: Service,
        routes: ASGIApp,
        ledger: Ledger,
        addresses: Sequence[socket.socket],
    ) -> None:
        self.row = row
        self.is_listening = asyncio.Event()
        self.has_listened = False
        self.heard = 0.0
        self._house = house
        self._service = service
        self._routes = routes
        self._ledger = ledger
        self._addresses = addresses
        self._link: Link | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._replies: dict[int, Reply] = {}
        self._answers: list[tuple[int, list[Prediction]]] = []
        self._calls: set[asyncio.Task[None]] = set()
        self._models: dict[int, LiveModel] = {}  # those that it holds, by number
        self._newest = 0
        self._told: State | None = None
        self._asks = Asks(row)

    # The process

    async def run(self) -> int:
        """Start the process, and serve it until it has ended; return its exit status.

        Raises:
            OSError: it could not be started.
        """
        self.has_listened = False
        self.heard = time.monotonic()
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                self._process = process = await spawn(
                    theirs, self._ledger, self.row, self._addresses, self._house.settings
                )
        except BaseException:
            ours.close()
            raise
        self._link = link = Link(FromFront, self._received, lambda: None, self._collect)
        try:
            await Link.open(ours, link)
            self.tell()
            return await process.wait()
        finally:
            self.kill()  # where it has not ended, this was cancelled or failed
            self._process = None
            self._end()

    def kill(self) -> None:
        """End the process at once, unless it has ended."""
        if self._process is not None and self._process.returncode is None:
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
        self._asks.end()
        self._ledger.clear(self.row)
        for reply in self._replies.values():
            reply.cancel()
        self._replies.clear()
        self._answers.clear()
        for model in self._models.values():
            model.__exit__()
        self._models.clear()
        self._told = None

    # What it is told

    def tell(self) -> None:
        """Tell it what is true now, unless it knows."""
        if self._link is None:
            return
        service = self._service
        live = service.store.live
        told = self._told
        is_new = live is not None and self._models.get(self._newest) is not live
        now = (service.status, service.failure, service.leaving)
        if told is not None and not is_new and (told.status, told.failure, told.leaving) == now:
            return
        version, metadata = 0, b""
        if live is not None:
            version = live.version
            if is_new:
                self._newest += 1
                self._models[self._newest] = live.__enter__()
                metadata = live.metadata.model_dump_json().encode()
        seconds = self._house.drain_seconds
        self._told = State(service.status, service.failure, self._newest, version, metadata, service.leaving, seconds)
        self._link.send(self._told)

    async def ask(self) -> None:
        """Return when it has sent what it has counted, or after a while without."""
        if self._link is None or not self.is_listening.is_set():
            return
        await self._asks.ask(self._link.send)

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
                case Call() if self._link is not None:
                    task = asyncio.create_task(self._call(message, self._link))
                    self._calls.add(task)
                    task.add_done_callback(self._calls.discard)
                case Counts():
                    self._count(message)
                case Alive():
                    self._asks.answer(message.number)
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

    async def _call(self, message: Call, link: Link) -> None:
        """Answer a request for another route. It goes on when the process that asked has ended: a reload is for all."""
        if message.path == "/metrics":
            await self._house.ask_all()
        answer = Recorded()
        try:
            await self._routes(scope_of(message), answer.receive, answer.send)
        except Exception as error:
            told = error
            if not isinstance(error, ServiceError):
                logger.exception("request %s failed", message.request_id, extra={"request_id": message.request_id})
                told = ServiceError()
            if not answer.status:
                link.send(refusal(message.number, told))
                return
        self._house.tell()  # a reload should be true everywhere before its answer is read
        link.send(Called(message.number, answer.status, answer.headers, b"".join(answer.body)))

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
