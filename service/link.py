"""How the process that runs the model and those that speak HTTP talk to each other: over a pair of sockets.

All that one side has to say in one turn of its event loop goes out in one frame: a length and a list of messages in
MessagePack, which are checked against their types where they arrive.
"""

import asyncio
import logging
import socket
from collections.abc import Callable, Sequence
from typing import Final, cast

import msgspec

from service.messages import Message

logger = logging.getLogger(__name__)

LENGTH_BYTES: Final = 4


class Link(asyncio.Protocol):
    """One end. Belongs to one event loop.

    Args:
        kind: what arrives here, a union of messages.
        received: called with the messages of each frame, in order.
        before_send: called before a frame is made; may `send` more.
        lost: called once when the other end is gone, or has said what can't be understood.
        most_unread: bytes that may wait here for the other end to read them before `is_full`; None for a few.

    Attributes:
        is_full: whether more than that waits. It is for the callers to heed: what is sent all the same waits, too.
    """

    def __init__(
        self,
        kind: object,
        received: Callable[[Sequence[Message]], None],
        lost: Callable[[], None],
        before_send: Callable[[], None] = lambda: None,
        *,
        most_unread: int | None = None,
    ) -> None:
        self.is_full = False
        self._decoder: msgspec.msgpack.Decoder[list[Message]] = msgspec.msgpack.Decoder(list[kind])  # type: ignore[valid-type]
        self._encoder = msgspec.msgpack.Encoder()
        self._received = received
        self._lost = lost
        self._before_send = before_send
        self._most_unread = most_unread
        self._buffer = bytearray()
        self._outbox: list[Message] = []
        self._will_send = False
        self._transport: asyncio.Transport | None = None

    @classmethod
    async def open(cls, end: socket.socket, link: "Link") -> None:
        """Connect a link to its end of the pair."""
        await asyncio.get_running_loop().create_unix_connection(lambda: link, sock=end)

    def send(self, message: Message) -> None:
        """Send a message with all others of this turn of the event loop."""
        self._outbox.append(message)
        self.wake()

    def wake(self) -> None:
        """See to it that a frame is sent in this turn."""
        if not self._will_send:
            self._will_send = True
            asyncio.get_running_loop().call_soon(self.flush)

    def flush(self) -> None:
        """Send what there is to send, now; who can't, hangs up, so that nobody waits for what was not said."""
        try:
            try:
                self._before_send()
            finally:
                self._will_send = False
            outbox, self._outbox = self._outbox, []
            if outbox and self._transport is not None:
                frame = bytearray(LENGTH_BYTES)
                self._encoder.encode_into(outbox, frame, LENGTH_BYTES)
                frame[:LENGTH_BYTES] = (len(frame) - LENGTH_BYTES).to_bytes(LENGTH_BYTES, "big")
                self._transport.write(frame)
        except Exception:
            logger.exception("what another process of this service should hear can't be sent")
            if self._transport is not None:
                self._transport.abort()

    def close(self) -> None:
        """Hang up, when what was sent has gone out."""
        if self._transport is not None:
            self._transport.close()

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin."""
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is none of its subclasses
        self._transport.set_write_buffer_limits(self._most_unread)

    def pause_writing(self) -> None:
        """Take note that the other end leaves too much unread."""
        self.is_full = True

    def resume_writing(self) -> None:
        """Take note that it has read most of that."""
        self.is_full = False

    def data_received(self, data: bytes) -> None:
        """Take frames out of the stream."""
        buffer = self._buffer
        buffer += data
        try:
            del buffer[: self._take_frames(buffer)]
        except msgspec.MsgspecError:
            logger.exception("what another process of this service says can't be understood")
            if self._transport is not None:
                self._transport.abort()

    def _take_frames(self, buffer: bytearray) -> int:
        """Pass on what is complete; return how many bytes that was."""
        start = 0
        while len(buffer) - start >= LENGTH_BYTES:
            stop = start + LENGTH_BYTES + int.from_bytes(buffer[start : start + LENGTH_BYTES], "big")
            if stop > len(buffer):
                break
            with memoryview(buffer) as view, view[start + LENGTH_BYTES : stop] as frame:
                messages = self._decoder.decode(frame)
            start = stop
            self._received(messages)
        return start

    def connection_lost(self, exc: Exception | None) -> None:
        """Say so."""
        self._transport = None
        self._lost()
