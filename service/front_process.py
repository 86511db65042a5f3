"""A process that only speaks HTTP: it parses, decodes and answers, and has its pictures classified by another process.

`service.front_processes` starts it, with its settings on standard input, and sockets and shared memory as descriptors.
"""

import asyncio
import math
import socket
import sys
from collections import Counter
from collections.abc import Sequence
from types import FrameType
from typing import Any, Final, Self, cast

from starlette.types import Receive, Scope, Send

from service import logs
from service.artifact import ModelMetadata
from service.entry import Entry
from service.errors import NotReady, ServiceError
from service.fair_queue import Image, Outcome, Pixels, Prediction
from service.front import Front, Status, known_route
from service.ledger import CONNECTIONS, IN_FLIGHT, Ledger, SharedAdmission
from service.link import Link
from service.messages import (
    Alive,
    Answered,
    Ask,
    Called,
    Cancel,
    Counts,
    FromEngine,
    Listening,
    Message,
    Refused,
    Released,
    State,
    Submit,
)
from service.predict import PredictEndpoint
from service.protocol import BoundedConfig
from service.server import Server, configuration
from service.settings import Settings
from service.translation import call_of, error_of, unpack

MOST_TIMES: Final = 1024  # in one message
GONE: Final = "The process that runs the model has ended."


class Notes:
    """What happened to requests, until it is sent to the process that has the metrics; a `RequestObserver`.

    Args:
        link: where to.
    """

    def __init__(self, link: Link) -> None:
        self._link = link
        self._forget()

    def request(self, route: str, status: int) -> None:
        """Count one answered request."""
        self._answered[known_route(route), status] += 1

    def predicted(self, seconds: float, request_id: str) -> None:
        """Time one request to /predict."""
        self._request_seconds.append((seconds, request_id))
        if len(self._request_seconds) >= MOST_TIMES:
            self.send()

    def decoded(self, seconds: float) -> None:
        """Time the decoding of one request's pictures."""
        self._decode_seconds.append(seconds)

    def rejected(self, code: str) -> None:
        """Count one request that ended in an error."""
        self._rejected[code] += 1

    def send(self) -> None:
        """Send them, and begin anew."""
        self._link.send(
            Counts(
                answered=[(route, status, number) for (route, status), number in self._answered.items()],
                rejected=list(self._rejected.items()),
                request_seconds=self._request_seconds,
                decode_seconds=self._decode_seconds,
            )
        )
        self._forget()

    def _forget(self) -> None:
        self._answered: Counter[tuple[str, int]] = Counter()
        self._rejected: Counter[str] = Counter()
        self._request_seconds: list[tuple[float, str]] = []
        self._decode_seconds: list[float] = []


class DistantModel:
    """A model that another process runs.

    Args:
        number: by which the other process knows it.
        version: number of its folder.
        metadata: of the file that runs.
        link: to that process.
        waiting: the requests that wait for it.
    """

    def __init__(self, number: int, version: int, metadata: ModelMetadata, link: Link, waiting: "Waiting") -> None:
        self.version = version
        self.metadata = metadata
        self.batcher = DistantBatcher(number, link, waiting)
        self._number = number
        self._link = link
        self._leases = 0
        self._is_retired = False

    def __enter__(self) -> Self:
        self._leases += 1
        return self

    def __exit__(self, *exception: object) -> None:
        self._leases -= 1
        self._release()

    def retire(self) -> None:
        """Say so as soon as no request holds it; no other will."""
        self._is_retired = True
        self._release()

    def _release(self) -> None:
        if self._is_retired and not self._leases:
            self._link.send(Released(self._number))


class Waiting:
    """The requests whose answer is to come from the other process, by number."""

    def __init__(self) -> None:
        self._outcomes: dict[int, Outcome | asyncio.Future[Called]] = {}
        self._last = 0

    def begin(self, outcome: "Outcome | asyncio.Future[Called]") -> int:
        """Return the number of a new request, whose answer will end `outcome`."""
        self._last += 1
        self._outcomes[self._last] = outcome
        return self._last

    def give_up(self, number: int) -> bool:
        """Wait no more; tell whether the answer had not come."""
        return self._outcomes.pop(number, None) is not None

    def end(self, number: int, result: Any) -> None:
        """Give an answer, if somebody waits for it."""
        if (outcome := self._taken(number)) is not None:
            outcome.set_result(result)

    def fail(self, number: int, error: ServiceError) -> None:
        """Give an error, if somebody waits."""
        if (outcome := self._taken(number)) is not None:
            outcome.set_exception(error)

    def fail_all(self) -> None:
        """The other process is gone."""
        for number in list(self._outcomes):
            self.fail(number, NotReady(GONE))

    def _taken(self, number: int) -> "Outcome | asyncio.Future[Called] | None":
        outcome = self._outcomes.pop(number, None)
        return None if outcome is None or outcome.done() else outcome


