"""Requests for inference by the protocol v2."""

from collections.abc import Sequence
from typing import Any, Final

import numpy as np

from service.api.endpoint import InferenceEndpoint
from service.api.options import MAX_DIGITS
from service.api.paths import model_of
from service.api.payload import Payload
from service.api.request import InferenceRequest, Respond
from service.api.response import Headers, Response, json_response
from service.api.v2.tensors import FEATURES, OutputFormat, read_body, read_images, read_outputs, write_body
from service.batching.queue import Prediction
from service.decoding.upload import Upload
from service.errors import BadRequest, NotFound
from service.repository.versions import LiveModel

JSON_LENGTH: Final = b"inference-header-content-length"


class InferRequest(InferenceRequest):
    """A request to `/v2/models/{name}[/versions/{version}]/infer`; its query is ignored."""

    __slots__ = ("_formats", "_head", "_json_bytes", "_model", "path")

    _formats: list[OutputFormat]
    _head: dict[str, str]

    def __init__(self, endpoint: "InferEndpoint", path: str, headers: Headers, query: bytes, respond: Respond) -> None:
        super().__init__(endpoint, headers, query, respond)
        self.path = path

    def _check_content_type(self) -> None:
        """Take any: clients of this protocol send none, or that of a form with curl."""

    def _check_options(self, live: LiveModel) -> None:
        check_model(live, *model_of(self.path))
        self._model = live
        self._json_bytes = read_length(dict(self._headers).get(JSON_LENGTH))

    def _is_parsed_inline(self, body: bytes) -> bool:
        size = len(body) if self._json_bytes is None else self._json_bytes
        return size <= self._service.settings.inline_decode_bytes  # what follows the JSON is sliced

    def _parse(self, body: bytes) -> Payload:
        live, settings = self._model, self._service.settings
        max_images = settings.max_images
        content, binary = read_body(body, self._json_bytes, max_images)
        self._formats = read_outputs(content, live.metadata, settings.max_top_k)
        self._head = {"model_name": live.metadata.name, "model_version": str(live.version)}
        if content.id:
            self._head["id"] = content.id
        if content.parameters and content.parameters.timeout:
            received = self._until - self._options.timeout
            self._options.timeout = min(self._options.timeout, content.parameters.timeout / 1e6)
            self._until = received + self._options.timeout
        images = read_images(content, binary, live.metadata, max_images)
        if isinstance(images, np.ndarray):
            self._pixels = list(images)
            return Payload([Upload(b"")] * len(images))
        return Payload(images)

    def _submit(self, live: LiveModel, uploads: Sequence[Upload], images: Sequence[Any]) -> None:
        with_features = any(name == FEATURES for name, *_ in self._formats)
        live.batcher.submit([image.data for image in images], self, self._until, with_features=with_features)

    def _response(self, result: list[Prediction]) -> Response:
        body, json_bytes = write_body(result, self._formats, self._model.metadata, self._head)
        response = json_response(200, body, self._request_id)
        if json_bytes is not None:
            response.headers[0] = (b"content-type", b"application/octet-stream")
            response.headers.append((JSON_LENGTH, b"%d" % json_bytes))
        return response


class InferEndpoint(InferenceEndpoint):
    """Makes and drives the requests for inference by the protocol v2."""

    def request(self, path: str, headers: Headers, query: bytes, respond: Respond) -> InferRequest:
        """Return the request of a POST's head."""
        return InferRequest(self, path, headers, query, respond)


def check_model(live: LiveModel, name: str, version: str | None) -> None:
    """Raise NotFound for another model, or another version, than the live one."""
    if name != live.metadata.name:
        raise NotFound(f"There is no model {name[:80]!r} here; there is {live.metadata.name!r}.")
    if version is not None and version != str(live.version):
        raise NotFound(f"Version {version[:20]!r} of {name} is not served; version {live.version} is.")


def read_length(value: bytes | None) -> int | None:
    """Read the header Inference-Header-Content-Length.

    Raises:
        BadRequest: it is no number of bytes.
    """
    if value is None:
        return None
    if not value.isdigit() or len(value) > MAX_DIGITS:
        raise BadRequest("Inference-Header-Content-Length must be the number of the JSON's bytes, 0 or more.")
    return int(value)
