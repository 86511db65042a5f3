"""What the connections of a process share: the port that they came to, the clock, and uvicorn's configuration."""

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from uvicorn.config import Config

from service.api.predict import PredictEndpoint
from service.batching.timer import Timer
from service.lifecycle import Service

if TYPE_CHECKING:
    from service.server.timeouts import TimedProtocol

POLL_SECONDS: Final = 0.1  # how much later than its limit a slow client may be disconnected


class ConnectionClock:
    """Polls the open connections for those whose time is up."""

    def __init__(self) -> None:
        self._connections: set[TimedProtocol] = set()
        self._timer = Timer(self._poll, POLL_SECONDS)

    def add(self, connection: "TimedProtocol") -> None:
        """Watch a connection."""
        self._connections.add(connection)
        self._timer.wake()

    def discard(self, connection: "TimedProtocol") -> None:
        """Forget a connection."""
        self._connections.discard(connection)

    def _poll(self) -> bool:
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


class ServerConfig(Config):
    """uvicorn's configuration, and what its connections share.

    Attributes:
        service: whose limits they keep.
        clock: ends what takes too long on any connection.
        predict: makes the requests that a connection drives itself.
    """

    service: Service
    clock: ConnectionClock
    predict: PredictEndpoint
