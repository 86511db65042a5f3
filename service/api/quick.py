"""The short way of an ordinary request to `/predict`: whole in one read, small, decoded at once, answered in one write.

It needs no task, no coroutine and no ASGI message. It ends in one of three ways: with an answer; with an error, which
is answered as all errors are; or at once, where the request is not ordinary after all and takes the long way,
`service.api.predict`, from its beginning. What is checked here is checked by the same functions as there.
"""

from collections.abc import Sequence
from time import perf_counter
from typing import Final, Protocol

from service.api.middleware import Headers, Observe, check_key, error_answer
from service.api.paths import PREDICT
from service.api.predict import Options, PredictEndpoint, checked_top_k, read_options, server_timing
from service.api.response import AnswerWriter
from service.batching.admission import Ticket
from service.batching.queue import Prediction
from service.errors import ClientDisconnected, ServiceError
from service.lifecycle import Service
from service.repository.store import LiveModel

PATH: Final = PREDICT.encode()


class Connection(Protocol):
    """Where an answer goes."""

    def reply(self, answer: "QuickAnswer", status: int, head: bytes, body: bytes) -> None:
        """Send an answer; `head` are lines of its head, each with its end."""


class Quick:
    """What the short way needs of a process.

    Args:
        front: the service.
        predict: the long way.
        observe: gives request ids, and knows what is told of errors.
    """

    def __init__(self, front: Service, predict: PredictEndpoint, observe: Observe) -> None:
        settings = front.settings
        self.front = front
        self.predict = predict
        self.observe = observe
        self.keys = [key.encode() for key in settings.client_keys()]
        self._timeout_ms = settings.request_timeout_ms
        self._most_bytes = min(settings.inline_decode_bytes, settings.max_body_bytes)

    def options(self, url: bytes, headers: Headers) -> Options | None:
        """Read the head of a POST request; None where it must go the long way."""
        path, _, query = url.partition(b"?")
        if path != PATH or b"#" in query:
            return None
        try:
            options = read_options(headers, query, self._timeout_ms)
        except ServiceError:
            return None
        length = options.content_length
        return options if length is not None and length <= self._most_bytes else None


class QuickAnswer:
    """One request on the short way: what it holds, and where its answer goes; an `Outcome`.

    It also stands where uvicorn keeps a connection's `RequestResponseCycle`, and has what uvicorn asks of one.

    Args:
        quick: of the process.
        connection: that it came on.
        headers: of the request.

    Attributes:
        began: `perf_counter` at the end of the head.
    """

    __slots__ = (
        "_connection", "_decode_seconds", "_filenames", "_is_cancelled", "_is_done", "_live", "_quick",
        "_ticket", "_top_k", "_writer", "began", "disconnected", "headers", "keep_alive", "response_complete",
        "response_started",
    )  # fmt: skip

    more_body = False

    _live: LiveModel
    _ticket: Ticket
    _writer: AnswerWriter
    _filenames: Sequence[str | None]

    def __init__(self, quick: Quick, connection: Connection, headers: Headers) -> None:
        self.began = perf_counter()
        self.headers = headers
        self.keep_alive = True
        self.disconnected = self.response_started = self.response_complete = False
        self._quick = quick
        self._connection: Connection | None = connection
        self._is_done = self._is_cancelled = False

    def begin(self, options: Options, body: bytes, now: float) -> bool:
        """Have the images classified; False where this must go the long way, and nothing has happened.

        Args:
            options: of the head.
            body: all of it.
            now: on the clock of `loop.time()`.

        Raises:
            ServiceError: no answer but this error will come.
        """
        quick, front = self._quick, self._quick.front
        if quick.keys:
            check_key(self.headers, quick.keys)
        front.check_ready()
        received = perf_counter()
        uploads = front.decoder.parse_here(options.content_type, body)
        if uploads is None:
            return False
        live = front.lease()
        ticket = self._ticket = front.admission.admit(images=len(uploads), bytes=len(body))
        ticket.__enter__()
        self._live = live.__enter__()
        front.in_flight += 1
        try:
            writer = self._writer = quick.predict.writer_of(live)
            self._top_k = checked_top_k(options.top_k, writer.classes)
            images = front.decoder.decode_here(uploads, live.metadata)
            if images is None:
                self._let_go()
                return False
            self._decode_seconds = perf_counter() - received
            self._filenames = [upload.filename for upload in uploads]
            live.batcher.post([image.data for image in images], self, now + options.timeout)
        except BaseException:
            self._let_go()
            raise
        front.metrics.decoded(self._decode_seconds)
        return True

    def _let_go(self) -> None:
        """Give back what this holds."""
        self._quick.front.in_flight -= 1
        self._live.__exit__()
        self._ticket.__exit__(None, None, None)

    # An `Outcome`

    def done(self) -> bool:
        """Whether nobody waits for the answer any more, or it is there."""
        return self._is_done

    def cancelled(self) -> bool:
        """Whether the client has left."""
        return self._is_cancelled

    def set_result(self, result: list[Prediction], /) -> None:
        """Answer."""
        self._is_done = True
        try:
            body = self._writer.write(result, self._filenames, self._top_k)
        except Exception as error:  # a logit is not a number
            self.set_exception(error)
            return
        self._let_go()
        seconds = perf_counter() - self.began
        timing = server_timing(result, self._decode_seconds, seconds)
        request_id = self._quick.observe.request_id(self.headers)
        head = b"content-type: application/json\r\ncontent-length: %d\r\nserver-timing: %b\r\nx-request-id: %b\r\n" % (
            len(body),
            timing,
            request_id.encode(),
        )
        self._reply(200, seconds, request_id, head, body)

    def set_exception(self, exception: Exception, /) -> None:
        """Answer with an error."""
        self._is_done = True
        self._let_go()
        self.refuse(exception)

    def refuse(self, error: Exception) -> None:
        """Answer with the error that `begin` raised."""
        observe = self._quick.observe
        request_id = observe.request_id(self.headers)
        told = observe.told(error, request_id)
        self._quick.front.metrics.rejected(told.code)
        headers, body = error_answer(told, request_id)
        head = b"".join([b"%b: %b\r\n" % line for line in (*headers, (b"x-request-id", request_id.encode()))])
        self._reply(told.status, perf_counter() - self.began, request_id, head, body)

    def _reply(self, status: int, seconds: float, request_id: str, head: bytes, body: bytes) -> None:
        self._note(status, seconds, request_id)
        connection, self._connection = self._connection, None  # which may hold this, its cycle: a cycle of references
        assert connection is not None
        connection.reply(self, status, head, body)

    def _note(self, status: int, seconds: float, request_id: str) -> None:
        metrics = self._quick.front.metrics
        metrics.request(PREDICT, status)
        metrics.predicted(seconds, request_id)

    # What uvicorn asks of the cycle of a connection

    @property
    def message_event(self) -> "QuickAnswer":
        """What it sets when the connection has changed."""
        return self

    def set(self) -> None:
        """Take note that the client has left, if it has: what waits is not run, and nobody is answered."""
        if not self.disconnected or self._is_done:
            return
        self._is_done = self._is_cancelled = True
        self._let_go()
        self._connection = None
        self._quick.front.metrics.rejected(ClientDisconnected.code)
        request_id = self._quick.observe.request_id(self.headers)
        self._note(ClientDisconnected.status, perf_counter() - self.began, request_id)
