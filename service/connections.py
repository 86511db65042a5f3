"""What connections share: the clock that ends what takes too long, and how a request to change protocols is read."""

import asyncio
from collections.abc import Iterable
from typing import Final, Protocol

from uvicorn.config import Config

from service.front import Front
from service.quick import Quick
from service.recurring import Recurring

LOOK_SECONDS: Final = 0.1  # how much later than its limit a slow client may be cut off


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


def head_without_upgrade(method: bytes, url: bytes, version: str, headers: Iterable[tuple[bytes, bytes]]) -> bytes:
    """Return the head of a request that asked for another protocol, without the asking.

    A server may ignore it (RFC 9110, section 7.8), and must read the body then. The parser does not: for it, HTTP ends
    with such a head.
    """
    lines = [b"%b %b HTTP/%b" % (method, url, version.encode())]
    lines += [b"%b: %b" % header for header in headers if header[0] != b"upgrade"]
    return b"\r\n".join(lines) + b"\r\n\r\n"
