"""`POST /embed`: the vector behind the classes, for each image."""

import json
from collections.abc import Sequence
from time import perf_counter
from typing import Any, Final

import numpy as np

from service.api.endpoint import InferenceEndpoint
from service.api.options import read_normalize
from service.api.paths import EMBED
from service.api.prediction_writer import server_timing
from service.api.request import InferenceRequest, Respond
from service.api.response import Headers, json_response
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

    def _submit(self, live: LiveModel, uploads: Sequence[Upload], images: Sequence[Any]) -> None:
        live.batcher.submit([image.data for image in images], self, self._until, with_features=True)

    def set_result(self, result: list[Prediction], /) -> None:
        """Respond with features, one vector an image."""
        try:
            response = json_response(200, self._written(result), self._request_id)
        except Exception as error:  # a feature is not a number
            self.fail(error)
            return
        timing = server_timing(result, self._decode_seconds, perf_counter() - self._began)
        response.headers.append((b"server-timing", timing))
        self._finish(200, response)

    def _written(self, predictions: list[Prediction]) -> bytes:
        assert self._live is not None
        features = np.stack([prediction.features for prediction in predictions]).astype(np.float64)
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
                {"filename": filename, "embedding": [float(f"{value:.{DIGITS}g}") for value in row]}
                for filename, row in zip(self._filenames, features.tolist(), strict=True)
            ],
        }
        return json.dumps(content).encode()


class EmbedEndpoint(InferenceEndpoint):
    """Makes and drives the requests to `/embed`."""

    def request(self, path: str, headers: Headers, query: bytes, respond: Respond) -> EmbedRequest:
        """Return the request of a POST's head."""
        return EmbedRequest(self, headers, query, respond)
