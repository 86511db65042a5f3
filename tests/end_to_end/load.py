"""Clients that post images under way while a process is killed, drained or reloaded."""

import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np

from tests.end_to_end.process import SECONDS
from tests.fakes import tiny_images, tiny_logits
from tests.imaging.files import encode

IMAGE = {"content-type": "image/png"}


class Load:
    """Clients that post images until they are told to stop; every answer is compared with the model's.

    Attributes:
        answers: how often each came: ("right", version), ("wrong", version), "lost" where a connection ended without
            one, "refused" where there was no connection, and codes of errors.
    """

    def __init__(self, url: str, versions: tuple[int, ...] = (1,), clients: int = 8) -> None:
        self.url = url
        images = tiny_images(20, seed=3)
        self.files = [encode(image, "PNG") for image in images]
        logits = {version: tiny_logits(images, version).astype(np.float64) for version in versions}
        exponentials = {version: np.exp(values) for version, values in logits.items()}
        self.expected = {version: values / values.sum(axis=1)[:, None] for version, values in exponentials.items()}
        self.answers: Counter[object] = Counter()
        self._stop = threading.Event()
        self._pool = ThreadPoolExecutor(clients)
        self._running = [self._pool.submit(self._ask, index) for index in range(clients)]

    def __enter__(self) -> "Load":
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Return when every client has its last answer."""
        self._stop.set()
        for running in self._running:
            running.result()
        self._pool.shutdown()

    def _ask(self, index: int) -> None:
        while not self._stop.is_set():
            with httpx.Client(base_url=self.url, timeout=SECONDS) as client:
                try:
                    while not self._stop.is_set():
                        index = (index + 1) % len(self.files)
                        self.answers[self._post(client, index)] += 1
                except httpx.ConnectError:
                    if not self._stop.is_set():
                        self.answers["refused"] += 1
                        time.sleep(0.01)
                except httpx.TransportError:
                    self.answers["lost"] += 1

    def _post(self, client: httpx.Client, index: int) -> object:
        response = client.post("/predict", content=self.files[index], headers=IMAGE)
        answer = response.json()
        if response.status_code != 200:
            return answer["error"]["code"]
        top = answer["predictions"][0]["top"]
        expected = self.expected[answer["version"]][index]
        is_right = top[0]["index"] == expected.argmax() and all(
            abs(entry["probability"] - expected[entry["index"]]) < 1e-5 for entry in top
        )
        return "right" if is_right else "wrong", answer["version"]
