"""A TLS connection until its handshake has ended: counted as any other, of which the event loop alone tells nobody."""

import asyncio
import ssl
from collections.abc import Awaitable, Callable, Coroutine, Generator
from types import coroutine
from typing import Any, Final, TypeVar, cast

from service.server.connections import Listener
from service.settings import Settings

SPARE_CONNECTIONS: Final = 64  # beyond `max_connections`, which are told so once they can be told anything


T = TypeVar("T")


@coroutine
def resumed(begun: Coroutine[Any, Any, T], awaited: Any) -> Generator[Any, Any, T]:
    """Await what was begun without a task, and awaits this; a task of Python 3.12 can begin at once by itself."""
    yield awaited
    result: T = yield from begun
    return result


class TlsHandshake(asyncio.Protocol):
    """Shakes hands, and hands over to the connection's protocol.

    Args:
        listener: the port that it came to.
        context: of the server.
        settings: of the service.
        make_protocol: makes what the connection has for its requests.
    """

    def __init__(
        self,
        listener: Listener,
        context: ssl.SSLContext,
        settings: Settings,
        make_protocol: Callable[[], asyncio.Protocol],
    ) -> None:
        self._listener = listener
        self._context = context
        self._settings = settings
        self._make_protocol = make_protocol
        self._task: asyncio.Task[None] | None = None
        self._received: list[bytes] = []  # with the end of the handshake
        self._is_lost = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin, unless there are too many connections."""
        tcp = cast("asyncio.Transport", transport)
        if self._listener.connections >= self._settings.max_connections + SPARE_CONNECTIONS:
            tcp.abort()
            return
        self._listener.connections += 1
        loop = asyncio.get_running_loop()
        tls = loop.start_tls(
            tcp,
            self,
            self._context,
            server_side=True,
            ssl_handshake_timeout=self._settings.header_timeout_s,
            ssl_shutdown_timeout=self._settings.write_timeout_s,
        )
        # Begun here and not in the task: uvloop reads in between, and what it reads would be lost for TLS.
        begun = resumed(tls, tls.send(None))
        self._task = loop.create_task(self._shake_hands(begun), name="TLS handshake")

    def data_received(self, data: bytes) -> None:
        """Keep it for the protocol."""
        self._received.append(data)

    def connection_lost(self, exc: Exception | None) -> None:
        """Note that nobody is there."""
        self._is_lost = True

    async def _shake_hands(self, begun: Awaitable[asyncio.Transport | None]) -> None:
        try:
            transport = await begun
        except OSError:  # the client has left, took too long, or speaks no TLS
            return
        finally:
            self._listener.connections -= 1
        if transport is None or self._is_lost:
            return
        protocol = self._make_protocol()
        transport.set_protocol(protocol)
        protocol.connection_made(transport)
        for data in self._received:
            protocol.data_received(data)
