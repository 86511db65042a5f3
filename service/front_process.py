"""A process that only speaks HTTP: it parses, decodes and answers, and has its pictures classified by another process.

`service.front_processes` starts it, with its settings on standard input, and sockets and shared memory as descriptors.
"""

import asyncio
import logging
import socket
import sys
from collections.abc import Sequence
from types import FrameType

from starlette.types import Receive, Scope, Send

from service import logs
from service.artifact import ModelMetadata
from service.connections import BoundedConfig
from service.distant import GONE, DistantModel, Notes, Waiting
from service.entry import Entry
from service.errors import Draining, NotReady
from service.front import Front, Status
from service.ledger import CONNECTIONS, IN_FLIGHT, Ledger, SharedAdmission
from service.link import Link
from service.messages import (
    Alive,
    Answered,
    Ask,
    Called,
    FromEngine,
    Listening,
    Message,
    Refused,
    State,
)
from service.predict import PredictEndpoint
from service.server import Server, configuration
from service.settings import Settings
from service.translation import call_of, error_of, unpack

logger = logging.getLogger(__name__)


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
        self._live: DistantModel | None = None
        self._status: Status = "loading"
        self._failure = ""
        # All of these processes together keep no more pictures for one that does not read than bodies in the house.
        most_unread = settings.max_queue_bytes // processes
        self.link = Link(FromEngine, self._received, self._lost, most_unread=most_unread)
        self._waiting = Waiting(self.link, ledger)
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

    def excess(self, connections: int) -> int:
        """Return how many connections are too many, of so many to this process and of those to the others."""
        self._ledger.write(self._row, CONNECTIONS, connections)
        return super().excess(self._ledger.total(CONNECTIONS))

    def disconnected(self, connections: int) -> None:
        """Tell the others."""
        self._ledger.write(self._row, CONNECTIONS, connections)

    def cut_off(self) -> None:
        """Answer everything that waits for the other process with Draining."""
        self._waiting.fail_all(Draining)

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
        self.leaving = state.leaving
        if state.status == "draining" and not self.draining:
            self.server.drain(state.drain_seconds)

    def _lost(self) -> None:
        self._waiting.fail_all(lambda: NotReady(GONE))
        if not self.draining and not self._failure:
            self._status, self._failure = "failed", GONE
            logger.critical("%s", GONE)


class FrontServer(Server):
    """Ends when the process that runs the model says so or is gone; signals are that one's affair."""

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Do nothing, in place of what uvicorn does at the signals that `service.front_main` has ignored."""

    def report_failure(self) -> None:
        """Do nothing: whoever found it has logged it."""

    def report_listening(self) -> None:
        """Tell the process that runs the model."""
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
