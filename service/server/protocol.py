"""uvicorn's HTTP protocol, with the limits that it does not have: connections, header bytes, requests that wait.

Those of time are in `service.server.timeouts`.
"""

import asyncio
import math
from typing import Any, Final, cast

import httptools
from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import STATUS_LINE
from uvicorn.server import ServerState

from service.api.predict import Options
from service.api.quick import QuickAnswer
from service.errors import BadRequest, ServiceError, Unavailable
from service.server.connections import CLOSE, BoundedConfig, BoundedFlow, Listener
from service.server.request_head import (
    MAX_HEADER_BYTES,
    MAX_HEADER_LINES,
    fault_of,
    head_without_upgrade,
    request_scope,
    size_of_head,
    too_large,
)
from service.server.response_cycle import Cycle
from service.server.timeouts import PatientProtocol

MOST_PIPELINED: Final = 64  # requests that wait on one connection; no client of ours sends a second one unanswered


class BoundedProtocol(PatientProtocol):
    """One connection.

    Attributes:
        listener: the port that it came to.
    """

    flow: BoundedFlow
    listener: Listener

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        assert isinstance(config, BoundedConfig)
        self._clock = config.clock
        self._quick = config.quick
        self._answering: Any = None  # the cycle whose turn it is; others may wait behind it
        self._options: Options | None = None  # of a request that goes the short way if its body is here
        self._body = b""
        self._refusal: ServiceError | None = None  # what a callback has raised, of which the parser raises its own
        self._bare_bytes = 0  # since the last of a body, or the end of a head: of a head that grows, or of trailers
        self._most_bare_bytes = 0  # that a head which ends in the data at hand can have

    # The connection

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Count the connection, and give it its time for the first request's headers."""
        super().connection_made(transport)
        self.flow = BoundedFlow(transport)
        self._clock.add(self)
        self._set_due()
        self.listener.connections += 1
        if self.listener.connections > self.service.settings.max_connections:
            self.refuse(Unavailable("Too many connections are open."))

    def connection_lost(self, exc: Exception | None) -> None:
        """Watch it no more; who is being answered has left, and who waits behind that too."""
        self._clock.discard(self)
        self.pipeline.clear()
        if self._answering is not None and not self._answering.response_complete:
            self._answering.disconnected = True
            self._answering.message_event.set()
        super().connection_lost(exc)
        self.listener.connections -= 1

    def data_received(self, data: bytes) -> None:
        """Parse; then bound what is left incomplete."""
        if self.transport.is_closing() or self._is_deaf:
            return
        # Where a head or a trailer begins behind something else, nobody knows how much of the data is its own: then
        # the parser's callbacks set this back, and it is counted from the next data on.
        self._bare_bytes += len(data)
        self._most_bare_bytes = self._bare_bytes
        if self._is_idle:
            self._is_idle = False
            self._in_time()
        self._parse(data)
        if self.transport.is_closing() or self._is_deaf:
            return
        if self._bare_bytes > MAX_HEADER_BYTES or len(self.headers) > MAX_HEADER_LINES:
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
                    rest = memoryview(rest)[upgrade.args[0] :]
                    self._parse_without_upgrade(self.parser)
            self._begin_what_lacks_its_end()
        except ServiceError as error:
            self._break_off(error)
        except httptools.HttpParserError:
            self._break_off(self._refusal or BadRequest("This can't be read as a request of HTTP/1.1."))

    def _break_off(self, error: ServiceError) -> None:
        self._begin_what_lacks_its_end()  # whose body is broken
        self.end(error)

    def _begin_what_lacks_its_end(self) -> None:
        """Start the application for a request that might have gone the short way, had its body been all here."""
        if self._options is not None:
            self._options = None
            self._begin_cycle(self._body, more_body=True)

    def _parse_without_upgrade(self, parser: Any) -> None:
        if parser.get_method() == b"CONNECT":
            raise BadRequest("CONNECT is for proxies, and this is none.")
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn
        head = head_without_upgrade(parser.get_method(), self.url, parser.get_http_version(), self.headers)
        self.parser.feed_data(head)

    # The parser's callbacks

    def on_message_begin(self) -> None:
        """Take note that a head has begun.

        Raises:
            BadRequest: behind the last answer, of which nothing may be done any more (RFC 9112, section 9.6).
        """
        if self.transport.is_closing():
            raise self._refused(BadRequest("This connection has had its last answer."))
        self.url = b""
        self.headers = []
        self.expect_100_continue = False
        self._in_head = True
        self._is_idle = False

    def on_header(self, name: bytes, value: bytes) -> None:
        """Keep a line; blanks behind its value are none of it (RFC 9112, section 5.1), and the parser leaves them."""
        super().on_header(name, value.rstrip(b" \t"))

    def on_headers_complete(self) -> None:
        """End their time, and start the application, unless the request may go the short way.

        Raises:
            ServiceError: they came in one read with their end and are too large, or HTTP forbids them.
        """
        if self.parser.should_upgrade():  # it will be parsed again, see `_parse`
            return
        if len(self.headers) > MAX_HEADER_LINES or (
            self._most_bare_bytes > MAX_HEADER_BYTES and size_of_head(self.url, self.headers) > MAX_HEADER_BYTES
        ):
            raise self._refused(too_large())
        if (fault := fault_of(self.parser.get_http_version(), self.headers)) is not None:
            raise self._refused(fault)
        self._in_head = False
        self._bare_bytes = 0
        self._in_time()
        if self._quick is not None and self._is_plain():
            self._options = self._quick.options(self.url, self.headers)
            self._body = b""
        if self._options is None:
            self._begin_cycle(b"", more_body=True)

    def _refused(self, error: ServiceError) -> ServiceError:
        self._refusal = error
        return error

    def _is_plain(self) -> bool:
        """Whether a request could go the short way, as far as HTTP is concerned."""
        parser = self.parser
        return (
            not self.listener.is_management
            and (self.cycle is None or self.cycle.response_complete)
            and parser.get_method() == b"POST"
            and parser.get_http_version() == "1.1"
            and parser.should_keep_alive()
            and not (self.expect_100_continue or self.flow.write_paused)
        )

    def _begin_cycle(self, body: bytes, *, more_body: bool) -> None:
        """Start the application, as uvicorn does, but with a `Cycle` of ours.

        Raises:
            BadRequest: too many wait before it.
            httptools.HttpParserError: its URL is none.
        """
        busy = self.cycle is not None and not self.cycle.response_complete
        is_old = self.parser.get_http_version() == "1.0"
        if len(self.pipeline) == MOST_PIPELINED:
            raise self._refused(BadRequest(f"More than {MOST_PIPELINED} requests wait on this connection."))
        cycle = self.cycle = Cycle(
            scope=cast("Any", request_scope(self)),
            transport=self.transport,
            flow=self.flow,
            logger=self.logger,
            access_logger=self.access_logger,
            access_log=False,
            default_headers=self.server_state.default_headers,
            message_event=asyncio.Event(),
            expect_100_continue=self.expect_100_continue and not is_old,  # RFC 9110, section 10.1.1
            keep_alive=not is_old and self.parser.should_keep_alive(),
            on_response=self.on_response_complete,
        )
        self.headers = []  # what comes after the body, as a trailer, is none of the head
        cycle.body += body
        cycle.more_body = more_body
        if body or not more_body:
            cycle.message_event.set()
        if busy:  # a pipelined request waits for its turn
            self.flow.wait(size_of_head(self.url, cycle.scope["headers"]))
            self.pipeline.appendleft((cycle, self.app))
        else:
            self._start_asgi_task(cycle, self.app)

    def _start_asgi_task(self, cycle: Any, app: Any) -> None:
        self._answering = cycle
        super()._start_asgi_task(cycle, app)

    def on_body(self, body: bytes) -> None:
        """Keep a piece of the body."""
        self._bare_bytes = 0
        if self._options is None:
            super().on_body(body)
            if self.pipeline:  # this is the body of the last that waits
                self.flow.wait(len(body))
        else:
            self._body += body

    def on_message_complete(self) -> None:
        """End the body's time; a request that is whole in one read may go the short way."""
        if self.parser.should_upgrade():
            return
        if self._options is not None:
            self._go_quickly(self._options)
        elif self.cycle.response_complete:  # before the end of the body, which uvicorn does not note then
            self.cycle.more_body = False
            self._is_idle = True
            if cast("Cycle", self.cycle).closes_late:
                self.transport.close()
        else:
            super().on_message_complete()
        self._bare_bytes = 0
        self._in_time()

    def _go_quickly(self, options: Options) -> None:
        assert self._quick is not None
        self._options = None
        answer = QuickAnswer(self._quick, self, self.headers)
        try:
            is_ordinary = answer.begin(options, self._body, self.loop.time())
        except Exception as error:
            self._answer_quickly(answer)
            answer.refuse(error)
            return
        if is_ordinary:
            self._answer_quickly(answer)
        else:
            self._begin_cycle(self._body, more_body=False)

    def _answer_quickly(self, answer: QuickAnswer) -> None:
        self.cycle = self._answering = cast("Any", answer)  # what uvicorn asks of a cycle it has

    def reply(self, answer: QuickAnswer, status: int, head: bytes, body: bytes) -> None:
        """Send the answer to a request that went the short way."""
        answer.response_started = answer.response_complete = True
        if self.transport.is_closing():
            return
        default = b"".join([b"%b: %b\r\n" % header for header in self.server_state.default_headers])
        last = CLOSE if self.service.closes_connections or not answer.keep_alive else b""
        self.transport.write(b"%b%b%b%b\r\n%b" % (STATUS_LINE[status], default, head, last, body))
        if last:
            self.transport.close()
        self.on_response_complete()

    def on_response_complete(self) -> None:
        """Go on with the next request, or wait for it; linger where the answer came before the end of the body."""
        self.server_state.total_requests += 1
        if not self.transport.is_closing():
            if self.pipeline:
                self._start_asgi_task(*self.pipeline.pop())
            else:
                self._is_idle = not (self._in_head or self.cycle.more_body)
            if not self.pipeline:
                self.flow.nothing_waits()
        self._set_due()
