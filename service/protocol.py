"""uvicorn's HTTP protocol, with the limits that it does not have: connections, time of headers and body, header bytes.

uvicorn's only timeout is for idle connections and is reset by every byte, so that a client that trickles holds its
connection for ever.
"""

import asyncio
from typing import Any, Final
from uuid import uuid4

from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol
from uvicorn.server import ServerState

from service.errors import BadRequest, BodyTimeout, HeadersTimeout, HeadersTooLarge, ServiceError, Unavailable
from service.middleware import error_body, error_headers
from service.state import Service
from service.transport import JoiningTransport

MAX_HEADER_BYTES: Final = 64 * 1024
# After an answer that came before the end of the body (413, 503), the rest is read and thrown away for this long, so
# that the client reads the answer and not a connection reset.
LINGER_SECONDS: Final = 2.0


class BoundedConfig(Config):
    """uvicorn's configuration, and the service that its connections ask for their limits."""

    service: Service


class BoundedProtocol(HttpToolsProtocol):
    """One connection."""

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        assert isinstance(config, BoundedConfig)
        self.service = config.service
        self._timer: asyncio.TimerHandle | None = None
        self._in_head = False
        self._head_bytes = 0

    # The connection

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Count the connection, and give it its time for the first request's headers."""
        self._joining = JoiningTransport(transport)
        super().connection_made(self._joining)
        if len(self.connections) > self.service.settings.max_connections:
            self.refuse(Unavailable("Too many connections are open."))
        else:
            self._start_timer(self.service.settings.header_timeout_s)

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the timer."""
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse; then bound what is left incomplete."""
        if self.transport.is_closing():
            return
        super().data_received(data)
        if self._in_head:
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEADER_BYTES:
                self.refuse(HeadersTooLarge(f"The headers are larger than {MAX_HEADER_BYTES} bytes."))
                return
        if self._timer is None and not self._is_working():
            in_body = self.cycle is not None and self.cycle.more_body and not self._in_head
            settings = self.service.settings
            self._start_timer(settings.body_timeout_s if in_body else settings.header_timeout_s)

    def shutdown(self) -> None:
        """Close an idle connection; under TLS without waiting half a minute for the client to close its half."""
        super().shutdown()
        if self.scheme == "https" and self.transport.is_closing():
            self.transport.abort()

    # The parser's callbacks

    def on_message_begin(self) -> None:
        """Count the bytes of these headers."""
        super().on_message_begin()
        self._in_head = True
        self._head_bytes = 0

    def on_headers_complete(self) -> None:
        """End their time."""
        self._in_head = False
        self._stop_timer()
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """End the body's time."""
        super().on_message_complete()
        self._stop_timer()

    def on_response_complete(self) -> None:
        """Linger where the answer came before the end of the body."""
        self._joining.flush()
        super().on_response_complete()
        if self.cycle.response_complete and self.cycle.more_body:
            self._start_timer(LINGER_SECONDS)

    # Answers that no application gives

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP."""
        self.refuse(BadRequest(msg))

    def refuse(self, error: ServiceError) -> None:
        """Answer with an error and close the connection."""
        if self.transport.is_closing():
            return
        body = error_body(error, uuid4().hex)
        headers = [*error_headers(error), (b"content-length", b"%d" % len(body)), (b"connection", b"close")]
        lines = b"".join(b"%s: %s\r\n" % header for header in headers)
        self.transport.write(STATUS_LINE[error.status] + lines + b"\r\n" + body)
        self.transport.close()
        self.service.metrics.rejected(error.code)

    def _is_working(self) -> bool:
        """Whether it is the service's turn: a whole request is here and not answered."""
        cycle = self.cycle
        return cycle is not None and not (self._in_head or cycle.more_body or cycle.response_complete)

    def _start_timer(self, seconds: float) -> None:
        self._stop_timer()
        self._timer = self.loop.call_later(seconds, self._time_is_up)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _time_is_up(self) -> None:
        if self.pipeline:  # an earlier request is not answered yet: an answer here would be taken for its own
            self.transport.close()
        elif self._in_head:
            self.refuse(HeadersTimeout())
        elif self.cycle is not None and not self.cycle.response_started:
            self.refuse(BodyTimeout())
        else:
            self.transport.close()
