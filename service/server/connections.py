"""What connections share: the clock that ends what takes too long, what bounds those who wait, and the last answer."""

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, Protocol
from uuid import uuid4

from uvicorn.config import Config
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import STATUS_LINE

from service.api.middleware import error_answer
from service.api.quick import Quick
from service.batching.timer import Recurring
from service.errors import ServiceError
from service.lifecycle import Service

CLOSE: Final = b"connection: close\r\n"
LOOK_SECONDS: Final = 0.1  # how much later than its limit a slow client may be cut off
MOST_WAITING_BYTES: Final = 64 * 1024  # of requests behind the one that is answered, until nothing more is read


class Connection(Protocol):
    """A connection that a clock watches.

    Attributes:
        due: loop time at which its time is up; infinity while it has any.
    """

    due: float

    def time_is_up(self) -> None:
        """End what has taken too long."""


class ConnectionClock:
    """Looks over the open connections for those whose time is up."""

    def __init__(self) -> None:
        self._connections: set[Connection] = set()
        self._looks = Recurring(self._look, LOOK_SECONDS)

    def add(self, connection: Connection) -> None:
        """Watch a connection."""
        self._connections.add(connection)
        self._looks.wake()

    def discard(self, connection: Connection) -> None:
        """Forget a connection."""
        self._connections.discard(connection)

    def _look(self) -> bool:
        now = asyncio.get_running_loop().time()
        for connection in [each for each in self._connections if each.due <= now]:
            connection.time_is_up()
        return bool(self._connections)


@dataclass
class Listener:
    """One of the ports that a process listens on.

    Attributes:
        is_management: whether it is the one for operators.
        connections: that are open.
    """

    is_management: bool
    connections: int = 0


class BoundedFlow(FlowControl):
    """uvicorn's, but what waits on a connection behind the request that is answered is bounded in bytes.

    Admission does not count it yet. Below the bound reading goes on, for the loop tells only who reads that the client
    has left. Above it nothing is read until all that waits has had its turn, whoever asks for more; a client that
    leaves then is found out with the answer that it no longer takes. The read that exceeds the bound, of 256 KiB at
    most, is kept whole.
    """

    _waiting = 0  # bytes

    def wait(self, size: int) -> None:
        """Take note that so many bytes more wait."""
        self._waiting += size
        if self._waiting > MOST_WAITING_BYTES:
            self.pause_reading()

    def nothing_waits(self) -> None:
        """Take note that the last that waited has its turn or its answer."""
        self._waiting = 0
        self.resume_reading()

    def resume_reading(self) -> None:
        """Read on, as the request that is answered asks for, unless too much waits behind it."""
        if self._waiting <= MOST_WAITING_BYTES:
            super().resume_reading()


class BoundedConfig(Config):
    """uvicorn's configuration, and what its connections share.

    Attributes:
        service: whose limits they keep.
        clock: ends what takes too long on any connection.
        quick: answers ordinary requests; None where each must pass the application.
    """

    service: Service
    quick: Quick | None
    clock: ConnectionClock


def last_answer(error: ServiceError, default_headers: Iterable[tuple[bytes, bytes]]) -> bytes:
    """Return an error's whole answer, under a new request id, after which the connection is closed."""
    request_id = uuid4().hex
    headers, body = error_answer(error, request_id)
    headers.append((b"x-request-id", request_id.encode()))
    lines = b"".join(b"%b: %b\r\n" % header for header in (*default_headers, *headers))
    return STATUS_LINE[error.status] + lines + CLOSE + b"\r\n" + body
