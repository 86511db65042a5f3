"""The service as it is started in production: a process, signals, exit statuses, real HTTP, a real engine."""

import json
import shutil
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import httpx
import numpy as np
import pytest

from tests.chaos.slow_service import MODULE, VARIABLE
from tests.end_to_end.process import ROOT, SECONDS, Process, make_slow_model, on_model, started
from tests.fakes import HEIGHT, WIDTH, make_model_folder, tiny_logits
from tests.imaging.files import encode, pixels
from tests.service.harness import free_ports, png, request_head

IMAGE = {"content-type": "image/png"}


def post(client: httpx.Client, number: int = 1, **headers: str) -> httpx.Response:
    return client.post("/predict", content=png(number), headers=IMAGE | headers)


@pytest.mark.smoke
def test_a_image_in_a_label_out(tmp_path: Path) -> None:
    make_model_folder(tmp_path / "m")
    image = pixels(HEIGHT, WIDTH)
    with started(tmp_path, *on_model(tmp_path / "m")) as process, process.ready() as client:
        response = client.post("/predict", files={"file": ("a.png", encode(image, "PNG"))})
        top = response.json()["predictions"][0]["top"]
        logits = tiny_logits(image[None], 1)[0].astype(np.float64)
        expected = np.exp(logits) / np.exp(logits).sum()
        assert [entry["index"] for entry in top] == np.argsort(-expected).tolist()
        assert [entry["probability"] for entry in top] == pytest.approx(np.sort(expected)[::-1], abs=1e-5)
        timing = dict(part.split(";dur=") for part in response.headers["server-timing"].split(", "))
        assert float(timing["inference"]) > 0
        assert "perceiver_ready 1.0" in client.get("/metrics").text
        process.signal()
        assert process.exit_status() == 0


def test_engines_of_a_cpu_answer_many_at_once_each_with_its_own(tmp_path: Path) -> None:
    make_model_folder(tmp_path / "m")
    engines = ("--intra-op-threads", "0", "--cpu-engines", "2")
    images = [pixels(HEIGHT, WIDTH, seed) for seed in range(64)]
    files = [("file", (f"{index}.png", encode(image, "PNG"))) for index, image in enumerate(images)]
    with started(tmp_path, *on_model(tmp_path / "m"), *engines) as process, process.ready() as client:
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda at: client.post("/predict", files=files[at : at + 8]), range(0, 64, 8)))
        labels = [one["top"][0]["index"] for answer in answers for one in answer.json()["predictions"]]
        assert labels == tiny_logits(np.stack(images), 1).argmax(axis=1).tolist()
        assert client.post("/predict", files=files[:1]).json()["predictions"][0]["top"][0]["index"] == labels[0]
        process.signal()
        assert process.exit_status() == 0


@pytest.mark.parametrize("form", ["plain", "json"])
def test_the_last_line_of_the_start_says_what_to_try(tmp_path: Path, form: str) -> None:
    make_model_folder(tmp_path / "m")
    arguments = ("--host", "0.0.0.0", "--log-format", form)
    with started(tmp_path, *on_model(tmp_path / "m", *arguments)) as process, process.ready() as client:
        process.wait(lambda: "Ready: " in process.stderr)
        *before, last = process.stderr.splitlines()
        assert not any(word in line.lower() for line in before for word in ("listening", "running", "ready:"))
        said = json.loads(last)["message"] if form == "json" else last.partition(" INFO     ")[2]
        ready, _, command = said.partition(" - try: ")
        url = f"http://127.0.0.1:{client.base_url.port}"
        assert ready == f"Ready: {url}"
        assert command == f"curl -F file=@docs/apple.png {url}/predict"
        curl = shutil.which("curl")
        if curl is not None:
            done = subprocess.run([curl, "-s", *command.split()[1:]], cwd=ROOT, capture_output=True, check=True)
            assert json.loads(done.stdout)["predictions"][0]["filename"] == "apple.png"


def test_a_command_that_would_be_refused_is_not_shown(tmp_path: Path) -> None:
    make_model_folder(tmp_path / "m")
    with started(tmp_path, *on_model(tmp_path / "m", "--api-keys", "k")) as process, process.ready() as client:
        process.wait(lambda: "Ready: " in process.stderr)
        assert process.stderr.endswith(f"Ready: http://127.0.0.1:{client.base_url.port}\n")


