"""What a connection has of the request that it is at: uvicorn's cycle for ASGI, and one that needs no task."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Final

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, RequestResponseCycle

from service.api.endpoint import FAULT
from service.api.request import InferenceRequest
from service.api.response import Response
from service.errors import ServiceError

if TYPE_CHECKING:
    from service.server.protocol import HttpProtocol

CLOSE: Final = b"connection: close\r\n"


def response_bytes(response: Response, default_headers: Iterable[tuple[bytes, bytes]], *, closes: bool) -> bytes:
    """Return a whole response as it goes over the wire."""
    lines = b"".join([b"%b: %b\r\n" % header for header in (*default_headers, *response.headers)])
    return b"%b%b%b\r\n%b" % (STATUS_LINE[response.status], lines, CLOSE if closes else b"", response.body)


class AsgiCycle(RequestResponseCycle):
    """uvicorn's, for a connection that may close in the midst of a body.

    Attributes:
        is_given_up: whether the rest of the body is not waited for.
        closes_late: whether the connection is to be closed, but not before the body has come.
    """

    connection: "HttpProtocol | None" = None
    is_given_up = False
    closes_late = False
    _fault: ServiceError | None = None  # why the body is given up, until the application has it

    async def run_asgi(self, app: Any) -> None:
        """Run the application."""
        try:
            await super().run_asgi(app)
        finally:
            self.connection = None  # which holds this: a cycle of references

    async def receive(self) -> Any:
        """Return an ASGI message; of a body that is late or broken, one that says so."""
        message: Any = await super().receive()
        if not self.is_given_up or message["type"] != "http.request":
            return message
        fault, self._fault = self._fault, None  # kept, it would hold, by its traceback, who holds this
        return {"type": "http.disconnect", FAULT: fault}

    def give_up(self, fault: ServiceError) -> None:
        """Tell the application what is wrong with the body, so that it responds, and counts, as with any other error.

        Its response is the last on the connection: what is left of the body may still come, and is no request.
        """
        self.is_given_up = True
        self._fault = fault
        self.keep_alive = False
        self.message_event.set()

    async def send(self, message: Any) -> None:
        """Take an ASGI message."""
        if message["type"] == "http.response.start":
            # The next request of a client whose body nobody has asked for is none of that body.
            closes = self.connection is not None and self.connection.closes
            if closes or (self.waiting_for_100_continue and self.more_body):
                self.keep_alive = False
        elif self.more_body and not (self.keep_alive or message.get("more_body", False)):
            # Closed with a body unread, the connection would be reset, and the client might never see this response.
            self.keep_alive = self.closes_late = True
        await super().send(message)


class DirectCycle:
    """A request that the connection drives itself; it stands where uvicorn keeps its cycle.

    Attributes:
        request: what is driven; None once it has its response.
        closes_late: as in `AsgiCycle`.
    """

    __slots__ = (
        "_connection", "closes_late", "disconnected", "is_given_up", "keep_alive", "more_body", "request",
        "response_complete",
    )  # fmt: skip

    def __init__(self, connection: "HttpProtocol", *, keep_alive: bool) -> None:
        self._connection: HttpProtocol | None = connection
        self.request: InferenceRequest | None = None
        self.keep_alive = keep_alive
        self.more_body = True
        self.disconnected = self.is_given_up = self.response_complete = self.closes_late = False

    @property
    def response_started(self) -> bool:
        """Whether anything of the response was sent: it goes out in one write."""
        return self.response_complete

    def add_body(self, body: bytes) -> None:
        """Give the request a piece of its body."""
        if self.request is not None:
            self.request.receive(body)

    def end_body(self) -> None:
        """Run the request."""
        self.more_body = False
        if self.request is not None:
            self.request.run()

    def give_up(self, fault: ServiceError) -> None:
        """Respond to a request whose body is late or broken; its response is the last on the connection."""
        self.is_given_up = True
        self.keep_alive = False
        if self.request is not None:
            self.request.fail(fault)

    def respond(self, response: Response | None) -> None:
        """Send the response, unless the client has left."""
        connection, self._connection = self._connection, None  # which may hold this: a cycle of references
        self.request = None
        self.response_complete = True
        if response is None or connection is None or connection.transport.is_closing():
            return
        closes = connection.closes or not self.keep_alive
        default_headers = connection.server_state.default_headers
        connection.transport.write(response_bytes(response, default_headers, closes=closes))
        self.closes_late = closes and self.more_body  # as in `AsgiCycle.send`
        if closes and not self.more_body:
            connection.transport.close()
        connection.on_response_complete()

    # What uvicorn asks of a cycle when the connection is lost

    @property
    def message_event(self) -> "DirectCycle":
        """Itself, for `set`."""
        return self

    def set(self) -> None:
        """Cancel the request if the client has left."""
        if self.disconnected and self.request is not None:
            self.request.cancel()
