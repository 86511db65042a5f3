"""What the batcher promises, on a real process whose device takes 400 ms for every run of up to four images.

Order comes from counts and from who is answered first, never from a clock.
"""

import socket
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy as np
import pytest

from tests.chaos.slow_service import MODULE, POISON, VARIABLE
from tests.end_to_end.process import Process, on_model, started
from tests.fakes import HEIGHT, WIDTH, make_model_folder, tiny_images, tiny_logits
from tests.imaging.files import encode, pixels
from tests.service.harness import request_head

BATCH = 4
PNG = encode(pixels(HEIGHT, WIDTH), "PNG")


class Busy:
    """A service with a slow device, its clients, and what it counts."""

    def __init__(self, process: Process, client: httpx.Client, pool: ThreadPoolExecutor) -> None:
        self.process, self.client, self.pool = process, client, pool
        self.stopped = False

    def stop(self) -> None:
        """Send SIGTERM, once: a second one does not wait."""
        if not self.stopped:
            self.stopped = True
            self.process.signal()

    def post(self, content: bytes = PNG, **headers: str) -> "Future[httpx.Response]":
        headers = {"content-type": "image/png"} | headers
        return self.pool.submit(self.client.post, "/predict", content=content, headers=headers)

    def form(self, images: list[np.ndarray]) -> "Future[httpx.Response]":
        files = [("file", (f"{number}.png", encode(image, "PNG"))) for number, image in enumerate(images)]
        return self.pool.submit(self.client.post, "/predict", files=files)

    def leaves(self) -> socket.socket:
        """A client that has sent an image; it leaves when it is closed."""
        connection = socket.create_connection((self.client.base_url.host, self.client.base_url.port))
        connection.sendall(request_head(len(PNG)) + PNG)
        return connection

    def metric(self, name: str) -> float:
        lines = self.client.get("/metrics").text.splitlines()
        return next((float(line.rpartition(" ")[2]) for line in lines if line.startswith(f"{name} ")), 0.0)

    def until(self, name: str, value: float) -> None:
        self.process.wait(lambda: self.metric(name) == value)

    def occupied(self) -> "Future[httpx.Response]":
        """Occupy the device: an image that has left the queue and is not answered."""
        first = self.post()
        self.process.wait(
            lambda: self.metric("perceiver_admitted_images") == 1 and not self.metric("perceiver_queue_length")
        )
        return first


@pytest.fixture
def busy(tmp_path: Path) -> Iterator[Busy]:
    with busy_service(tmp_path, "400") as service:
        yield service


@contextmanager
def busy_service(folder: Path, run_ms: str, *arguments: str) -> Iterator[Busy]:
    """Start it; at the end it stops cleanly."""
    if not (folder / "m").exists():
        make_model_folder(folder / "m")
    arguments = on_model(folder / "m", f"--max-batch-size={BATCH}", *arguments)
    with (
        started(folder, *arguments, module=MODULE, **{VARIABLE: run_ms}) as process,
        process.ready() as client,
        ThreadPoolExecutor(24) as pool,
    ):
        service = Busy(process, client, pool)
        yield service
        service.stop()
        assert process.exit_status() == 0


def test_late_arrivals_join_the_batch_that_forms_while_one_runs(busy: Busy) -> None:
    first = busy.occupied()
    late = [busy.post() for _ in range(BATCH)]
    assert {answer.result().status_code for answer in [first, *late]} == {200}
    # The golden images are not counted; the four came one by one, and ran together, or in two batches at most if the
    # machine held one of them up for a whole run.
    assert busy.metric("perceiver_batch_size_sum") == 1 + BATCH
    assert busy.metric("perceiver_batch_size_count") <= 3


def test_what_is_cancelled_while_queued_never_runs_and_while_running_harms_nobody(busy: Busy) -> None:
    with busy.leaves():
        busy.process.wait(
            lambda: busy.metric("perceiver_admitted_images") == 1 and not busy.metric("perceiver_queue_length")
        )
        with busy.leaves():
            busy.until("perceiver_queue_length", 1)
    stays = busy.post()
    assert stays.result().status_code == 200
    busy.until('perceiver_requests_total{code="499",route="/predict"}', 2)
    assert busy.metric("perceiver_cancellations_total") == 1
    assert busy.metric("perceiver_images_total") == 2  # the one that ran when its client left, and the one that stayed