class DistantBatcher:
    """The way to the batcher of one model."""

    def __init__(self, model: int, link: Link, waiting: Waiting) -> None:
        self._model = model
        self._link = link
        self._waiting = waiting

    async def submit_many(self, images: Sequence[Image], *, deadline: float | None = None) -> list[Prediction]:
        """Classify the pictures of one request; as `DynamicBatcher.submit_many`."""
        future: asyncio.Future[list[Prediction]] = asyncio.get_running_loop().create_future()
        number = self.post([image.data for image in images], future, math.inf if deadline is None else deadline)
        try:
            return await future
        finally:
            del future  # an error's traceback holds this frame, and the future the error: a cycle for the collector
            self.withdraw(number)

    def post(self, images: Sequence[Pixels], outcome: Outcome, deadline: float) -> int:
        """Do the same for somebody who does not await it."""
        number = self._waiting.begin(outcome)
        self._link.send(Submit(number, self._model, deadline, cast("list[bytes]", images)))
        return number

    def withdraw(self, number: int) -> None:
        """Have what was posted not run, unless its answer is here."""
        if self._waiting.give_up(number):
            self._link.send(Cancel(number))


class DistantService(Front):
    """The service, as one process of many that speak HTTP sees it.

    Args:
        settings: all of them.
        ledger: what is in the house.
        row: this process's row there.
        processes: how many there are like this.

    Attributes:
        link: to the process that runs the model.
        server: of this process.
    """

    server: "FrontServer"

    def __init__(self, settings: Settings, ledger: Ledger, row: int, processes: int) -> None:
        self._ledger = ledger
        self._row = row
        self._waiting = Waiting()
        self._live: DistantModel | None = None
        self._status: Status = "loading"
        self._failure = ""
        self.link = Link(FromEngine, self._received, self._lost)
        self.notes = Notes(self.link)
        super().__init__(
            settings,
            self.notes,
            SharedAdmission(settings.max_queue_size, settings.max_queue_bytes, ledger, row),
            decode_threads=max(1, settings.decode_threads // processes),
        )

    @property
    def in_flight(self) -> int:
        """Requests to /predict that are being answered; the others can read it."""
        return self._in_flight

    @in_flight.setter
    def in_flight(self, value: int) -> None:
        self._in_flight = value
        self._ledger.write(self._row, IN_FLIGHT, value)

    @property
    def failure(self) -> str:
        """Why the service can't go on; "" while it can."""
        return self._failure

    @property
    def status(self) -> Status:
        """The state in one word, as last heard."""
        return self._status

    def lease(self) -> DistantModel:
        """Hold the live model while one request is served."""
        if self._live is None:
            raise NotReady
        return self._live

    def may_connect(self, connections: int) -> bool:
        """Tell whether so many connections to this process, and those to the others, are not too many."""
        self._ledger.write(self._row, CONNECTIONS, connections)
        return self._ledger.total(CONNECTIONS) <= self.settings.max_connections

    async def call(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Have a request for any other route answered by the process that runs the model; an ASGI application."""
        future: asyncio.Future[Called] = asyncio.get_running_loop().create_future()
        number = self._waiting.begin(future)
        self.link.send(call_of(number, scope))
        try:
            called = await future
        finally:
            del future
            self._waiting.give_up(number)
        await send({"type": "http.response.start", "status": called.status, "headers": list(called.headers)})
        await send({"type": "http.response.body", "body": called.body})

    def _received(self, messages: Sequence[Message]) -> None:
        for message in messages:
            match message:
                case Answered():
                    for number, predictions in unpack(message):
                        self._waiting.end(number, predictions)
                case Refused():
                    self._waiting.fail(message.number, error_of(message))
                case Called():
                    self._waiting.end(message.number, message)
                case Ask():
                    self.notes.send()
                    self.link.send(Alive(message.number))
                case State():
                    self._enter(message)

    def _enter(self, state: State) -> None:
        """Take note of a new state."""
        if state.metadata:
            old, metadata = self._live, ModelMetadata.model_validate_json(state.metadata)
            self._live = DistantModel(state.model, state.version, metadata, self.link, self._waiting)
            if old is not None:
                old.retire()
        self._status = state.status
        self._failure = state.failure
        if state.status == "draining" and not self.draining:
            self.server.drain(state.drain_seconds)

    def _lost(self) -> None:
        self._waiting.fail_all()
        if not self.draining:
            self._status, self._failure = "failed", GONE


class FrontServer(Server):
    """Ends when the process that runs the model says so or is gone; signals are that one's affair."""

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Do nothing: Ctrl-C reaches every process of a terminal's group."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and say so."""
        await super().startup(sockets)
        assert isinstance(self.service, DistantService)
        self.service.link.send(Listening())


def http_config(service: DistantService) -> BoundedConfig:
    """Return uvicorn's configuration."""
    entry = Entry(service, PredictEndpoint(service), service.call)
    config = configuration(entry, service, entry.quick, lifespan="off")
    config.load()
    return config


async def serve(service: DistantService, end: socket.socket, sockets: list[socket.socket]) -> bool:
    """Serve until the end; return whether that was a failure."""
    server = service.server
    await Link.open(end, service.link)
    await server.serve(sockets)
    service.notes.send()
    service.link.flush()
    service.link.close()
    service.decoder.close()
    return server.failed


def main(arguments: Sequence[str]) -> int:
    """Return the exit status."""
    link, memory, processes, row, *listeners = map(int, arguments)
    settings = Settings.model_validate_json(sys.stdin.buffer.read())
    logs.configure(settings)
    service = DistantService(settings, Ledger(processes, memory), row, processes)
    server = service.server = FrontServer(http_config(service))
    sockets = [socket.socket(fileno=listener) for listener in listeners]
    with asyncio.Runner(loop_factory=server.config.get_loop_factory()) as runner:
        failed = runner.run(serve(service, socket.socket(fileno=link), sockets))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
