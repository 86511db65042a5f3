"""`POST /predict`: a body in, labels out. A plain ASGI endpoint, since a FastAPI route function costs twice the CPU.

    admission in bytes -> body -> admission in images -> decode -> batcher -> softmax, top k, JSON

A request holds one model from decode to answer, so that input size, labels and version belong together.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from time import perf_counter
from types import TracebackType
from typing import Final, Self
from urllib.parse import parse_qsl

from starlette.types import Receive, Scope, Send

from service.api.payload import check_content_type, check_size, read_body
from service.api.response import DEFAULT_TOP_K, AnswerWriter
from service.batching.queue import Prediction
from service.batching.timer import Recurring
from service.errors import BadRequest, ClientDisconnected, InvalidTimeout, InvalidTopK, Overloaded, UnsupportedEncoding
from service.lifecycle import Service
from service.repository.store import LiveModel

PATIENCE: Final = 0.05
MAX_QUERY_BYTES: Final = 1000
MAX_DIGITS: Final = 10  # of a number in a header or query; more are no sensible number, and slow to convert


@dataclass(slots=True)  # not frozen: that costs a microsecond a field
class Options:
    """What the head of a request asks for.

    Attributes:
        content_length: bytes; None where the length is not announced.
        timeout: seconds from the body's last byte.
        top_k: None where the default is wanted.
    """

    content_type: str
    content_length: int | None
    timeout: float
    top_k: int | None


class PredictEndpoint:
    """The ASGI application behind `POST /predict`."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self._writer: tuple[LiveModel, AnswerWriter] | None = None
        self._guards = PatientGuards()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request; raises ServiceError for everything that is not a prediction."""
        self.service.in_flight += 1
        try:
            body, timing = await self._answer(scope, receive)
            headers = [
                (b"content-type", b"application/json"),
                (b"content-length", b"%d" % len(body)),
                (b"server-timing", timing),
            ]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            await send({"type": "http.response.body", "body": body})
        finally:
            self.service.in_flight -= 1

    async def _answer(self, scope: Scope, receive: Receive) -> tuple[bytes, bytes]:
        """Return the JSON and the Server-Timing header."""
        started = perf_counter()
        service, settings, decoder = self.service, self.service.settings, self.service.decoder
        service.check_ready()
        options = read_options(scope["headers"], scope["query_string"], settings.request_timeout_ms)
        self._check_head(options)
        # Only bytes are counted until the body is here, and only those that have come: who sends slowly, or announces
        # much and sends nothing, must not keep others out.
        with service.admission.admit(images=0) as ticket:
            body = await read_body(receive, max_bytes=settings.max_body_bytes, grew=lambda size: ticket.add(bytes=size))
            received = perf_counter()
            deadline = asyncio.get_running_loop().time() + options.timeout
            with DisconnectGuard(receive, self._guards), service.lease() as live:
                writer = self.writer_of(live)
                top_k = checked_top_k(options.top_k, writer.classes)
                uploads = decoder.parse_here(options.content_type, body)
                if uploads is None:
                    uploads = await decoder.parse(options.content_type, body, deadline)
                ticket.add(images=len(uploads))
                images = decoder.decode_here(uploads, live.metadata)
                if images is None:
                    images = await decoder.decode(uploads, live.metadata, deadline)
                decoded = perf_counter()
                service.metrics.decoded(decoded - received)
                predictions = await live.batcher.submit_many(images, deadline=deadline)
        answer = writer.write(predictions, [upload.filename for upload in uploads], top_k)
        return answer, server_timing(predictions, decoded - received, perf_counter() - started)

    def _check_head(self, options: Options) -> None:
        """Refuse what the head condemns, or what will not fit, before a large body is sent for nothing."""
        check_content_type(options.content_type)
        if options.top_k is not None:
            with self.service.lease() as live:  # whose classes may be fewer than those of the one that answers
                checked_top_k(options.top_k, self.writer_of(live).classes)
        announced = options.content_length or 0
        check_size(announced, self.service.settings.max_body_bytes)
        admission = self.service.admission
        if admission.is_full(size=announced):
            raise Overloaded(retry_after=admission.retry_after(announced))

    def writer_of(self, live: LiveModel) -> AnswerWriter:
        """Return the writer of a model's answers, which is kept while it is the live one."""
        if self._writer is None or self._writer[0] is not live:
            self._writer = (live, AnswerWriter(live.metadata, live.version))
        return self._writer[1]


