"""`POST /explain`: which regions of an image carry a label, by covering parts of it."""

import asyncio
import json
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Final, TypeVar

import numpy as np

from service.api.endpoint import InferenceEndpoint
from service.api.options import read_label
from service.api.paths import EXPLAIN
from service.api.payload import Payload
from service.api.request import InferenceRequest, Respond
from service.api.response import Headers, Response, json_response, png_response
from service.batching.logits import softmax
from service.batching.queue import Prediction
from service.decoding.decoder import Pixels
from service.decoding.upload import Upload
from service.errors import ExplainDisabled, InferenceFailed, InvalidLabel, TooManyImages
from service.explanation.masks import METHOD, RUNS, Grid, cover, grid_of, heat_map, mean_colour, rise_masks
from service.explanation.overlay import display_size, overlay
from service.repository.versions import LiveModel

T = TypeVar("T")

DIGITS: Final = 6  # of the numbers in a response


class ExplainRequest(InferenceRequest):
    """A request for heat maps. Its images run in the background: others wait for one batch of it at most."""

    __slots__ = ("_explained", "_label", "_maps", "_png", "_uploads", "_wants_png")

    path = EXPLAIN
    is_background = True
    _uploads: Sequence[Upload]
    _explained: list[tuple[int, float]]  # the index of each image's label, and its probability
    _maps: list[Grid]
    _png: bytes

    def _check_options(self, live: LiveModel) -> None:
        if self._service.settings.explain_max_runs == 0:
            raise ExplainDisabled()
        label = read_label(self._query)
        self._label = None if label is None else index_of(label, live)
        self._wants_png = any(name == b"accept" and b"image/png" in value for name, value in self._headers)

    def _submit(self, live: LiveModel, uploads: Sequence[Upload], images: Sequence[Any]) -> None:
        self._uploads = uploads
        self._task = asyncio.get_running_loop().create_task(self._explain(live, images))

    async def _explain(self, live: LiveModel, images: Sequence[Pixels] | Pixels) -> None:
        try:
            masks = await self._in_thread(partial(rise_masks, grid_of(live.metadata.input_size)))
            predictions = await self._run(live, images)
            self._explained = [self._label_of(prediction) for prediction in predictions]
            self._maps = [
                await self._map(live, image, masks, *explained)
                for image, explained in zip(images, self._explained, strict=True)
            ]
            if self._wants_png:
                self._png = await self._drawn(live)
        except Exception as error:
            self.fail(error)
        else:
            self._task = None
            self._service.metrics.explained(len(images))
            self.set_result(predictions)

    def _check_payload(self, payload: Payload) -> None:
        """Raise TooManyImages for more runs than are allowed, or for more maps than the response can show.

        The label may be a form's field, where the query has none.
        """
        images, max_runs = len(payload.uploads), self._service.settings.explain_max_runs
        if images * (1 + RUNS) > max_runs:
            raise TooManyImages(
                f"An explanation takes {1 + RUNS} runs of the model, and a request may have {max_runs}: "
                f"{max_runs // (1 + RUNS)} images."
            )
        if self._wants_png and images > 1:
            raise TooManyImages("As image/png the response shows one image; send one, or accept application/json.")
        if self._label is None and (label := payload.options.get("label")) is not None:
            assert self._live is not None
            self._label = index_of(label, self._live)

    def _label_of(self, prediction: Prediction) -> tuple[int, float]:
        (first, *_), _ = prediction.top(1)
        label = first if self._label is None else self._label
        return label, float(softmax(prediction.logits)[label])

    async def _map(self, live: LiveModel, image: Pixels, masks: Grid, label: int, probability: float) -> Grid:
        """Run the image under each mask, a batch at a time: no more of it is in memory or in the queue."""
        # A large batch must leave room for others, whom a full queue would refuse.
        size = min(live.batcher.max_batch_size, len(masks), max(1, self._service.admission.max_images // 2))
        self._ticket.add(images=max(0, size - self._ticket.images))
        fill = await self._in_thread(partial(mean_colour, image))
        covered: list[float] = []
        for start in range(0, len(masks), size):
            batch = await self._in_thread(partial(cover, image, fill, masks[start : start + size]))
            predictions = await self._run(live, batch)
            covered += softmax(np.stack([prediction.logits for prediction in predictions]))[:, label].tolist()
        if not np.isfinite(covered).all():
            raise InferenceFailed("A logit of the model is not a number.")
        return heat_map(masks, probability - np.array(covered, np.float32))

    async def _run(self, live: LiveModel, images: Sequence[Pixels] | Pixels) -> list[Prediction]:
        future: asyncio.Future[list[Prediction]] = asyncio.get_running_loop().create_future()
        live.batcher.submit([image.data for image in images], future, self._until, is_background=True)
        try:
            return await future
        finally:
            del future  # an error's traceback holds this frame: a cycle of references

    async def _in_thread(self, function: Callable[[], T]) -> T:
        return await self._service.decoder.in_thread(function, self._until, is_background=True)

    async def _drawn(self, live: LiveModel) -> bytes:
        shown = live.metadata.model_copy(update={"input_size": display_size(live.metadata.input_size)})
        (image,) = await self._service.decoder.decode(self._uploads, shown, self._until)
        ((label, probability),) = self._explained
        title = f"{live.metadata.labels[label]}, {probability:.1%}"
        return await self._in_thread(partial(overlay, image, self._maps[0], title))

    def _response(self, result: list[Prediction]) -> Response:
        if self._wants_png:
            return png_response(self._png, self._request_id)
        assert self._live is not None
        metadata = self._live.metadata
        explanations = [
            {
                "filename": filename,
                "label": metadata.labels[label],
                "index": label,
                "probability": round(probability, DIGITS),
                "size": list(heat.shape),
                "map": [[round(value, DIGITS) for value in row] for row in heat.tolist()],
            }
            for filename, (label, probability), heat in zip(self._filenames, self._explained, self._maps, strict=True)
        ]
        content = {
            "model": metadata.name,
            "version": self._live.version,
            "method": METHOD,
            "model_runs": len(result) * (1 + RUNS),
            "crop": metadata.resize.crop,
            "input_size": list(metadata.input_size),
            "explanations": explanations,
        }
        return json_response(200, json.dumps(content).encode(), self._request_id)


def index_of(label: str, live: LiveModel) -> int:
    """Return a label's index, or raise InvalidLabel."""
    if label not in live.metadata.labels:
        raise InvalidLabel(f"This model has no label {label[:40]!r}; GET /models lists those that it has.")
    return live.metadata.labels.index(label)


class ExplainEndpoint(InferenceEndpoint):
    """Makes and drives the requests to `/explain`."""

    def request(self, path: str, headers: Headers, query: bytes, respond: Respond) -> ExplainRequest:
        """Return the request of a POST's head."""
        return ExplainRequest(self, headers, query, respond)
