"""A transport that sends the head of an answer together with its body."""

import asyncio
from typing import Any


class JoiningTransport(asyncio.Transport):
    """Passes everything on to another transport, but keeps the head of an answer until its body comes.

    uvicorn writes them one after the other, and uvloop makes a system call of each write, which for a small answer is
    the most expensive thing that is done with it.
    """

    def __init__(self, transport: asyncio.Transport) -> None:
        super().__init__()
        self._transport = transport
        self._head = b""
        self.is_closing = transport.is_closing  # type: ignore[method-assign]
        self.get_extra_info = transport.get_extra_info  # type: ignore[method-assign]
        self.pause_reading = transport.pause_reading  # type: ignore[method-assign]
        self.resume_reading = transport.resume_reading  # type: ignore[method-assign]

    def write(self, data: Any) -> None:
        """Keep a head, and send all else with what is kept."""
        if self._head:
            data, self._head = self._head + data, b""
        elif data[:9] == b"HTTP/1.1 " and data[9:12] != b"100":
            self._head = data
            return
        self._transport.write(data)

    def flush(self) -> None:
        """Send a head whose answer has no body."""
        if self._head:
            self.write(b"")

    def close(self) -> None:
        """Close, when everything is sent."""
        self.flush()
        self._transport.close()

    def abort(self) -> None:
        """Close at once."""
        self._transport.abort()
