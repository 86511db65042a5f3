"""The job on LitServe: uvicorn and FastAPI processes, which hand requests over queues to processes that run batches."""

from typing import Annotated

import litserve
import numpy as np
from fastapi import Body, Response
from numpy.typing import NDArray

from benchmarks.rivals.job import decode, open_classifier, port, setting


class Classify(litserve.LitAPI):
    """Body to pixels, a batch of pixels to class indices, index to answer."""

    def setup(self, device: str) -> None:
        """Load the model, in the process that runs it."""
        self._classifier = open_classifier()

    def decode_request(self, request: Annotated[bytes, Body(media_type="image/jpeg")]) -> NDArray[np.uint8]:
        """Decode one body; the annotation lets FastAPI hand over the raw bytes."""
        return decode(request)

    def batch(self, inputs: list[NDArray[np.uint8]]) -> list[NDArray[np.uint8]]:
        """Leave stacking to the classifier."""
        return list(inputs)

    def predict(self, x: list[NDArray[np.uint8]] | NDArray[np.uint8]) -> list[int] | int:
        """Classify a batch; with batches of up to one LitServe hands over the image itself."""
        return self._classifier.top(x) if isinstance(x, list) else self._classifier.top([x])[0]

    def unbatch(self, output: list[int]) -> list[int]:
        """One index an answer."""
        return output

    def encode_response(self, output: int) -> Response:
        """Write one answer; a Response is not encoded once more by FastAPI."""
        return Response(self._classifier.answers[output], media_type="application/json")


if __name__ == "__main__":
    api = Classify(max_batch_size=setting("batch"), batch_timeout=setting("wait_ms") / 1e3)
    # No fast_queue: this version ignores it (LitServe's issue 751).
    server = litserve.LitServer(api, accelerator="cpu", devices=1, workers_per_device=setting("workers"))
    server.run(
        host="127.0.0.1",
        port=port(),
        num_api_servers=setting("api_servers"),
        log_level="warning",
        access_log=False,
        generate_client_file=False,
    )
