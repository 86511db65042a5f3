"""Several workers behind one port: real processes under uvicorn's supervisor."""

import os
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import numpy as np
import pytest

from tests.end_to_end.hanging_service import MODULE
from tests.end_to_end.load import IMAGE, Load
from tests.end_to_end.process import SECONDS, Process, make_slow_model, on_model, started
from tests.fakes import HEIGHT, WIDTH, make_model_folder, tiny_images
from tests.imaging.files import encode
from tests.service.harness import free_ports, request_head

WORKERS = 2
# What is half sent stays admitted for as long as a test takes.
PATIENT = ("--body-timeout-s=600", "--drain-timeout-s=600")


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
        process.wait(lambda: all(f"Ready: {service.url}, worker {pid}" in process.stderr for pid in pids))
        assert len(pids) == WORKERS
        try:
            yield service
        finally:
            for pid in {*pids, *service.pids} if process.popen.poll() is None else pids:
                if b"spawn_main" in command_line(pid):
                    os.kill(pid, signal.SIGKILL)


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
    assert set(load.answers) <= {("right", 1), "lost"}  # one that is starting leaves clients to the other


def test_one_whose_event_loop_hangs_is_replaced(tmp_path: Path) -> None:
    make_model_folder(tmp_path / "m")
    with workers(tmp_path, module=MODULE) as service:
        before = service.pids
        os.kill(before[0], signal.SIGUSR1)
        service.process.wait(lambda: len(service.pids) == WORKERS and before[0] not in service.pids)
        assert before[1] in service.pids
        service.process.wait(service.all_ready)


def test_others_are_stopped_at_once_while_the_event_loop_of_one_hangs(tmp_path: Path) -> None:
    make_model_folder(tmp_path / "m")
    with workers(tmp_path) as service:
        os.kill(service.pids[0], signal.SIGSTOP)
        time.sleep(3)  # so that a health check is not answered
        service.process.signal()
        service.process.wait(lambda: "draining: " in service.process.stderr)
        service.process.wait(lambda: len(service.pids) == 1)  # and 30 s have not passed


def half_sent(service: Workers, count: int) -> tuple[list[socket.socket], bytes]:
    """Connections whose requests are admitted and wait for the rest of their bodies, which is returned as well."""
    png = encode(tiny_images(1)[0], "PNG")
    address = httpx.URL(service.url)
    sockets = [socket.create_connection((address.host, address.port), timeout=SECONDS) for _ in range(count)]
    for one in sockets:
        one.sendall(request_head(len(png)) + png[:30])
    held = "perceiver_admitted_bytes"
    service.process.wait(lambda: sum(service.metric(port, held) for port in service.ports()) == 30 * count)
    return sockets, png[30:]


def test_a_drain_answers_all_that_was_accepted(tmp_path: Path) -> None:
    make_model_folder(tmp_path / "m")
    with workers(tmp_path, *PATIENT) as service:
        sockets, rest = half_sent(service, 24)
        service.process.signal()
        service.process.wait(lambda: service.process.stderr.count("draining: ") == WORKERS)
        for one in sockets:
            one.sendall(rest)
        for one in sockets:
            with one:
                assert one.recv(100).startswith(b"HTTP/1.1 200")
        assert service.process.exit_status() == 0
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
        load.stop()
        answered = load.answers.copy()
        with Load(service.url, (1, 2)) as after:
            service.process.wait(lambda: after.answers.total() > 100)
    assert set(answered) == {("right", 1), ("right", 2)}
    assert set(after.answers) == {("right", 2)}


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
    with workers(tmp_path, "--run-timeout-ms=5000") as service:
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
    with workers(tmp_path, *PATIENT) as service, ExitStack() as stack:
        if len(signals) > 1:
            for one in half_sent(service, 8)[0]:
                stack.enter_context(one)
        for number in signals:
            service.process.signal_group(number)
            service.process.wait_or_end(lambda: service.process.stderr.count("draining: ") == WORKERS)
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
