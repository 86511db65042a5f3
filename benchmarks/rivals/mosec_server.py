"""The job on Mosec: a Rust HTTP server and batcher, which hands batches to Python processes over a Unix socket.

One stage decodes and classifies: with a model this small a second stage costs a further hop between processes.
"""

import numpy as np
from mosec import Server, Worker
from numpy.typing import NDArray

from benchmarks.rivals.job import decode, open_classifier, setting


class Classify(Worker):
    """Body to pixels, pixels to class index, index to JSON; Mosec calls them in this order for each batch."""

    def __init__(self) -> None:
        super().__init__()
        self._classifier = open_classifier()

    def deserialize(self, data: bytes) -> NDArray[np.uint8]:
        """Decode one body."""
        return decode(data)

    def forward(self, data: list[NDArray[np.uint8]] | NDArray[np.uint8]) -> list[int] | int:
        """Classify a batch; with batches of up to one Mosec hands over the image itself."""
        return self._classifier.top(data) if isinstance(data, list) else self._classifier.top([data])[0]

    def serialize(self, data: int) -> bytes:
        """Write one answer."""
        return self._classifier.answers[data]


if __name__ == "__main__":  # Mosec starts its processes with spawn, which imports this module again
    server = Server()
    server.append_worker(
        Classify, num=setting("workers"), max_batch_size=setting("batch"), max_wait_time=setting("wait_ms")
    )
    server.run()
