import os
import socket
import sys
import time
from pathlib import Path

import pytest

from benchmarks.common import BenchmarkError, ModelPlace
from benchmarks.server import Server, cpu_seconds, environment, free_port, parse_settings, rss_bytes, worker_count
from service.engine.cpus import usable_cores

MODEL = ModelPlace(Path("/models/m"), 3, Path("/models/m/3"))
# Ready at once.
READY_SERVER = """
import http.server, os
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/health/ready" else 404)
        self.end_headers()
http.server.HTTPServer((os.environ["PERCEIVER_HOST"], int(os.environ["PERCEIVER_PORT"])), Handler).serve_forever()
"""
linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def test_the_callers_own_settings_are_not_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PERCEIVER_MAX_BATCH_SIZE", "1")
    monkeypatch.setenv("perceiver_provider", "cuda")
    monkeypatch.setenv("OTHER", "kept")
    found = environment(MODEL, 99, {"max_queue_size": "7", "host": "::1"})
    assert {name: value for name, value in found.items() if name.upper().startswith("PERCEIVER_")} == {
        "PERCEIVER_MODEL_DIR": "/models/m",
        "PERCEIVER_MODEL_VERSION": "3",
        "PERCEIVER_HOST": "::1",
        "PERCEIVER_PORT": "99",
        "PERCEIVER_MAX_QUEUE_SIZE": "7",
    }
    assert found["OTHER"] == "kept"


def test_settings_are_read() -> None:
    assert parse_settings(["a=1", "b=x=y", "c="]) == {"a": "1", "b": "x=y", "c": ""}
    with pytest.raises(BenchmarkError, match="must have the form name=value"):
        parse_settings(["max_batch_size"])


def test_workers_are_counted_as_the_service_does_on_a_cpu() -> None:
    assert worker_count({}) == 1
    assert worker_count({"workers": "3"}) == 3
    assert worker_count({"workers": "auto", "provider": "cpu"}) == usable_cores()
    assert worker_count({"workers": "auto"}) == 1
    assert worker_count({"workers": "many"}) == 1


def test_a_server_is_waited_for_and_stopped() -> None:
    with Server(MODEL, command=("-c", READY_SERVER)) as server:
        assert server.seconds_to_ready > 0
        with socket.create_connection(("127.0.0.1", server.port), timeout=5):
            pid = server.pid
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_server_is_stopped_when_the_measurement_fails() -> None:
    server = Server(MODEL, command=("-c", READY_SERVER))
    with pytest.raises(RuntimeError, match="measurement"), server:
        raise RuntimeError("measurement")
    with pytest.raises(ProcessLookupError):
        os.kill(server.pid, 0)


def test_a_server_that_ends_is_reported_with_its_log() -> None:
    with pytest.raises(BenchmarkError, match=r"ended with status 3(.|\n)*no such model"):
        Server(MODEL, command=("-c", "print('no such model'); raise SystemExit(3)")).__enter__()


def test_a_server_that_never_gets_ready_is_stopped() -> None:
    server = Server(MODEL, command=("-c", "import time; time.sleep(600)"), ready_timeout_s=0.1)
    with pytest.raises(BenchmarkError, match=r"not ready in 0\.1 s"):
        server.__enter__()
    with pytest.raises(ProcessLookupError):
        os.kill(server.pid, 0)


def test_a_free_port_is_free() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", free_port()))


@linux
def test_cpu_time_and_memory_of_a_process() -> None:
    before = cpu_seconds(os.getpid())
    assert before is not None
    start = time.process_time()
    while time.process_time() - start < 0.1:
        pass
    after = cpu_seconds(os.getpid())
    assert after is not None
    assert after - before >= 0.08  # counted in steps of 10 ms
    rss = rss_bytes(os.getpid())
    assert rss is not None
    assert rss > 2**20


def test_a_process_that_is_gone_has_neither() -> None:
    with Server(MODEL, command=("-c", READY_SERVER)) as server:
        pid = server.pid
    assert cpu_seconds(pid) is None
    assert rss_bytes(pid) is None