def test_clients_that_take_every_connection_keep_no_probe_out(tmp_path: Path) -> None:
    make_model_folder(tmp_path / "m")
    port = free_ports(1)
    settings = ("--max-connections=3", "--header-timeout-s=600", "--keep-alive-s=600", f"--management-port={port}")
    with started(tmp_path, *on_model(tmp_path / "m", *settings)) as process, ExitStack() as stack:
        clients = httpx.URL(process.url())

        def connect(port: int | None) -> socket.socket:
            """A connection that asks for nothing."""
            return stack.enter_context(socket.create_connection((clients.host, port), timeout=SECONDS))

        for _ in range(3):
            connect(clients.port)
        assert connect(clients.port).recv(1000).startswith(b"HTTP/1.1 503")
        for _ in range(2):
            connect(port)
        operator = stack.enter_context(httpx.Client(base_url=f"http://{clients.host}:{port}", timeout=SECONDS))
        process.wait(lambda: operator.get("/health/ready").status_code == 200)
        assert 'perceiver_rejections_total{reason="unavailable"} 1.0' in operator.get("/metrics").text
        assert connect(port).recv(1000).startswith(b"HTTP/1.1 503")  # it has a limit, too


def test_sigterm_finishes_what_was_accepted_while_probes_say_503(tmp_path: Path) -> None:
    make_model_folder(tmp_path / "m")
    with started(tmp_path, *on_model(tmp_path / "m")) as process, process.ready() as client:
        address = (client.base_url.host, client.base_url.port)
        with socket.create_connection(address) as half, socket.create_connection(address) as idle:
            half.settimeout(30)
            idle.settimeout(30)
            body = png(1)
            half.sendall(request_head(len(body)) + body[:30])
            process.wait(lambda: "perceiver_admitted_bytes 30.0" in client.get("/metrics").text)
            process.signal()
            process.wait(lambda: "draining: 1 requests" in process.stderr)
            assert client.get("/health/ready").status_code == 503
            refused = post(client)
            assert refused.status_code == 503
            assert refused.json()["error"]["code"] == "draining"
            assert client.get("/health/live").status_code == 200
            half.sendall(body[30:])
            assert half.recv(100).startswith(b"HTTP/1.1 200")
            assert idle.recv(1) == b""
        assert process.exit_status() == 0


def test_requests_are_accepted_until_the_balancer_has_noticed(tmp_path: Path) -> None:
    make_model_folder(tmp_path / "m")
    with started(tmp_path, *on_model(tmp_path / "m", "--drain-delay-s", "5")) as process, process.ready() as client:
        process.signal()
        process.wait(lambda: "leaving: probes are told, and requests are still accepted for 5 s" in process.stderr)
        assert client.get("/health/ready").json()["error"]["code"] == "draining"
        response = post(client)
        assert (response.status_code, response.headers["connection"]) == (200, "close")
        assert "draining: 0 requests" not in process.stderr
        assert process.exit_status() == 0
        assert "draining: 0 requests" in process.stderr


def test_a_second_signal_waits_for_no_balancer(tmp_path: Path) -> None:
    make_model_folder(tmp_path / "m")
    with started(tmp_path, *on_model(tmp_path / "m", "--drain-delay-s", "600")) as process, process.ready():
        process.signal()
        process.wait(lambda: "leaving:" in process.stderr)
        process.signal()
        assert process.exit_status() not in (0, None)


def test_a_drain_does_not_wait_longer_than_it_may(tmp_path: Path) -> None:
    make_model_folder(tmp_path / "m")
    with (
        started(tmp_path, *on_model(tmp_path / "m", "--drain-timeout-s", "0.3")) as process,
        process.ready() as client,
        socket.create_connection((client.base_url.host, client.base_url.port)) as half,
    ):
        half.sendall(request_head(1000) + b"abc")
        process.wait(lambda: "perceiver_admitted_bytes 3.0" in client.get("/metrics").text)
        process.signal()
        assert process.exit_status() == 0
        half.settimeout(10)
        half.recv(10_000)  # whatever it says, it does not hang