def test_what_expires_in_the_queue_never_runs(tmp_path: Path) -> None:
    # The golden images ran four at once, so one image is expected to wait a quarter of a run: it is admitted.
    with busy_service(tmp_path, "2000") as busy:
        first = busy.occupied()
        late = busy.post(**{"x-request-timeout-ms": "1000"})
        assert (late.result().status_code, first.result().status_code) == (504, 200)
        assert busy.metric("perceiver_deadline_misses_total") == 1
        assert busy.metric("perceiver_images_total") == 1


def test_what_could_not_run_before_its_deadline_is_refused_at_once(busy: Busy) -> None:
    first = busy.occupied()
    late = busy.post(**{"x-request-timeout-ms": "1"})
    assert (late.result().status_code, first.result().status_code) == (503, 200)
    assert busy.metric("perceiver_deadline_misses_total") == 0
    assert busy.metric("perceiver_images_total") == 1


def test_a_batch_that_raises_fails_its_members_alone(busy: Busy) -> None:
    first = busy.occupied()
    bad = busy.form([POISON])
    busy.until("perceiver_queue_length", 1)
    assert first.result().status_code == 200
    busy.until("perceiver_queue_length", 0)  # it runs, and what comes now is in the next batch
    good = busy.post()
    assert (bad.result().status_code, bad.result().json()["error"]["code"]) == (500, "inference_failed")
    assert good.result().status_code == 200
    assert busy.metric("perceiver_failed_batches_total") == 1
    assert busy.client.get("/health/ready").status_code == 200
    assert "the device says no" in busy.process.stderr


def test_a_large_request_keeps_its_order_and_does_not_hold_up_a_small_one(busy: Busy) -> None:
    images = tiny_images(24)
    large = busy.form(list(images))
    busy.process.wait(lambda: busy.metric("perceiver_queue_length") > BATCH)
    single = busy.post()
    assert single.result().status_code == 200
    assert not large.done()  # four batches of it are still to come
    answer = large.result().json()["predictions"]
    assert [entry["filename"] for entry in answer] == [f"{number}.png" for number in range(24)]
    assert [entry["top"][0]["index"] for entry in answer] == tiny_logits(images, 1).argmax(axis=1).tolist()


def test_a_drain_answers_everything_that_was_accepted(busy: Busy) -> None:
    first = busy.occupied()
    queued = [busy.post() for _ in range(3 * BATCH)]
    busy.until("perceiver_admitted_images", 1 + 3 * BATCH)
    busy.stop()
    assert [answer.result().status_code for answer in [first, *queued]] == [200] * (1 + 3 * BATCH)


def test_fifty_swaps_under_load_fail_no_request_and_mix_no_answers(tmp_path: Path) -> None:
    make_model_folder(tmp_path / "m", 1)
    hidden, shown = tmp_path / "m" / ".2", tmp_path / "m" / "2"
    make_model_folder(tmp_path / "m", 2).rename(hidden)
    images = tiny_images(50, seed=7)
    files = [encode(image, "PNG") for image in images]
    expected = {version: tiny_logits(images, version) for version in (1, 2)}
    stop = threading.Event()
    with busy_service(tmp_path, "1", "--admin-key=root", "--max-queue-size=64") as busy:

        def client(index: int) -> dict[int, int]:
            answers = {1: 0, 2: 0}
            while not stop.is_set():
                index = (index + 1) % len(files)
                response = busy.client.post("/predict", content=files[index], headers={"content-type": "image/png"})
                assert response.status_code == 200, response.text
                version, top = response.json()["version"], response.json()["predictions"][0]["top"]
                logits = expected[version][index].astype(np.float64)
                probabilities = np.exp(logits) / np.exp(logits).sum()
                assert {entry["index"]: entry["probability"] for entry in top} == pytest.approx(
                    dict(enumerate(probabilities)), abs=1e-5
                )
                answers[version] += 1
            return answers

        clients = [busy.pool.submit(client, index) for index in range(8)]
        try:
            for swap in range(50):
                hidden.rename(shown) if swap % 2 == 0 else shown.rename(hidden)
                reloaded = busy.client.post("/models/reload", headers={"x-api-key": "root"})
                assert (reloaded.status_code, reloaded.json()["live"]) == (200, 2 - swap % 2)
        finally:
            stop.set()
        answers = [running.result() for running in clients]
        assert min(sum(answer[version] for answer in answers) for version in (1, 2)) >= 25
