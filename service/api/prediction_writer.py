"""Predictions to the JSON of `PredictResponse`, by hand: it is on the path of every image.

`tests/service/api/test_prediction_writer.py` holds the bytes against the pydantic model.
"""

import json
import math
from collections.abc import Sequence

from service.batching.queue import Prediction
from service.engine.metadata import ModelMetadata


class PredictionWriter:
    """Writes the predictions of one model version; what all of them share is encoded once.

    Attributes:
        classes: the number of labels.
    """

    def __init__(self, metadata: ModelMetadata, version: int) -> None:
        self.classes = len(metadata.labels)
        self._threshold = metadata.unfamiliarity.threshold if metadata.unfamiliarity else math.inf
        self._head = f'{{"model":{json.dumps(metadata.name)},"version":{version},"predictions":['
        # Templates, of which one `%` fills all that an image has: a third less than one by one.
        labels = [json.dumps(label).replace("%", "%%") for label in metadata.labels]
        self._entries = [f'{{"label":{label},"index":{index},"probability":%.6f' for index, label in enumerate(labels)]

    def write(self, predictions: Sequence[Prediction], filenames: Sequence[str | None], top_k: int) -> bytes:
        """Top k and JSON.

        Args:
            predictions: N.
            filenames: N names or None.
            top_k: 1 to C; of equal probabilities the lower index comes first.

        Raises:
            InferenceFailed: a logit or a score is not a number, so that no answer would be one.
        """
        images = [
            self._image(name, *prediction.top(top_k), prediction.unfamiliarity)
            for name, prediction in zip(filenames, predictions, strict=True)
        ]
        return f"{self._head}{','.join(images)}]}}".encode()

    def _image(self, filename: str | None, classes: list[int], probabilities: list[float], score: float | None) -> str:
        entries = self._entries
        top = "},".join([entries[index] for index in classes]) % tuple(probabilities)
        name = "null" if filename is None else json.dumps(filename)
        if score is None:
            return f'{{"filename":{name},"top":[{top}}}]}}'
        unfamiliar = "true" if score > self._threshold else "false"
        return f'{{"filename":{name},"top":[{top}}}],"unfamiliar":{unfamiliar},"unfamiliarity":{score:.4f}}}'


def server_timing(predictions: Sequence[Prediction], decode: float, total: float) -> bytes:
    """Return the Server-Timing header, from seconds; of several images the longest."""
    queue = inference = 0.0
    for prediction in predictions:
        queue = max(queue, prediction.queue_seconds)
        inference = max(inference, prediction.inference_seconds)
    return (
        f"decode;dur={decode * 1000:.3f}, queue;dur={queue * 1000:.3f}, "
        f"inference;dur={inference * 1000:.3f}, total;dur={total * 1000:.3f}"
    ).encode()
