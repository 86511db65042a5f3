"""HTTP processes beside a process that runs the model and has stopped, as in a debugger, or was killed."""

import os
import signal
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx

from tests.end_to_end.process import Process, on_model, started
from tests.fakes import make_model_folder
from tests.service.harness import png

SHORT = {"content-type": "image/png", "x-request-timeout-ms": "100"}


@contextmanager
def stopped(process: Process) -> Iterator[None]:
    """Stop the process that runs the model, and it alone."""
    process.signal(signal.SIGSTOP)
    try:
        yield
    finally:
        process.signal(signal.SIGCONT)


def test_deadlines_hold_while_the_model_s_process_has_stopped(tmp_path: Path) -> None:
    make_model_folder(tmp_path / "m")
    arguments = on_model(tmp_path / "m", "--http-processes", "2")
    with started(tmp_path, *arguments) as process, process.ready() as client:
        assert client.post("/predict", content=png(1), headers=SHORT).status_code == 200
        with stopped(process):
            bodies = [png(2), iter([png(3)])]  # the short way and the long way
            late = [client.post("/predict", content=body, headers=SHORT, timeout=20) for body in bodies]
        assert [(one.status_code, one.json()["error"]["code"]) for one in late] == [(504, "deadline_exceeded")] * 2
        assert client.post("/predict", content=png(4)).status_code == 200
        exposition = client.get("/metrics").text
        assert "perceiver_deadline_misses_total 2.0" in exposition
        assert "perceiver_cancellations_total 0.0" in exposition
        assert "perceiver_pictures_total 2.0" in exposition
        assert "perceiver_admitted_pictures 0.0" in exposition


def test_probes_and_scrapes_are_told_that_the_model_s_process_has_stopped(tmp_path: Path) -> None:
    paths = ["/health", "/health/live", "/health/ready", "/metrics", "/models"]
    make_model_folder(tmp_path / "m")
    with started(tmp_path, *on_model(tmp_path / "m", "--http-processes", "1")) as process, process.ready() as client:
        with stopped(process), ThreadPoolExecutor(len(paths)) as pool:
            told = list(pool.map(lambda path: client.get(path, timeout=30), paths))
            told.append(client.get("/health", timeout=30))  # one that comes later need not wait at all
        for answer in told:
            error = answer.json()["error"]
            assert (answer.status_code, error["code"]) == (503, "not_ready")
            assert error["message"] == "The process that runs the model does not answer."
            assert int(answer.headers["retry-after"]) >= 1
        process.wait(lambda: {client.get(path).status_code for path in paths} == {200})


def test_pictures_do_not_pile_up_before_a_process_that_reads_none(tmp_path: Path) -> None:
    make_model_folder(tmp_path / "m")
    arguments = on_model(tmp_path / "m", "--max-queue-bytes", "2048", "--max-body-bytes", "2048")
    with started(tmp_path, *arguments, "--http-processes", "1") as process, process.ready() as client:
        with stopped(process), ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(post_until_refused, [str(client.base_url)] * 8))
        assert {answer.json()["error"]["code"] for answer in answers} == {"overloaded"}
        assert all(int(answer.headers["retry-after"]) >= 1 for answer in answers)
        process.wait(lambda: client.post("/predict", content=png(4)).status_code == 200)


def post_until_refused(url: str) -> httpx.Response:
    """Post one picture after the other, with no time to wait for it."""
    until = time.monotonic() + 60
    with httpx.Client(base_url=url, timeout=20) as client:
        while time.monotonic() < until:
            headers = SHORT | {"x-request-timeout-ms": "1"}
            answer = client.post("/predict", content=png(2), headers=headers)
            if answer.status_code != 504:
                return answer
    raise TimeoutError("all of 60 s was let in")


def has_ended(pid: int) -> bool:
    """Whether nothing of a process is left but its entry, which nobody may be there to take away."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_http_processes_end_when_the_model_s_process_was_killed_and_leave_the_port_to_the_next(tmp_path: Path) -> None:
    make_model_folder(tmp_path / "m")
    with started(tmp_path, *on_model(tmp_path / "m", "--http-processes", "2")) as process, process.ready() as client:
        address, children = (client.base_url.host, client.base_url.port), process.children()
        try:
            process.popen.kill()
            process.popen.wait()
            until = time.monotonic() + 20
            while not all(map(has_ended, children)):
                assert time.monotonic() < until
                time.sleep(0.02)
        finally:
            for child in children:
                with suppress(ProcessLookupError):
                    os.kill(child, signal.SIGKILL)
        with socket.socket() as next_one:
            next_one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            next_one.bind(address)
            next_one.listen()
        assert process.stderr.count("The process that runs the model has ended.") == 2
