"""Several workers behind one port: real processes under uvicorn's supervisor."""

import os
import re
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import httpx
import numpy as np
import pytest

from tests.chaos.slow_service import MODULE, VARIABLE
from tests.end_to_end.process import SECONDS, Process, make_slow_model, on_model, started
from tests.fakes import HEIGHT, WIDTH, make_model_folder, tiny_images, tiny_logits
from tests.imaging.files import encode

IMAGE = {"content-type": "image/png"}
WORKERS = 2


def free_ports(count: int) -> int:
    """The first of so many ports in a row that are free now."""
    for first in range(20_000 + os.getpid() % 5000, 60_000, count):
        with ExitStack() as stack, suppress(OSError):
            for offset in range(count):
                stack.enter_context(socket.create_server(("127.0.0.1", first + offset)))
            return first
    raise OSError("no free ports")


class Workers:
    """A service of two workers: their clients, and what each counts."""

    def __init__(self, process: Process, url: str, management: int) -> None:
        self.process, self.url, self.management = process, url, management

    @property
    def pids(self) -> list[int]:
        """The workers that run; uvicorn's supervisor also has multiprocessing's resource tracker for a child."""
        return [pid for pid in self.process.children() if b"spawn_main" in command_line(pid)]

    def ports(self) -> list[int]:
        return [self.management + number for number in range(WORKERS)]

    def metric(self, port: int, name: str) -> float:
        try:
            lines = httpx.get(f"http://127.0.0.1:{port}/metrics", timeout=SECONDS).text.splitlines()
        except httpx.TransportError:  # between the end of a worker and the start of the next
            return -1
        return next((float(line.rpartition(" ")[2]) for line in lines if line.startswith(f"{name} ")), 0.0)

    def all_ready(self) -> bool:
        return all(self.metric(port, "perceiver_ready") == 1 for port in self.ports())


