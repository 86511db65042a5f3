"""One request for inference, from its head to its response.

Its life has one order: head checked, admitted, body read, decoded, queued, answered. A connection's callbacks drive it
where the body is small, and an ASGI task where it is large or chunked; both call `start`, `receive` and `run`.
"""

import asyncio
from collections.abc import Callable, Sequence
from functools import partial
from time import perf_counter
from typing import TYPE_CHECKING, Any

from service.api.keys import check_key
from service.api.options import RequestOptions, read_options
from service.api.payload import Payload, check_content_type, check_size, parse_body
from service.api.prediction_writer import server_timing
from service.api.response import Headers, Response, error_response
from service.batching.admission import Ticket
from service.batching.queue import Prediction
from service.decoding.decoder import Pixels
from service.decoding.upload import Upload
from service.errors import ClientDisconnected, DeadlineExceeded, Overloaded
from service.repository.versions import LiveModel

if TYPE_CHECKING:
    from service.api.endpoint import InferenceEndpoint

Respond = Callable[[Response | None], None]


class InferenceRequest:
    """One request, as the batcher's `FutureLike` and as one of the requests in flight.

    A kind of request says what its head may ask for (`_check_options`), and what its response is (`_response`); one
    of another payload format than `/predict` says what that is (`_check_content_type`, `_is_parsed_inline`, `_parse`).

    Attributes:
        path: of the URL.
        is_background: whether its images wait until no others do.

    Args:
        endpoint: what all requests share.
        headers: of the head, names in lower case.
        query: of the URL, without its question mark.
        respond: called exactly once; with None where the client has left.
    """

    __slots__ = (
        "_began", "_checked", "_chunks", "_decode_seconds", "_endpoint", "_filenames", "_headers", "_is_cancelled",
        "_is_done", "_live", "_options", "_pixels", "_query", "_received", "_request_id", "_respond", "_service",
        "_task", "_ticket", "_until",
    )  # fmt: skip

    path: str
    is_background = False
    _options: RequestOptions
    _checked: LiveModel
    _filenames: Sequence[str | None]

    def __init__(self, endpoint: "InferenceEndpoint", headers: Headers, query: bytes, respond: Respond) -> None:
        self._began = perf_counter()
        self._endpoint = endpoint
        self._service = service = endpoint.service
        self._headers = headers
        self._query = query
        self._respond = respond
        self._request_id = endpoint.log.request_id(headers)
        self._ticket = Ticket(service.admission, is_background=self.is_background)
        self._live: LiveModel | None = None
        self._task: asyncio.Task[None] | None = None
        self._chunks: list[bytes] = []
        self._pixels: list[Pixels] | None = None  # of a body that holds no files, but uint8 [N, H, W, 3]
        self._is_done = self._is_cancelled = False

    # The life, driven by a connection or by ASGI

    def start(self) -> None:
        """Check the head, before a large body is sent for nothing. A refused request has its response at once."""
        self._service.in_flight.add(self)
        try:
            self._check_head()
        except Exception as error:
            self.fail(error)

    def receive(self, chunk: bytes) -> None:
        """Admit a piece of the body. What comes behind the response is dropped."""
        if self._is_done:
            return
        try:
            # Only bytes that have come count: who announces much and sends nothing must not keep others out.
            check_size(self._ticket.bytes + len(chunk), self._service.settings.max_body_bytes)
            self._ticket.add(bytes=len(chunk))
            self._chunks.append(chunk)
        except Exception as error:
            self.fail(error)

    def run(self) -> None:
        """Decode the body, which is whole now, and queue its images."""
        if self._is_done:
            return
        try:
            self._decode()
        except Exception as error:
            self.fail(error)

    def _check_head(self) -> None:
        endpoint, service, settings = self._endpoint, self._service, self._service.settings
        if endpoint.keys:
            check_key(self._headers, endpoint.keys)
        service.check_ready()
        self._options = options = read_options(self._headers, settings.request_timeout_ms)
        self._check_content_type()
        self._checked = live = service.lease()
        self._check_options(live)
        announced = options.content_length or 0
        check_size(announced, settings.max_body_bytes)
        if service.admission.is_full(size=announced):
            raise Overloaded(retry_after=service.admission.retry_after(announced))
        if options.content_length is None or announced > settings.inline_decode_bytes:  # a small body is here already
            service.admission.check_wait(1, options.timeout, live.expected_rate)

    def _check_content_type(self) -> None:
        check_content_type(self._options.content_type)

    def _check_options(self, live: LiveModel) -> None:
        """Read what only this kind of request asks for, and check it against a model.

        It is called for the head, and again where another model serves the request.
        """
        raise NotImplementedError

    def _decode(self) -> None:
        self._received = perf_counter()
        self._until = asyncio.get_running_loop().time() + self._options.timeout
        # One model from here to the response, so that input size, labels and version belong together.
        self._live = live = self._service.lease().__enter__()
        if live is not self._checked:
            self._check_options(live)
        chunks, self._chunks = self._chunks, []
        body = chunks[0] if len(chunks) == 1 else b"".join(chunks)
        decoder, uploads, images = self._service.decoder, None, None
        if self._is_parsed_inline(body):
            uploads = self._admit(live, self._parse(body))
            images = self._pixels if self._pixels is not None else decoder.decode_inline(uploads, live.metadata)
        if uploads is not None and images is not None:
            self._queue(uploads, images)
        else:
            self._task = asyncio.get_running_loop().create_task(self._decode_elsewhere(live, body, uploads))

    async def _decode_elsewhere(self, live: LiveModel, body: bytes, uploads: list[Upload] | None) -> None:
        """Parse and decode what would hold up the event loop."""
        decoder = self._service.decoder
        try:
            if uploads is None:
                parse = partial(self._parse, body)
                payload = await decoder.in_thread(parse, self._until, is_background=self.is_background)
                uploads = self._admit(live, payload)
            images = self._pixels
            if images is None:
                images = await decoder.decode(uploads, live.metadata, self._until)
            self._queue(uploads, images)
        except Exception as error:
            self.fail(error)

    def _is_parsed_inline(self, body: bytes) -> bool:
        """Whether parsing the body is cheap enough for the event loop."""
        return self._service.decoder.is_small(body) or self._options.content_type.startswith("image/")

    def _parse(self, body: bytes) -> Payload:
        """Return the files of a body, or set `_pixels` and return as many empty ones. It may run in a thread."""
        return parse_body(self._options.content_type, body, max_images=self._service.settings.max_images)

    def _admit(self, live: LiveModel, payload: Payload) -> list[Upload]:
        self._check_payload(payload)
        images = len(payload.uploads)
        self._service.admission.check_wait(images, self._options.timeout, live.expected_rate)
        self._ticket.add(images=images)
        return payload.uploads

    def _check_payload(self, payload: Payload) -> None:
        """Check, before anything is decoded, what only this kind of request bounds or reads."""

    def _queue(self, uploads: Sequence[Upload], images: Sequence[Any]) -> None:
        assert self._live is not None
        self._task = None
        self._decode_seconds = perf_counter() - self._received
        self._filenames = [upload.filename for upload in uploads]
        self._submit(self._live, uploads, images)
        self._service.metrics.decoded(self._decode_seconds)

    def _submit(self, live: LiveModel, uploads: Sequence[Upload], images: Sequence[Any]) -> None:
        """Queue the images, each uint8 [H, W, 3]."""
        live.batcher.submit([image.data for image in images], self, self._until)

    # The batcher's FutureLike

    def done(self) -> bool:
        """Whether it has its response, or nobody waits for one."""
        return self._is_done

    def cancelled(self) -> bool:
        """Whether its client has left."""
        return self._is_cancelled

    def set_result(self, result: list[Prediction], /) -> None:
        """Respond with predictions, one an image."""
        try:
            response = self._response(result)
        except Exception as error:  # a logit is not a number
            self.fail(error)
            return
        timing = server_timing(result, self._decode_seconds, perf_counter() - self._began)
        response.headers.append((b"server-timing", timing))
        self._finish(200, response)

    def _response(self, result: list[Prediction]) -> Response:
        """Return the response of predictions, one an image."""
        raise NotImplementedError

    def set_exception(self, exception: Exception, /) -> None:
        """Respond with an error."""
        self.fail(exception)

    # Its end

    def fail(self, error: Exception) -> None:
        """Respond with an error, unless there is a response already."""
        if self._is_done:
            return
        public = self._endpoint.log.public_error(error, self._request_id)
        self._finish(public.status, error_response(public, self._request_id, self.path))

    def cancel(self) -> None:
        """Drop the request of a client that has left: what is queued is not run."""
        if self._is_done:
            return
        self._is_cancelled = True
        self._endpoint.log.public_error(ClientDisconnected(), self._request_id)
        self._finish(ClientDisconnected.status, None)

    def _finish(self, status: int, response: Response | None) -> None:
        """Release what the request holds, record it, and respond."""
        self._is_done = True
        self._chunks = []
        if self._task is not None:
            self._task.cancel()
            self._task = None
        if self._live is not None:
            self._live.__exit__()
            self._live = None
        self._ticket.release(served=status == 200, missed=status == DeadlineExceeded.status)
        self._service.in_flight.discard(self)
        self._endpoint.log.finished("POST", self.path, status, perf_counter() - self._began, self._request_id)
        respond: Respond = self._respond
        self._respond = _ignore  # it may hold this: a cycle that only a collection would free
        respond(response)


def _ignore(response: Response | None) -> None:
    """Respond to nobody."""