class DisconnectGuard:
    """Cancels the work inside when the client leaves, which turns into ClientDisconnected.

    Neither FastAPI nor the server does this: without it, the images of clients that gave up would still be run. It
    begins to look when `PatientGuards` says so, since looking takes a task, and most answers are ready before.
    """

    def __init__(self, receive: Receive, guards: "PatientGuards") -> None:
        self._receive = receive
        self._guards = guards
        self._gone = False
        self._watcher: asyncio.Task[None] | None = None

    def __enter__(self) -> Self:
        task = asyncio.current_task()
        assert task is not None
        self._task = task
        self._guards.add(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._guards.discard(self)
        if self._watcher is not None:
            self._watcher.cancel()
            # It holds the error that ends it, whose frames hold this guard: a cycle, which only a collection would
            # free. Under load collections of requests took 80 ms, in which nobody was answered.
            self._watcher = None
        if self._gone and kind is asyncio.CancelledError:
            self._task.uncancel()
            raise ClientDisconnected from error

    def begin(self) -> None:
        """Look for the client's leaving from now on."""
        self._watcher = asyncio.create_task(self._watch())

    async def _watch(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._gone = True
        self._task.cancel()


class PatientGuards:
    """The guards of requests that are younger than PATIENCE, the oldest first; older ones begin to look."""

    def __init__(self) -> None:
        self._since: dict[DisconnectGuard, float] = {}
        self._looks = Recurring(self._look)

    def add(self, guard: DisconnectGuard) -> None:
        """Take a guard in."""
        self._since[guard] = perf_counter()
        self._looks.wake()

    def discard(self, guard: DisconnectGuard) -> None:
        """Forget a guard, whether it is still here or not."""
        self._since.pop(guard, None)

    def _look(self) -> bool:
        patient = perf_counter() - PATIENCE
        while self._since:
            guard, since = next(iter(self._since.items()))
            if since > patient:
                break
            del self._since[guard]
            guard.begin()
        return bool(self._since)


def read_options(lines: Sequence[tuple[bytes, bytes]], query: bytes, max_timeout_ms: int) -> Options:
    """Read the headers and the query string of a request; of a header that is given twice, the last.

    Content-Encoding is the exception: each names one more coding of the body.

    Raises:
        InvalidTimeout, InvalidTopK: not an integer, or below 1.
        BadRequest: an unknown query parameter, which may be a misspelt one.
        UnsupportedEncoding: the body is compressed.
    """
    headers = dict(lines)
    if b"content-encoding" in headers:
        codings = b",".join([value.lower() for name, value in lines if name == b"content-encoding"]).split(b",")
        if any(coding.strip() not in (b"", b"identity") for coding in codings):  # a list may have empty places
            raise UnsupportedEncoding()
    length = headers.get(b"content-length")
    timeout_ms = max_timeout_ms
    if (asked := headers.get(b"x-request-timeout-ms")) is not None:
        timeout_ms = min(max_timeout_ms, positive(asked.decode("latin-1"), InvalidTimeout()))
    return Options(
        content_type=headers.get(b"content-type", b"").decode("latin-1"),
        # HTTP allows any number of leading zeros, and the parser has bounded the rest; int() takes 4,300 digits alone.
        content_length=None if length is None else int(length.lstrip(b"0") or b"0"),
        timeout=timeout_ms / 1000,
        top_k=read_top_k(query) if query else None,
    )


def read_top_k(query: bytes) -> int | None:
    """Read the one parameter that there is."""
    if len(query) > MAX_QUERY_BYTES:
        raise InvalidTopK(f"The query is longer than {MAX_QUERY_BYTES} bytes; there is one parameter, top_k.")
    return _read_top_k(query)


@lru_cache(maxsize=128)  # a client sends the same query each time, and errors are not kept
def _read_top_k(query: bytes) -> int | None:
    top_k = None
    for name, value in parse_qsl(query.decode("latin-1"), keep_blank_values=True):
        if name != "top_k":
            raise BadRequest(f"There is no query parameter {name[:40]!r}; there is top_k.")
        if top_k is not None:
            raise InvalidTopK("top_k is given twice.")
        top_k = positive(value, InvalidTopK())
    return top_k


def positive(text: str, otherwise: BadRequest) -> int:
    """Read an integer of at least 1, or raise."""
    if not (text.isascii() and text.isdigit() and len(text) <= MAX_DIGITS and int(text) >= 1):
        raise otherwise
    return int(text)


def checked_top_k(top_k: int | None, classes: int) -> int:
    """Return how many classes to name; the default is 5, or all of fewer."""
    if top_k is None:
        return min(DEFAULT_TOP_K, classes)
    if top_k > classes:
        raise InvalidTopK(f"top_k is {top_k}, and this model has {classes} classes.")
    return top_k


def server_timing(predictions: Sequence[Prediction], decode: float, total: float) -> bytes:
    """Return the Server-Timing header, from seconds; of several images the longest."""
    queue = max([prediction.queue_seconds for prediction in predictions])
    inference = max([prediction.inference_seconds for prediction in predictions])
    return (
        f"decode;dur={decode * 1000:.3f}, queue;dur={queue * 1000:.3f}, "
        f"inference;dur={inference * 1000:.3f}, total;dur={total * 1000:.3f}"
    ).encode()
