"""`POST /predict`: the classes of images. A connection drives its small requests without ASGI."""

from typing import Final

from service.api.endpoint import InferenceEndpoint
from service.api.options import MAX_DIGITS, checked_top_k, positive, read_top_k
from service.api.paths import PREDICT
from service.api.payload import Payload
from service.api.prediction_writer import PredictionWriter
from service.api.request import InferenceRequest, Respond
from service.api.request_log import RequestLog
from service.api.response import Headers, Response, json_response
from service.batching.queue import Prediction
from service.errors import InvalidTopK, LengthRequired
from service.lifecycle import Service
from service.repository.versions import LiveModel

PATH: Final = PREDICT.encode()
# A request with one of these needs ASGI: a browser's gets CORS headers, the others' bodies come later or in chunks.
NOT_DIRECT: Final = frozenset({b"origin", b"expect", b"transfer-encoding"})


class PredictRequest(InferenceRequest):
    """A request for the most probable classes of each image."""

    __slots__ = ("_asked_top_k", "_top_k", "_writer")

    path = PREDICT
    _endpoint: "PredictEndpoint"

    def _check_options(self, live: LiveModel) -> None:
        self._writer = self._endpoint.writer_of(live)
        self._asked_top_k = asked = read_top_k(self._query)
        self._top_k = checked_top_k(asked, self._writer.classes, self._service.settings.max_top_k)

    def _check_payload(self, payload: Payload) -> None:
        if (field := payload.options.get("top_k")) is None:
            return
        asked = positive(field, InvalidTopK())
        if self._asked_top_k is None:
            self._top_k = checked_top_k(asked, self._writer.classes, self._service.settings.max_top_k)

    def _response(self, result: list[Prediction]) -> Response:
        return json_response(200, self._writer.write(result, self._filenames, self._top_k), self._request_id)


class PredictEndpoint(InferenceEndpoint):
    """Makes and drives the requests to `/predict`."""

    def __init__(self, service: Service, log: RequestLog) -> None:
        super().__init__(service, log)
        settings = service.settings
        self._max_direct_bytes = min(settings.inline_decode_bytes, settings.max_body_bytes)
        self._writer: tuple[LiveModel, PredictionWriter] | None = None

    def request(self, path: str, headers: Headers, query: bytes, respond: Respond) -> PredictRequest:
        """Return the request of a POST's head."""
        return PredictRequest(self, headers, query, respond)

    def writer_of(self, live: LiveModel) -> PredictionWriter:
        """Return the writer of a model's predictions, which is kept while that model is the live one."""
        if self._writer is None or self._writer[0] is not live:
            self._writer = (live, PredictionWriter(live.metadata, live.version))
        return self._writer[1]

    def direct(self, url: bytes, headers: Headers, respond: Respond) -> PredictRequest | None:
        """Return the request of a POST's head, for a connection to drive; None where ASGI has to.

        It depends on the head alone: a small body of known length, and no header that asks for more.

        Raises:
            LengthRequired
        """
        path, _, query = url.partition(b"?")
        if path != PATH or b"#" in query:
            return None
        fields = dict(headers)
        size = fields.get(b"content-length", b"")
        if not size and b"transfer-encoding" not in fields:
            raise LengthRequired()
        if not NOT_DIRECT.isdisjoint(fields) or len(size) > MAX_DIGITS or not size.isdigit():
            return None
        if int(size) > self._max_direct_bytes:
            return None
        return PredictRequest(self, headers, query, respond)
