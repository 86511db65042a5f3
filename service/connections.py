"""What connections share: the clock that ends what takes too long, and how heads are read and bounded."""

import asyncio
from collections.abc import Iterable
from typing import Any, Final, Protocol
from urllib.parse import unquote
from uuid import uuid4

import httptools
from uvicorn.config import Config
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from service.errors import HeadersTooLarge, ServiceError
from service.front import Front
from service.middleware import error_answer
from service.quick import Quick
from service.recurring import Recurring

CLOSE: Final = b"connection: close\r\n"
MAX_HEADER_BYTES: Final = 64 * 1024
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

    service: Front
    quick: Quick | None
    clock: ConnectionClock


def size_of_head(url: bytes, headers: Iterable[tuple[bytes, bytes]]) -> int:
    """Return the bytes of a head that its client chose."""
    return len(url) + sum(len(name) + len(value) for name, value in headers)


def too_large() -> HeadersTooLarge:
    """Return what is said of a head beyond the limit."""
    return HeadersTooLarge(f"The headers are larger than {MAX_HEADER_BYTES} bytes.")


def last_answer(error: ServiceError) -> bytes:
    """Return an error's whole answer, under a new request id, after which the connection is closed."""
    request_id = uuid4().hex
    headers, body = error_answer(error, request_id)
    headers.append((b"x-request-id", request_id.encode()))
    lines = b"".join(b"%b: %b\r\n" % header for header in headers if header[0] != b"connection")
    return STATUS_LINE[error.status] + lines + CLOSE + b"\r\n" + body


def request_scope(connection: HttpToolsProtocol) -> dict[str, Any]:
    """Return the ASGI scope of the request whose head a connection has just read, as uvicorn makes it.

    Raises:
        httptools.HttpParserError: its URL is none.
    """
    url = httptools.parse_url(connection.url)
    path = url.path.decode("ascii")
    return {
        "type": "http",
        "asgi": {"version": connection.asgi_version, "spec_version": "2.3"},
        "http_version": connection.parser.get_http_version(),
        "server": connection.server,
        "client": connection.client,
        "scheme": connection.scheme,
        "root_path": connection.root_path,
        "headers": connection.headers,
        "state": connection.app_state.copy(),
        "method": connection.parser.get_method().decode("ascii"),
        "path": unquote(path) if "%" in path else path,
        "raw_path": url.path,
        "query_string": url.query or b"",
    }


def head_without_upgrade(method: bytes, url: bytes, version: str, headers: Iterable[tuple[bytes, bytes]]) -> bytes:
    """Return the head of a request that asked for another protocol, without the asking.

    A server may ignore it (RFC 9110, section 7.8), and must read the body then. The parser does not: for it, HTTP ends
    with such a head.
    """
    lines = [b"%b %b HTTP/%b" % (method, url, version.encode())]
    lines += [b"%b: %b" % header for header in headers if header[0] != b"upgrade"]
    return b"\r\n".join(lines) + b"\r\n\r\n"