def test_what_a_drain_does_not_finish_is_told_so(tmp_path: Path) -> None:
    make_slow_model(tmp_path / "m", steps=10**9)
    slow = encode(np.full((HEIGHT, WIDTH, 3), 255, np.uint8), "PNG")
    arguments = on_model(tmp_path / "m", "--drain-timeout-s", "0.5", "--run-timeout-ms", "600000")
    with started(tmp_path, *arguments) as process, process.ready() as client, ThreadPoolExecutor(8) as pool:
        posts = [pool.submit(client.post, "/predict", content=slow, headers=IMAGE)]
        process.wait(lambda: "perceiver_admitted_images 1.0" in client.get("/metrics").text)
        posts += [pool.submit(client.post, "/predict", content=slow, headers=IMAGE) for _ in range(3)]
        posts += [pool.submit(client.post, "/predict", content=iter([slow]), headers=IMAGE) for _ in range(3)]
        process.wait(lambda: "perceiver_admitted_images 7.0" in client.get("/metrics").text)
        process.signal()
        for post in posts:
            response = post.result(20)
            assert (response.status_code, response.json()["error"]["code"]) == (503, "draining")
            assert response.headers["x-request-id"]
        assert process.exit_status() == 0
        assert "Traceback" not in process.stderr


def test_a_service_whose_model_hangs_in_its_first_run_can_be_stopped(tmp_path: Path) -> None:
    make_model_folder(tmp_path / "m")
    hanging = {VARIABLE: "3600000"}
    # A balancer that has sent it nothing yet is not waited for.
    with started(tmp_path, *on_model(tmp_path / "m", "--drain-delay-s", "600"), module=MODULE, **hanging) as process:
        with httpx.Client(base_url=process.url(), timeout=20) as client:
            assert client.get("/health/ready").status_code == 503
        process.signal()
        assert process.exit_status() == 0
    with started(tmp_path, *on_model(tmp_path / "m", "--load-timeout-s", "0.5"), module=MODULE, **hanging) as process:
        refused(process, 1, "not loaded, warm and checked within 0.5 s")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_idle_service_stops_at_once(tmp_path: Path, number: int) -> None:
    if signal.getsignal(number) is signal.SIG_IGN:
        pytest.skip("nohup has the tests ignore it, and what they start")
    make_model_folder(tmp_path / "m")
    arguments = on_model(tmp_path / "m", "--log-format", "json", "--drain-timeout-s", "600")
    with started(tmp_path, *arguments) as process, process.ready():
        process.signal(number)
        assert process.exit_status() == 0
        assert "Traceback" not in process.stderr
        assert all(line.startswith("{") for line in process.stderr.splitlines())


@pytest.mark.skipif(signal.getsignal(signal.SIGINT) is signal.SIG_IGN, reason="a shell has what it starts ignore it")
@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="what a process has loaded is read from Linux's /proc")
@pytest.mark.parametrize("library", ["pydantic_core", "multiarray_umath", "onnxruntime_pybind11"])
def test_ctrl_c_while_it_is_imported(tmp_path: Path, library: str) -> None:
    make_model_folder(tmp_path / "m")
    with started(tmp_path, *on_model(tmp_path / "m")) as process:
        maps = Path(f"/proc/{process.popen.pid}/maps")
        process.wait(lambda: library in maps.read_text())
        process.signal(signal.SIGINT)
        assert process.exit_status() in (-signal.SIGINT, 130)
        assert process.stderr == ""


def test_a_second_signal_does_not_wait(tmp_path: Path) -> None:
    make_model_folder(tmp_path / "m")
    with (
        started(tmp_path, *on_model(tmp_path / "m", "--drain-timeout-s", "600")) as process,
        process.ready() as client,
        socket.create_connection((client.base_url.host, client.base_url.port)) as half,
    ):
        half.sendall(request_head(1000) + b"abc")
        process.wait(lambda: "perceiver_admitted_bytes 3.0" in client.get("/metrics").text)
        process.signal(signal.SIGINT)
        process.wait(lambda: "draining: 1 requests" in process.stderr)
        process.signal(signal.SIGINT)
        assert process.exit_status() == 130


def test_a_hung_engine_ends_the_process(tmp_path: Path) -> None:
    make_slow_model(tmp_path / "m", steps=10**9)
    slow, quick = np.full((HEIGHT, WIDTH, 3), 255, np.uint8), np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    arguments = on_model(tmp_path / "m", "--run-timeout-ms", "300")
    with started(tmp_path, *arguments) as process, process.ready() as client:
        assert client.post("/predict", content=encode(quick, "PNG"), headers=IMAGE).status_code == 200
        failed = client.post("/predict", content=encode(slow, "PNG"), headers=IMAGE)
        assert (failed.status_code, failed.json()["error"]["code"]) == (500, "inference_failed")
        assert process.exit_status() == 1
        assert "CRITICAL" in process.stderr


def test_a_new_version_is_served_without_a_restart(tmp_path: Path) -> None:
    make_model_folder(tmp_path / "m", 1)
    with started(tmp_path, *on_model(tmp_path / "m", "--model-poll-s", "0.1")) as process, process.ready() as client:
        assert post(client).json()["version"] == 1
        make_model_folder(tmp_path / "m", 2)
        process.wait(lambda: post(client).json()["version"] == 2)


