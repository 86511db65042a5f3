"""The job on BentoML: uvicorn processes with Starlette, each of which batches for itself and runs batches in a thread.

A batchable API takes a list, so the image comes as base64 in a JSON list of one: a raw body can't be batched, and a
multipart form took longer.
"""

import base64

import bentoml

from benchmarks.rivals.job import decode, open_classifier, setting

BATCHING = {"batchable": True, "max_batch_size": setting("batch"), "max_latency_ms": setting("max_latency_ms")}
if setting("batch") == 1:  # BentoML refuses to batch by one
    BATCHING = {}


@bentoml.service(workers=setting("workers"), traffic={"timeout": 30}, logging={"access": {"enabled": False}})
class Classify:
    """One API, /classify."""

    def __init__(self) -> None:
        self._classifier = open_classifier()

    @bentoml.api(**BATCHING)
    def classify(self, images: list[str]) -> list[str]:
        """Classify a batch: base64 to labels."""
        images = [decode(base64.b64decode(image)) for image in images]
        return [self._classifier.labels[index] for index in self._classifier.top(images)]
