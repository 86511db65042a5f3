"""How long a connection waits for its client, and how it ends.

uvicorn's only timeout is for idle connections and is reset by every byte, so that a client that trickles holds its
connection for ever.
"""

import asyncio
import math
from typing import Any, Final, cast
from uuid import uuid4

from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from service.api.response import error_response
from service.errors import BodyTimeout, HeadersTimeout, ServiceError
from service.server.connections import ServerConfig
from service.server.response_cycle import AsgiCycle, DirectCycle, response_bytes

Cycle = AsgiCycle | DirectCycle
# After a response that came before the end of the body (413, 503), the rest is read and thrown away for this long, so
# that the client reads the answer and not a connection reset.
LINGER_SECONDS: Final = 2.0


class TimedProtocol(HttpToolsProtocol):
    """One connection, which a `ConnectionClock` watches.

    Attributes:
        shared: what all connections share.
        due: loop time at which it has taken too long for what it is at; infinity while that is the service's affair.
    """

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        assert isinstance(config, ServerConfig)
        self.shared = config
        self.service = config.service
        self.due = math.inf
        self._is_idle = False  # between an answer and the next request's first byte
        self._in_head = False
        self._is_deaf = False  # whether what still comes is dropped: nobody knows what it is
        self._is_dropping = False  # whether a request has come before the response to another
        self._last_error: ServiceError | None = None  # what is said behind the response that is still to come

    def pause_writing(self) -> None:
        """Give the client its time to read."""
        super().pause_writing()
        self._set_due()

    def resume_writing(self) -> None:
        """End that time."""
        super().resume_writing()
        self._set_due()

    def shutdown(self) -> None:
        """Close an idle connection; its client has a limited time to take what is not sent yet.

        Under TLS it has to close its half, too. Before this closed, what is encrypted counted as sent, however much of
        it waited; behind that the service's goodbye waits now, and counts. Less than 64 KiB can't be seen.
        """
        if self.transport.is_closing():  # and its time is running
            return
        super().shutdown()
        if self.transport.is_closing():
            is_sent = not self.transport.get_write_buffer_size()
            self.due = self.loop.time() + (LINGER_SECONDS if is_sent else self.service.settings.write_timeout_s)

    # Responses that no application gives

    def refuse(self, error: ServiceError) -> None:
        """Respond with an error, under a request id of its own, and close the connection."""
        if self.transport.is_closing():
            return
        response = error_response(error, uuid4().hex)
        self.transport.write(response_bytes(response, self.server_state.default_headers, closes=True))
        if self._is_deaf and self.transport.can_write_eof():
            # Closed with more to read, the connection would be reset, and the client might never see this response.
            self.transport.write_eof()
            self._in_head = False
            self.due = self.loop.time() + LINGER_SECONDS
        else:
            self.close()
        self.service.metrics.rejected(error.code)

    def close(self) -> None:
        """Close, when what was written is sent; a client that does not read it has a limited time for that."""
        self.transport.close()
        self.due = self.loop.time() + LINGER_SECONDS

    def end(self, error: ServiceError) -> None:
        """Read no more, and respond with an error.

        A request whose body is broken gets it as its response. Behind a whole request that is being answered it is a
        response of its own. Where a response has begun, it would be taken for the rest of that: the connection closes.
        """
        self._is_deaf = True
        cycle = self.cycle
        if self._is_working():
            self._last_error = error
        elif cycle is None or not cycle.more_body:
            self.refuse(error)
        elif cycle.response_started:
            self.close()
        else:
            cast("Cycle", cycle).give_up(error)
            self._set_due()

    def _is_working(self) -> bool:
        """Whether it is the service's turn: a whole request is here and not answered."""
        cycle = self.cycle
        return cycle is not None and not (cycle.more_body or cycle.response_complete)

    def _in_time(self) -> None:
        """Stop the clock: the client has done what it had to; an answer that it does not read still has its limit."""
        if not (self.flow.write_paused or self.transport.is_closing()):
            self.due = math.inf

    def _set_due(self) -> None:
        """Give the client its time for what it has to do next. Called where that changes, not at each byte."""
        settings, cycle = self.service.settings, self.cycle
        if cycle is not None and cast("Cycle", cycle).is_given_up:
            seconds = LINGER_SECONDS
        elif self.transport.is_closing() or self.flow.write_paused:
            seconds = settings.write_timeout_s
        elif self._is_working():
            seconds = math.inf
        elif self._is_idle:
            seconds = self.timeout_keep_alive
        elif self._in_head or cycle is None or not cycle.more_body:
            seconds = settings.header_timeout_s
        else:
            seconds = LINGER_SECONDS if cycle.response_complete else settings.body_timeout_s
        self.due = self.loop.time() + seconds

    def time_is_up(self) -> None:
        """End what has taken too long."""
        self.due = math.inf
        if self.transport.is_closing() or self.flow.write_paused:  # the client does not read
            self.transport.abort()
        elif self._in_head:
            self.refuse(HeadersTimeout())
        elif self.cycle is not None and not (self.cycle.response_started or cast("Cycle", self.cycle).is_given_up):
            cast("Cycle", self.cycle).give_up(BodyTimeout())
            self._set_due()
        else:
            self.close()
