"""Signals that reach HTTP processes: their end is the affair of the process that runs the model."""

import os
import signal
import time
from pathlib import Path

import pytest

from tests.end_to_end.process import on_model, started
from tests.fakes import make_model_folder
from tests.service.harness import png

pytestmark = pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="looks at processes in Linux's /proc")
SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


def is_importing(pid: int, library: str = "pydantic_core") -> bool:
    process = Path(f"/proc/{pid}")
    # Before that it is a copy of the one that starts it, with all that this has imported.
    is_itself = b"service.front_main" in (process / "cmdline").read_bytes()
    return is_itself and library in (process / "maps").read_text()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("when", ["begun", "importing"])
def test_a_signal_to_the_whole_group_while_http_processes_start(tmp_path: Path, number: int, when: str) -> None:
    make_model_folder(tmp_path / "m")
    with started(tmp_path, *on_model(tmp_path / "m", "--http-processes", "2")) as process:
        process.wait(process.children)
        if when == "importing":
            process.wait(lambda: is_importing(process.children()[0]))
        process.signal_group(number)
        assert process.exit_status() == 0
        assert "Traceback" not in process.stderr
        assert "is started anew" not in process.stderr


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_to_an_http_process_that_is_starting(tmp_path: Path, number: int) -> None:
    make_model_folder(tmp_path / "m")
    with started(tmp_path, *on_model(tmp_path / "m", "--http-processes", "1")) as process:
        (child,) = process.wait(process.children)
        process.wait(lambda: is_importing(child))
        os.kill(child, number)
        with process.ready() as client:
            assert "perceiver_http_process_restarts_total 0.0" in client.get("/metrics").text
            assert process.children() == [child]
        assert "Traceback" not in process.stderr


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_to_an_http_process_that_serves(tmp_path: Path, number: int) -> None:
    make_model_folder(tmp_path / "m")
    with (
        started(tmp_path, *on_model(tmp_path / "m", "--http-processes", "1")) as process,
        process.ready() as client,
    ):
        (child,) = process.children()
        os.kill(child, number)
        until = time.monotonic() + 0.5  # uvicorn looks every 0.1 s whether it should end
        while time.monotonic() < until:
            answer = client.post("/predict", content=png(1))
            assert (answer.status_code, answer.headers.get("connection")) == (200, None)
        assert process.children() == [child]


def test_http_processes_are_not_of_the_group_that_a_terminal_signals(tmp_path: Path) -> None:
    make_model_folder(tmp_path / "m")
    with started(tmp_path, *on_model(tmp_path / "m", "--http-processes", "1")) as process:
        (child,) = process.wait(process.children)
        process.wait(lambda: is_importing(child))
        assert os.getpgid(child) == child