def command_line(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except FileNotFoundError:
        return b""


@contextmanager
def workers(folder: Path, *arguments: str, module: str = "service", **variables: str) -> Iterator[Workers]:
    """Start two; they are ready, and gone at the end."""
    management = free_ports(WORKERS)
    settings = (f"--workers={WORKERS}", f"--management-port={management}", *arguments)
    with started(folder, *on_model(folder / "m", *settings), module=module, **variables) as process:
        service = Workers(process, process.url(), management)
        process.wait(service.all_ready)
        pids = service.pids
        assert len(pids) == WORKERS
        try:
            yield service
        finally:
            for pid in {*pids, *service.pids} if process.popen.poll() is None else pids:
                if b"spawn_main" in command_line(pid):
                    os.kill(pid, signal.SIGKILL)


class Load:
    """Clients that post images until they are told to stop; every answer is compared with the model's."""

    def __init__(self, url: str, versions: tuple[int, ...] = (1,), clients: int = 8) -> None:
        self.url = url
        self.images = tiny_images(20, seed=3)
        self.files = [encode(image, "PNG") for image in self.images]
        self.expected = {version: tiny_logits(self.images, version).argmax(axis=1) for version in versions}
        self.answers: Counter[object] = Counter()
        self._stop = threading.Event()
        self._pool = ThreadPoolExecutor(clients)
        self._running = [self._pool.submit(self._ask, index) for index in range(clients)]

    def __enter__(self) -> "Load":
        return self

    def __exit__(self, *exception: object) -> None:
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
                        response = client.post("/predict", content=self.files[index], headers=IMAGE)
                        if response.status_code != 200:
                            self.answers[response.json()["error"]["code"]] += 1
                            continue
                        answer = response.json()
                        label = answer["predictions"][0]["top"][0]["index"]
                        is_right = label == self.expected[answer["version"]][index]
                        self.answers["right" if is_right else "wrong", answer["version"]] += 1
                except httpx.ConnectError:
                    if not self._stop.is_set():
                        self.answers["refused"] += 1
                        time.sleep(0.01)
                except httpx.TransportError:
                    self.answers["lost"] += 1


def test_one_that_is_killed_loses_what_it_held_and_is_replaced(tmp_path: Path) -> None:
    make_model_folder(tmp_path / "m")
    with workers(tmp_path) as service, Load(service.url) as load:
        service.process.wait(lambda: load.answers["right", 1] > 200)
        before = service.pids
        os.kill(before[0], signal.SIGKILL)
        service.process.wait(lambda: len(service.pids) == WORKERS and set(service.pids) != set(before))
        service.process.wait(service.all_ready)
        answered = load.answers["right", 1]
        service.process.wait(lambda: load.answers["right", 1] > answered + 200)
        assert before[1] in service.pids  # the other went on
    assert load.answers["lost"] <= 8  # one a client at most
    # A worker that is starting takes connections, and says that it is not ready.
    assert set(load.answers) <= {("right", 1), "lost", "not_ready"}


def test_a_drain_answers_all_that_was_accepted(tmp_path: Path) -> None:
    make_model_folder(tmp_path / "m")
    slow = {VARIABLE: "200"}
    with workers(tmp_path, "--max-batch-size=4", module=MODULE, **slow) as service:
        png = encode(tiny_images(1)[0], "PNG")
        with ThreadPoolExecutor(24) as pool:
            posted = [pool.submit(httpx.post, f"{service.url}/predict", content=png, headers=IMAGE) for _ in range(24)]
            admitted = "perceiver_admitted_images"
            service.process.wait(lambda: sum(service.metric(port, admitted) for port in service.ports()) > 12)
            service.process.signal()
            statuses = Counter(answer.result().status_code for answer in posted)
        assert service.process.exit_status() == 0
        assert statuses[200] >= 12
        assert set(statuses) <= {200, 503}
    assert "Traceback" not in service.process.stderr


def test_each_takes_a_new_version_under_load(tmp_path: Path) -> None:
    make_model_folder(tmp_path / "m")
    with workers(tmp_path, "--model-poll-s=0.1") as service, Load(service.url, (1, 2)) as load:
        service.process.wait(lambda: load.answers["right", 1] > 100)
        make_model_folder(tmp_path / "m", 2)
        live = 'perceiver_model_info{name="tiny",precision="float32",provider="cpu",version="2"}'
        service.process.wait(lambda: all(service.metric(port, live) == 1 for port in service.ports()))
        before = load.answers["right", 2]
        service.process.wait(lambda: load.answers["right", 2] > before + 100)
        old = load.answers["right", 1]
        service.process.wait(lambda: load.answers["right", 2] > before + 200)
        assert load.answers["right", 1] == old
    assert set(load.answers) == {("right", 1), ("right", 2)}


def test_metrics_are_those_of_each_worker_and_clients_do_not_see_them(tmp_path: Path) -> None:
    make_model_folder(tmp_path / "m")
    with workers(tmp_path) as service:
        png = encode(tiny_images(1)[0], "PNG")
        for _ in range(20):
            assert httpx.post(f"{service.url}/predict", content=png, headers=IMAGE).status_code == 200
        counts = [service.metric(port, "perceiver_images_total") for port in service.ports()]
        assert sum(counts) == 20
        for path in ("/metrics", "/health", "/health/live", "/health/ready", "/models"):
            assert httpx.get(f"{service.url}{path}").status_code == 404
            for port in service.ports():
                assert httpx.get(f"http://127.0.0.1:{port}{path}").status_code == 200
        for port in service.ports():
            gone = httpx.post(f"http://127.0.0.1:{port}/predict", content=png, headers=IMAGE)
            assert (gone.status_code, gone.json()["error"]["code"]) == (404, "not_found")


def test_workers_without_a_management_port_say_why_they_have_no_metrics(tmp_path: Path) -> None:
    make_model_folder(tmp_path / "m")
    arguments = on_model(tmp_path / "m", f"--workers={WORKERS}")
    with started(tmp_path, *arguments) as process, process.ready() as client:
        answer = client.get("/metrics")
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found")
        assert "management_port" in answer.json()["error"]["message"]
        assert "set management_port" in process.stderr
        process.signal()
        assert process.exit_status() == 0


def test_a_model_that_can_not_be_loaded_ends_the_service(tmp_path: Path) -> None:
    make_model_folder(tmp_path / "m", defect="corrupt_onnx")
    with started(tmp_path, *on_model(tmp_path / "m", f"--workers={WORKERS}")) as process:
        assert process.exit_status() == 1
        assert "version 1: " in process.stderr


def test_one_whose_engine_hangs_is_replaced(tmp_path: Path) -> None:
    make_slow_model(tmp_path / "m", steps=10**9)
    with workers(tmp_path, "--run-timeout-ms=300") as service:
        before = service.pids
        slow = encode(np.full((HEIGHT, WIDTH, 3), 255, np.uint8), "PNG")
        failed = httpx.post(f"{service.url}/predict", content=slow, headers=IMAGE, timeout=SECONDS)
        assert failed.json()["error"]["code"] == "inference_failed"
        service.process.wait(lambda: len(service.pids) == WORKERS and set(service.pids) != set(before))
        service.process.wait(service.all_ready)


@pytest.mark.parametrize(("signals", "status"), [((signal.SIGINT,), 0), ((signal.SIGINT, signal.SIGINT), 130)])
def test_ctrl_c_reaches_all_and_a_second_one_does_not_wait(
    tmp_path: Path, signals: tuple[int, ...], status: int
) -> None:
    make_model_folder(tmp_path / "m")
    with workers(tmp_path, "--drain-timeout-s=600", module=MODULE, **{VARIABLE: "3000"}) as service:
        png = encode(tiny_images(1)[0], "PNG")
        with ThreadPoolExecutor(8) as pool:
            if len(signals) > 1:
                for _ in range(8):  # so that every worker holds one
                    pool.submit(httpx.post, f"{service.url}/predict", content=png, headers=IMAGE, timeout=SECONDS)
                held = "perceiver_admitted_images"
                service.process.wait(lambda: sum(service.metric(port, held) for port in service.ports()) == 8)
            for number, one in enumerate(signals):
                service.process.signal_group(one)
                service.process.wait_or_end(
                    lambda want=number + 1: len(re.findall("draining: ", service.process.stderr)) >= min(want, 1)
                )
            assert service.process.exit_status() == status


def test_they_drain_when_their_supervisor_was_killed_and_leave_the_port_to_the_next(tmp_path: Path) -> None:
    make_model_folder(tmp_path / "m")
    with workers(tmp_path) as service:
        pids = service.pids
        service.process.popen.kill()
        service.process.exit_status()
        until = time.monotonic() + SECONDS
        while any(command_line(pid) for pid in pids):
            assert time.monotonic() < until
            time.sleep(0.02)
        port = httpx.URL(service.url).port
        with socket.create_server(("127.0.0.1", port or 0)):
            pass
    assert service.process.stderr.count("the supervisor of this worker has ended") == WORKERS
