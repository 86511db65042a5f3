"""`POST /embed`: the vector behind the classes, for each image."""

from collections.abc import Sequence
from typing import Any, Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from service.api.endpoint import InferenceEndpoint
from service.api.options import checked_normalize, read_normalize
from service.api.paths import EMBED
from service.api.payload import Payload
from service.api.request import InferenceRequest, Respond
from service.api.response import Headers, Response, json_response
from service.batching.queue import Prediction
from service.decoding.upload import Upload
from service.errors import FeaturesUnavailable, InferenceFailed
from service.repository.versions import LiveModel

DIGITS: Final = 7  # significant ones of a number: float32 has no more


class EmbedRequest(InferenceRequest):
    """A request for the features of each image."""

    __slots__ = ("_is_normalized",)

    path = EMBED

    def _check_options(self, live: LiveModel) -> None:
        if live.metadata.feature_dim is None:
            raise FeaturesUnavailable()
        self._is_normalized = read_normalize(self._query)

    def _check_payload(self, payload: Payload) -> None:
        field = payload.options.get("normalize")
        if field is not None and not self._query:
            self._is_normalized = checked_normalize(field)

    def _submit(self, live: LiveModel, uploads: Sequence[Upload], images: Sequence[Any]) -> None:
        live.batcher.submit([image.data for image in images], self, self._until, with_features=True)

    def _response(self, result: list[Prediction]) -> Response:
        assert self._live is not None
        features = np.stack([prediction.features for prediction in result]).astype(np.float64)
        if self._is_normalized:
            lengths = np.linalg.norm(features, axis=1, keepdims=True)
            features /= np.where(lengths == 0, 1, lengths)
        if not np.isfinite(features).all():
            raise InferenceFailed("A feature of the model is not a number.")
        content = {
            "model": self._live.metadata.name,
            "version": self._live.version,
            "dim": features.shape[1],
            "normalized": self._is_normalized,
            "embeddings": [
                {"filename": filename, "embedding": row}
                for filename, row in zip(self._filenames, rounded(features).tolist(), strict=True)
            ],
        }
        return json_response(200, msgspec.json.encode(content), self._request_id)


class EmbedEndpoint(InferenceEndpoint):
    """Makes and drives the requests to `/embed`."""

    def request(self, path: str, headers: Headers, query: bytes, respond: Respond) -> EmbedRequest:
        """Return the request of a POST's head."""
        return EmbedRequest(self, headers, query, respond)


def rounded(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Round finite numbers of any shape to DIGITS: all at once, since a large response would hold up the event loop."""
    with np.errstate(divide="ignore"):  # 0
        exponents = np.floor(np.log10(np.abs(values))).clip(-300, 300)
    scale = 10.0 ** (DIGITS - 1 - exponents)
    result: NDArray[np.float64] = (values * scale).round() / scale
    return result
