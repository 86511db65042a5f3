"""uvicorn's HTTP protocol, with limits that it does not have, and a fast path for small requests to `/predict`.

A connection has one request at a time. What a client sends behind a request that is being answered (pipelining) is
dropped, and the connection closes with that response; RFC 9112, section 9.3.2, has the client send it again.
"""

import asyncio
import math
from typing import Any, cast

import httptools

from service.errors import BadRequest, ServiceError, Unavailable
from service.server.connections import Listener
from service.server.request_head import (
    MAX_HEADER_BYTES,
    MAX_HEADER_LINES,
    fault_of,
    head_without_upgrade,
    request_scope,
    size_of_head,
    too_large,
)
from service.server.response_cycle import AsgiCycle, DirectCycle
from service.server.timeouts import Cycle, TimedProtocol


class HttpProtocol(TimedProtocol):
    """One connection.

    Attributes:
        listener: the port that it came to.
    """

    listener: Listener
    _refusal: ServiceError | None = None  # what a callback has raised, of which the parser raises its own
    _bare_bytes = 0  # since the last of a body, or the end of a head: of a head that grows, or of trailers
    _max_bare_bytes = 0  # that a head which ends in the data at hand can have

    # The connection

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Count the connection, and give it its time for the first request's headers."""
        super().connection_made(transport)
        self.shared.clock.add(self)
        self._set_due()
        self.listener.connections += 1
        if self.listener.connections > self.service.settings.max_connections:
            self.refuse(Unavailable("Too many connections are open."))

    def connection_lost(self, exc: Exception | None) -> None:
        """Watch it no more; the client that is being answered has left."""
        self.shared.clock.discard(self)
        self.listener.connections -= 1
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse; then bound what is left incomplete."""
        if self.transport.is_closing() or self._is_deaf:
            return
        # Where a head or a trailer begins behind something else, nobody knows how much of the data is its own: then
        # the parser's callbacks set this back, and it is counted from the next data on.
        self._bare_bytes += len(data)
        self._max_bare_bytes = self._bare_bytes
        if self._is_idle:
            self._is_idle = False
            self._in_time()
        self._parse(data)
        if self.transport.is_closing() or self._is_deaf:
            return
        if self._bare_bytes > MAX_HEADER_BYTES or len(self.headers or ()) > MAX_HEADER_LINES:
            self.end(too_large())
        elif self.due == math.inf and not self._is_working():
            self._set_due()

    def _parse(self, data: bytes) -> None:
        rest: bytes | memoryview = data
        try:
            while rest:
                try:
                    self.parser.feed_data(rest)
                    break
                except httptools.HttpParserUpgrade as upgrade:
                    if self._is_dropping:
                        self._is_deaf = True
                        break
                    rest = memoryview(rest)[upgrade.args[0] :]
                    self._parse_without_upgrade(self.parser)
        except ServiceError as error:
            self.end(error)
        except httptools.HttpParserError:
            self.end(self._refusal or BadRequest("This can't be read as a request of HTTP/1.1."))

    def _parse_without_upgrade(self, parser: Any) -> None:
        if parser.get_method() == b"CONNECT":
            raise BadRequest("CONNECT is for proxies, and this is none.")
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn
        head = head_without_upgrade(parser.get_method(), self.url, parser.get_http_version(), self.headers)
        self.parser.feed_data(head)

    # The parser's callbacks

    def on_message_begin(self) -> None:
        """Begin a head, or drop what comes before the response to another request, or behind the last."""
        self.url = b""
        self.headers = []
        if self.transport.is_closing() or self._is_working() or self.flow.write_paused:
            self._is_dropping = True
            if not self._is_working():  # the client has not read its last response
                self._is_deaf = True
                self.close()
            return
        self.expect_100_continue = False
        self._in_head = True
        self._is_idle = False

    def on_header(self, name: bytes, value: bytes) -> None:
        """Keep a line; blanks behind its value are none of it (RFC 9112, section 5.1), and the parser leaves them."""
        name = name.lower()
        if name == b"expect" and value.lower() == b"100-continue":
            self.expect_100_continue = True
        self.headers.append((name, value.rstrip(b" \t")))

    def on_headers_complete(self) -> None:
        """End their time, and start the request.

        Raises:
            ServiceError: they came in one read with their end and are too large, or HTTP forbids them.
        """
        if self._is_dropping:
            self._bare_bytes = 0
            return
        if self.parser.should_upgrade():  # it will be parsed again, see `_parse`
            return
        if len(self.headers) > MAX_HEADER_LINES or (
            self._max_bare_bytes > MAX_HEADER_BYTES and size_of_head(self.url, self.headers) > MAX_HEADER_BYTES
        ):
            raise self._refused(too_large())
        version = self.parser.get_http_version()
        if (fault := fault_of(version, self.headers)) is not None:
            raise self._refused(fault)
        self._in_head = False
        self._bare_bytes = 0
        self._in_time()
        is_old = version == "1.0"
        keep_alive = not is_old and self.parser.should_keep_alive()
        headers, self.headers = self.headers, []  # what comes after the body, as a trailer, is none of the head
        if self.parser.get_method() == b"POST" and not self.listener.is_management:
            cycle = DirectCycle(self, keep_alive=keep_alive)
            try:
                request = self.shared.predict.direct(self.url, headers, cycle.respond)
            except ServiceError as error:
                self._refused(error)
                raise
            if request is not None:
                cycle.request, self.cycle = request, cast("Any", cycle)
                request.start()
                return
        self._start_asgi(headers, keep_alive=keep_alive, expect_100_continue=self.expect_100_continue and not is_old)

    def _refused(self, error: ServiceError) -> ServiceError:
        self._refusal = error
        return error

    def _start_asgi(self, headers: list[tuple[bytes, bytes]], *, keep_alive: bool, expect_100_continue: bool) -> None:
        """Start the application, as uvicorn does.

        Raises:
            httptools.HttpParserError: the URL is none.
        """
        cycle = self.cycle = AsgiCycle(
            scope=cast("Any", request_scope(self, headers)),
            transport=self.transport,
            flow=self.flow,
            logger=self.logger,
            access_logger=self.access_logger,
            access_log=False,
            default_headers=self.server_state.default_headers,
            message_event=asyncio.Event(),
            expect_100_continue=expect_100_continue,  # RFC 9110, section 10.1.1
            keep_alive=keep_alive,
            on_response=self.on_response_complete,
        )
        cycle.connection = self
        self._start_asgi_task(cycle, self.app)

    def on_body(self, body: bytes) -> None:
        """Keep a piece of the body."""
        self._bare_bytes = 0
        if self._is_dropping:
            return
        if isinstance(self.cycle, DirectCycle):
            self.cycle.add_body(body)
        else:
            super().on_body(body)

    def on_message_complete(self) -> None:
        """End the body's time."""
        self._bare_bytes = 0
        if self._is_dropping or self.parser.should_upgrade():
            return
        if self.cycle.response_complete:  # before the end of the body, which uvicorn does not note then
            self.cycle.more_body = False
            self._is_idle = True
            if cast("Cycle", self.cycle).closes_late:
                self.transport.close()
        elif isinstance(self.cycle, DirectCycle):
            self.cycle.end_body()
        else:
            super().on_message_complete()
        self._in_time()

    @property
    def closes(self) -> bool:
        """Whether the connection ends with its next response."""
        return self.service.closes_connections or (self._is_dropping and self._last_error is None)

    def on_response_complete(self) -> None:
        """Wait for the next request; linger where the response came before the end of the body."""
        self.server_state.total_requests += 1
        if self._last_error is not None and not self.transport.is_closing():
            self.refuse(self._last_error)
            return
        if self._is_dropping and not self.transport.is_closing():  # it came when the head of the response was sent
            self.close()
            return
        if not self.transport.is_closing():
            if self.flow.read_paused:
                self.flow.resume_reading()
            self._is_idle = not (self._in_head or self.cycle.more_body)
        self._set_due()