# What keeps it from starting: a sentence and a status, no traceback


def refused(process: Process, status: int, *said: str) -> None:
    assert process.exit_status() == status
    assert "Traceback" not in process.stderr
    for words in said:
        assert words in process.stderr


def test_a_missing_model_folder(tmp_path: Path) -> None:
    with started(tmp_path, *on_model(tmp_path / "nowhere")) as process:
        refused(process, 1, "nowhere", "there is no such folder")


@pytest.mark.parametrize("defect", ["golden_mismatch", "corrupt_onnx", "no_metadata"])
def test_a_model_that_is_refused(tmp_path: Path, defect: str) -> None:
    make_model_folder(tmp_path / "m", defect=defect)  # type: ignore[arg-type]
    with started(tmp_path, *on_model(tmp_path / "m")) as process:
        refused(process, 1, "version 1: ")


def test_a_provider_that_is_not_there(tmp_path: Path) -> None:
    make_model_folder(tmp_path / "m")
    with started(tmp_path, "--model-dir", str(tmp_path / "m"), "--provider", "tensorrt") as process:
        refused(process, 1, "tensorrt")


def test_a_port_in_use(tmp_path: Path) -> None:
    make_model_folder(tmp_path / "m")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        with started(tmp_path, *on_model(tmp_path / "m", "--port", port)) as process:
            refused(process, 1, f"can't listen on 127.0.0.1:{port}: address already in use; name another with --host")
            assert "--port (HOST= and PORT= of make serve)" in process.stderr
    with started(tmp_path, *on_model(tmp_path / "m", "--host", "no such host")) as process:
        refused(process, 1, "can't listen on no such host:0: ")
    with started(tmp_path, *on_model(tmp_path / "m", "--host", "a..b")) as process:
        refused(process, 1, "can't listen on a..b:0: ")


def test_wrong_settings(tmp_path: Path) -> None:
    with started(tmp_path, "--max-batch-size", "0", PERCEIVER_PROT="1") as process:
        refused(process, 2, "PERCEIVER_MAX_BATCH_SIZE (--max-batch-size)", "PERCEIVER_PROT", "did you mean")
        assert len(process.stderr.splitlines()) == 2


@pytest.mark.parametrize("closed", [">&-", "2>&-"])
def test_a_status_is_told_without_an_output(closed: str) -> None:
    """As some supervisors start it."""
    command = f'exec "$0" -m service --max-batch-size 0 {closed}'
    done = subprocess.run(["sh", "-c", command, sys.executable], cwd=ROOT, capture_output=True, timeout=60, check=False)
    assert done.returncode == 2


def test_it_serves_and_ends_without_any_standard_stream(tmp_path: Path) -> None:
    make_model_folder(tmp_path / "m")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
    command = [sys.executable, "-m", "service", *on_model(tmp_path / "m", "--port", port)]
    with subprocess.Popen(["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", *command], cwd=ROOT) as process:
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=SECONDS) as client:
                until = time.monotonic() + SECONDS
                while not is_ready(client):
                    assert process.poll() is None
                    assert time.monotonic() < until
                    time.sleep(0.02)
                assert post(client).status_code == 200
            process.terminate()
            assert process.wait(SECONDS) == 0
        finally:
            process.kill()


def is_ready(client: httpx.Client) -> bool:
    """Where the port may not be open yet."""
    try:
        return client.get("/health/ready").status_code == 200
    except httpx.ConnectError:
        return False


def test_help_needs_no_model() -> None:
    command = [sys.executable, "-m", "service", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0
    assert "--max-queue-size" in done.stdout
    assert done.stderr == ""


@pytest.mark.skipif(sys.platform != "linux", reason="reads what Linux tells of processes")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_decode_processes_end_with_the_service(tmp_path: Path, number: int) -> None:
    make_model_folder(tmp_path / "m")
    with started(tmp_path, *on_model(tmp_path / "m", "--decode-processes=2")) as process, process.ready():
        children = process.children()
        assert len(children) == 2
        process.signal(number)
        process.popen.wait(SECONDS)
    until = time.monotonic() + SECONDS
    while running := [child for child in children if is_running(child)]:
        assert time.monotonic() < until, running
        time.sleep(0.02)


def is_running(pid: int) -> bool:
    """Whether there is such a process, and it is no zombie that waits for whoever has inherited it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
