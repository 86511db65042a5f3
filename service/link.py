"""What the process that runs the model and those that speak HTTP say to each other, over a pair of sockets.

All that one side has to say in one turn of its event loop goes out in one frame: a length and a list of messages in
MessagePack, which are checked against these types where they arrive.
"""

import asyncio
import logging
import socket
from collections.abc import Callable, Sequence
from typing import Final, cast

import msgspec

from service.front import Status

logger = logging.getLogger(__name__)

LENGTH_BYTES: Final = 4
Headers = list[tuple[bytes, bytes]]


class Message(msgspec.Struct, array_like=True, tag_field="type"):
    """Base of all messages."""


# From a process that speaks HTTP


class Submit(Message, tag=0):
    """Pictures of one request.

    Attributes:
        number: of the request; the answer carries it.
        model: that the request holds, see `State`.
        deadline: on the clock of `loop.time()`, which is the same for all processes of a machine.
        pictures: the memory of uint8 [H, W, 3], each. (A memoryview may be sent too.)
    """

    number: int
    model: int
    deadline: float
    pictures: list[bytes]


class Cancel(Message, tag=1):
    """Nobody waits for these pictures any more."""

    number: int


class Call(Message, tag=2):
    """A request for any other route than /predict, without its body: none of them takes one."""

    number: int
    request_id: str
    method: str
    path: str
    raw_path: bytes
    query: bytes
    headers: Headers


class Counts(Message, tag=3):
    """What happened to requests since the message before.

    Attributes:
        answered: (route, status, how many).
        rejected: (error code, how many).
        request_seconds: one of each request to /predict, and its id.
        decode_seconds: one of each request that was decoded.
    """

    answered: list[tuple[str, int, int]]
    rejected: list[tuple[str, int]]
    request_seconds: list[tuple[float, str]]
    decode_seconds: list[float]


class Alive(Message, tag=4):
    """The answer to `Ask`; the counts that belong to it have been sent before."""

    number: int


class Listening(Message, tag=5):
    """It accepts connections."""


class Released(Message, tag=6):
    """No request holds this model any more, nor will one."""

    model: int


# From the process that runs the model


class State(Message, tag=10):
    """What is true from now on.

    Attributes:
        status: of the service.
        failure: why it can't go on; "".
        model: a number for the live one, never used before on this link: a version's folder may be filled anew; 0 while
            there is none.
        version: number of its folder.
        metadata: of its file, as JSON; only with the first message that names this model.
        drain_seconds: left to finish what was accepted; only where the status is "draining".
    """

    status: Status
    failure: str
    model: int
    version: int
    metadata: bytes
    drain_seconds: float


class Answered(Message, tag=11):
    """The answers to some requests, of models with the same number of classes.

    Attributes:
        numbers: of the requests.
        pictures: how many each has.
        queue_seconds: of each picture.
        runs: (how many pictures in a row come from one batch, its seconds of inference, its size).
        logits: float32 [pictures, C], in the machine's byte order, in pieces.
    """

    numbers: list[int] = []
    pictures: list[int] = []
    queue_seconds: list[float] = []
    runs: list[tuple[int, float, int]] = []
    logits: list[bytes] = []


class Refused(Message, tag=12):
    """The answer to a request that ended in an error: the class, see `service.errors`, and its words."""

    number: int
    error: str
    message: str
    retry_after: float


class Called(Message, tag=13):
    """The answer to a `Call`."""

    number: int
    status: int
    headers: Headers
    body: bytes


class Ask(Message, tag=14):
    """Are you there? Send what you have counted, and then `Alive`."""

    number: int


FromFront = Submit | Cancel | Call | Counts | Alive | Listening | Released
FromEngine = State | Answered | Refused | Called | Ask


class Link(asyncio.Protocol):
    """One end. Belongs to one event loop.

    Args:
        kind: what arrives here, a union of messages.
        received: called with the messages of each frame, in order.
        before_send: called before a frame is made; may `send` more.
        lost: called once when the other end is gone, or has said what can't be understood.
    """

    def __init__(
        self,
        kind: object,
        received: Callable[[Sequence[Message]], None],
        lost: Callable[[], None],
        before_send: Callable[[], None] = lambda: None,
    ) -> None:
        self._decoder: msgspec.msgpack.Decoder[list[Message]] = msgspec.msgpack.Decoder(list[kind])  # type: ignore[valid-type]
        self._encoder = msgspec.msgpack.Encoder()
        self._received = received
        self._lost = lost
        self._before_send = before_send
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
        """Send what there is to send, now."""
        self._before_send()
        self._will_send = False
        outbox, self._outbox = self._outbox, []
        if outbox and self._transport is not None:
            frame = bytearray(LENGTH_BYTES)
            self._encoder.encode_into(outbox, frame, LENGTH_BYTES)
            frame[:LENGTH_BYTES] = (len(frame) - LENGTH_BYTES).to_bytes(LENGTH_BYTES, "big")
            self._transport.write(frame)

    def close(self) -> None:
        """Hang up, when what was sent has gone out."""
        if self._transport is not None:
            self._transport.close()

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin."""
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is none of its subclasses

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
