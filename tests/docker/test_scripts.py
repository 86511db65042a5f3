"""The scripts that run in the containers."""

import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.docker.files import DOCKER, compose
from tests.end_to_end.test_workers import free_ports

HEALTHCHECK = [sys.executable, "-IS", DOCKER / "healthcheck.py"]
START = DOCKER / "grafana" / "start.sh"


@contextmanager
def answering(status: int, body: bytes, path: str = "/health/ready", port: int = 0) -> Iterator[int]:
    """A server that answers this path so; yields its port."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            found = status if self.path == path else 404
            self.send_response(found)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", port), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()


def test_modules_that_the_check_of_an_image_imports_are_there():
    imports = re.findall(r"^inside python -c 'import ([\w., ]+);", (DOCKER / "check.sh").read_text(), re.MULTILINE)
    modules = {name for line in imports for name in line.split(", ") if name.startswith("service")}
    assert modules
    assert all(find_spec(name) for name in modules)


def check_health(port: int, **variables: str) -> "subprocess.CompletedProcess[str]":
    variables["PERCEIVER_PORT"] = str(port)
    return subprocess.run(HEALTHCHECK, env=variables, capture_output=True, text=True, timeout=20)


def test_healthcheck_passes_when_ready():
    with answering(200, b"{}") as port:
        run = check_health(port)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


def test_healthcheck_goes_through_no_proxy():
    """Docker gives a container that of the host's ~/.docker/config.json."""
    proxy = "http://127.0.0.1:9"
    with answering(200, b"{}") as port:
        run = check_health(port, http_proxy=proxy, HTTP_PROXY=proxy, all_proxy=proxy)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


def test_healthcheck_fails_with_the_services_words():
    with answering(503, b'{"status": "loading"}') as port:
        run = check_health(port)
    assert run.returncode == 1
    assert '{"status": "loading"}' in run.stderr


def test_healthcheck_fails_when_nobody_listens():
    with answering(200, b"") as port:
        pass
    run = check_health(port)
    assert run.returncode == 1
    assert "refused" in run.stderr


def test_healthcheck_asks_the_management_port_of_each_worker():
    first = free_ports(2)
    asked = {"PERCEIVER_MANAGEMENT_PORT": str(first)}
    with answering(200, b"{}", port=first):
        assert check_health(1, **asked).returncode == 0  # the port of the clients has no /health then
        with answering(503, b'{"status": "loading"}', port=first + 1):
            assert check_health(1, **asked, PERCEIVER_WORKERS="auto").returncode == 0
            run = check_health(1, **asked, PERCEIVER_WORKERS="2")
            assert run.returncode == 1
            assert '{"status": "loading"}' in run.stderr
        with answering(200, b"{}", port=first + 1):
            assert check_health(1, **asked, PERCEIVER_WORKERS="2").returncode == 0


def test_grafanas_healthcheck_goes_through_no_proxy():
    kind, command = compose()["services"]["grafana"]["healthcheck"]["test"]
    assert kind == "CMD-SHELL"
    environment = {"PATH": "/usr/bin:/bin", "http_proxy": "http://127.0.0.1:9"}
    with answering(200, b"{}", "/api/health") as port:
        run = subprocess.run(["sh", "-c", command.replace(":3000", f":{port}")], env=environment, capture_output=True)
    assert run.returncode == 0, run.stderr


def start_grafana(tmp_path: Path, password: str) -> str:
    """The password that Grafana would get."""
    stub = tmp_path / "run.sh"
    stub.write_text('#!/bin/sh\necho "password=$GF_SECURITY_ADMIN_PASSWORD $*"\n')
    stub.chmod(0o755)
    environment = {"GF_PATHS_DATA": str(tmp_path), "GRAFANA_RUN": str(stub), "PATH": "/usr/bin:/bin"}
    environment["GF_SECURITY_ADMIN_PASSWORD"] = password
    run = subprocess.run(["/bin/sh", START, "--flag"], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.splitlines()[-1].endswith(" --flag")
    return run.stdout.splitlines()[-1].removeprefix("password=").removesuffix(" --flag")


def test_grafana_takes_the_password_that_is_set(tmp_path: Path):
    assert start_grafana(tmp_path, "chosen") == "chosen"
    assert not (tmp_path / "admin-password").exists()


def test_grafana_gets_a_password_of_its_own_once(tmp_path: Path):
    made_up = start_grafana(tmp_path, "")
    assert len(made_up) == 24
    assert start_grafana(tmp_path, "") == made_up
    assert (tmp_path / "admin-password").stat().st_mode & 0o777 == 0o600
    other = tmp_path / "other"
    other.mkdir()
    assert start_grafana(other, "") != made_up


@pytest.fixture
def training(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """The script with a training and an export that only record it."""
    import train_and_export as script

    calls: list[list[str]] = []
    monkeypatch.setattr(script, "train", lambda arguments: calls.append(["train", *arguments]) or script.status)
    monkeypatch.setattr(script, "export", lambda arguments: calls.append(["export", *arguments]) or 0)
    monkeypatch.setattr(script, "status", 0, raising=False)
    monkeypatch.setattr(script, "MODELS", tmp_path / "models")
    monkeypatch.setattr(script, "calls", calls, raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RUN", "runs/night")
    monkeypatch.delenv("MODEL_NAME", raising=False)
    return script


def test_training_is_followed_by_the_export(training, tmp_path: Path):
    assert training.main(["--preset", "compact"]) == 0
    assert training.calls == [
        ["train", "--out", "runs/night", "--preset", "compact"],
        ["export", "runs/night", "--out", str(tmp_path / "models" / "perceiver-cifar100")],
    ]


def test_of_a_recipe_the_last_stage_is_exported(training):
    for number in (1, 2, 10):
        Path(f"runs/night/stage-{number}").mkdir(parents=True)
        Path(f"runs/night/stage-{number}/report.json").touch()
    assert training.main([]) == 0
    assert [call[1] for call in training.calls] == ["--out", "runs/night/stage-10"]


def test_training_goes_on_where_the_run_has_begun(training):
    Path("runs/night").mkdir(parents=True)
    Path("runs/night/config.json").touch()
    assert training.main([]) == 0  # killed before its first checkpoint
    assert training.calls[0] == ["train", "--out", "runs/night"]
    training.calls.clear()
    Path("runs/night/last.safetensors").touch()
    assert training.main([]) == 0
    assert training.calls[0] == ["train", "--resume", "runs/night"]


@pytest.mark.parametrize("arguments", [["--data", "/images"], ["--data=/images"]])
def test_own_images_want_a_folder_of_their_own(
    training, arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    assert training.main(arguments) == 2
    assert training.calls == []
    assert "set MODEL_NAME in .env" in capsys.readouterr().err
    monkeypatch.setenv("MODEL_NAME", "mine")
    assert training.main(arguments) == 0
    assert training.calls[1] == ["export", "runs/night", "--out", str(tmp_path / "models" / "mine")]


def test_what_could_not_be_exported_is_told_how_to_be(training, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setattr(training, "export", lambda arguments: 2)
    assert training.main([]) == 2
    assert "--entrypoint python training -m export runs/night --out " in capsys.readouterr().err


def test_stopped_training_is_not_exported(training, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(training, "status", 3)
    assert training.main([]) == 3
    assert len(training.calls) == 1


def test_models_that_nobody_may_write_are_told_before_the_training(training, tmp_path: Path, capsys):
    (tmp_path / "models").touch()  # no folder: not even root can write below it
    assert training.main([]) == 2
    assert training.calls == []
    assert "RUN_AS_UID" in capsys.readouterr().err
