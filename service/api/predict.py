"""`POST /predict`: the two drivers of its requests, and what these share."""

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, Final

from starlette.types import Receive, Scope, Send

from service.api.options import MAX_DIGITS
from service.api.paths import PREDICT
from service.api.prediction_writer import PredictionWriter
from service.api.request import InferenceRequest, Respond
from service.api.request_log import RequestLog
from service.api.response import Headers, Response
from service.errors import Draining
from service.lifecycle import Service
from service.repository.versions import LiveModel

PATH: Final = PREDICT.encode()
FAULT: Final = "perceiver.fault"  # in a message of type http.disconnect: the client is there, and this is wrong
# A request with one of these needs ASGI: a browser's gets CORS headers, the others' bodies come later or in chunks.
NOT_DIRECT: Final = frozenset({b"origin", b"expect", b"transfer-encoding"})


class PredictEndpoint:
    """Makes and drives the requests to `/predict`.

    Attributes:
        service: of this process.
        log: records the requests.
        keys: one of which a request must have; none: open to all.
    """

    def __init__(self, service: Service, log: RequestLog) -> None:
        settings = service.settings
        self.service = service
        self.log = log
        self.keys = [key.encode() for key in settings.client_keys()]
        self._max_direct_bytes = min(settings.inline_decode_bytes, settings.max_body_bytes)
        self._writer: tuple[LiveModel, PredictionWriter] | None = None

    def writer_of(self, live: LiveModel) -> PredictionWriter:
        """Return the writer of a model's predictions, which is kept while that model is the live one."""
        if self._writer is None or self._writer[0] is not live:
            self._writer = (live, PredictionWriter(live.metadata, live.version))
        return self._writer[1]

    def direct(self, url: bytes, headers: Headers, respond: Respond) -> InferenceRequest | None:
        """Return the request of a POST's head, for a connection to drive; None where ASGI has to.

        It depends on the head alone: a small body of known length, and no header that asks for more.
        """
        path, _, query = url.partition(b"?")
        if path != PATH or b"#" in query:
            return None
        fields = dict(headers)
        size = fields.get(b"content-length", b"")
        if not NOT_DIRECT.isdisjoint(fields) or len(size) > MAX_DIGITS or not size.isdigit():
            return None
        if int(size) > self._max_direct_bytes:
            return None
        return InferenceRequest(self, headers, query, respond)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Drive one request by ASGI."""
        answered = asyncio.Event()
        responses: list[Response | None] = []

        def respond(response: Response | None) -> None:
            responses.append(response)
            answered.set()

        request = InferenceRequest(self, scope["headers"], scope["query_string"], respond)
        request.start()
        reading = None if responses else asyncio.create_task(read(request, receive))
        try:
            await answered.wait()
        except asyncio.CancelledError:
            request.fail(Draining())
        finally:
            if reading is not None:
                reading.cancel()
        if (response := responses.pop()) is not None:
            await send({"type": "http.response.start", "status": response.status, "headers": response.headers})
            await send({"type": "http.response.body", "body": response.body})


async def read(request: InferenceRequest, receive: Callable[[], Awaitable[MutableMapping[str, Any]]]) -> None:
    """Give a request its body as it comes; then watch whether its client leaves."""
    is_whole = False
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            fault = message.get(FAULT)
            request.cancel() if fault is None else request.fail(fault)
            return
        if not is_whole:
            request.receive(message.get("body", b""))
            if not message.get("more_body", False):
                is_whole = True
                request.run()
