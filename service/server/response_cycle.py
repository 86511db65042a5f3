"""One request and its answer on a connection: uvicorn's, but an ordinary answer goes out in one write."""

import re
from typing import Any, Final

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, RequestResponseCycle

from service.api.payload import FAULT
from service.errors import ServiceError

NO_BODY: Final = frozenset({204, 304})
CONTROL: Final = re.compile(rb"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")  # line ends excepted, which are counted


class Cycle(RequestResponseCycle):
    """Keeps the head of an answer until its body comes, and sends an ordinary answer by a short way.

    uvicorn looks at each header three times and writes head and body apart, and uvloop makes a system call of each
    write: of a small answer, that is the most expensive part. Ordinary is an answer of known length in one piece on a
    connection that stays open. All else goes uvicorn's way.
    """

    _start: Any = None  # the message that begins the answer, until its body comes

    is_given_up = False  # whether the rest of the body is not waited for
    _fault: ServiceError | None = None  # why, until it is told
    closes_late = False  # whether the connection is to be closed, but not before the body has come

    async def receive(self) -> Any:
        """Return an ASGI message; of a body that is late or broken, one that says so."""
        message: Any = await super().receive()
        if not self.is_given_up or message["type"] != "http.request":
            return message
        fault, self._fault = self._fault, None  # kept, it would hold, by its traceback, who holds this
        return {"type": "http.disconnect", FAULT: fault}

    def give_up(self, fault: ServiceError) -> None:
        """Tell the application what is wrong with the body, so that it answers, and counts, as with any other error.

        It is the last answer on its connection: what is left of the body may still come, and is no request.
        """
        self.is_given_up = True
        self._fault = fault
        self.keep_alive = False
        self.message_event.set()

    async def send(self, message: Any) -> None:
        """Take an ASGI message."""
        if not self.response_started:
            if message["type"] != "http.response.start":
                raise RuntimeError(f"an answer begins with http.response.start, not with {message['type']}")
            self._start = message
            self.response_started = True
            if self.waiting_for_100_continue and self.more_body:
                # Nobody has asked for the body: the next request of a client that leaves it out is none of it.
                self.keep_alive = False
            return
        start, self._start = self._start, None
        if start is not None:
            if self.flow.write_paused and not self.disconnected:
                await self.flow.drain()
            answer = None if message.get("more_body", False) else self._ordinary(start, message.get("body", b""))
            if answer is not None:
                self._finish(answer)
                return
            self.response_started = False
            await super().send(start)
        if self.more_body and not (self.keep_alive or message.get("more_body", False)):
            # Closed with a body unread, the connection would be reset, and the client might never see this answer.
            self.keep_alive = self.closes_late = True
        await super().send(message)

    def _ordinary(self, start: Any, body: bytes) -> bytes | None:
        """Return head and body as they go over the wire; None for an answer that is not ordinary."""
        if not self.keep_alive or self.scope["method"] == "HEAD" or start["status"] in NO_BODY:
            return None
        length = None
        lines = [STATUS_LINE[start["status"]]]
        for name, value in (*self.default_headers, *start["headers"]):
            if name == b"content-length":
                length = value
            elif name == b"connection" or name == b"transfer-encoding":
                return None
            lines.append(b"%b: %b\r\n" % (name, value))
        head = b"".join(lines)
        if (
            length != b"%d" % len(body)
            or CONTROL.search(head)
            or not head.count(b"\n") == head.count(b"\r") == len(lines)
        ):
            return None  # an error, which uvicorn raises
        return b"%b\r\n%b" % (head, body)

    def _finish(self, answer: bytes) -> None:
        self.waiting_for_100_continue = False
        if self.disconnected or self.transport.is_closing():
            self.disconnected = True  # or uvicorn would log that the answer is not complete
            return
        self.transport.write(answer)
        self.response_complete = True
        self.message_event.set()
        self.on_response()
