"""A real service and a real Prometheus with the shipped configuration, as processes; and how to ask that Prometheus."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from tests.docker.files import DOCKER, ROOT, Yaml, compose, filled_in, prometheus_config

READY_S = 60


def free_port() -> int:
    """A TCP port that nobody listens on now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def get(url: str) -> bytes:
    """The body of an answer 200; OSError otherwise."""
    with urllib.request.urlopen(url, timeout=10) as answer:
        return bytes(answer.read())


def wait_for(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    """Return when the address answers 200; fail when the process ends first, or takes too long."""
    deadline = time.monotonic() + READY_S
    while time.monotonic() < deadline:
        try:
            get(url)
        except OSError:
            assert process.poll() is None, log.read_text()
            time.sleep(0.05)
        else:
            return
    raise AssertionError(f"{url} did not answer:\n{log.read_text()}")


@contextmanager
def running(command: list[str], log: Path, ready: str, environment: dict[str, str]) -> Iterator[None]:
    """Run a process until the block ends."""
    with log.open("wb") as output:
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output, env=os.environ | environment)
        try:
            wait_for(ready, process, log)
            yield
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@contextmanager
def service(model_dir: Path, folder: Path, **settings: object) -> Iterator[int]:
    """`python -m service`; yields its port."""
    port = free_port()
    environment = {f"PERCEIVER_{name.upper()}": str(value) for name, value in settings.items()}
    command = [sys.executable, "-m", "service", "--port", str(port), "--model-dir", str(model_dir)]
    with running(command, folder / "service.log", f"http://127.0.0.1:{port}/health/ready", environment):
        yield port


def configuration(targets: dict[str, str], seconds: float) -> Yaml:
    """The shipped configuration with other addresses and a shorter step, and nothing else changed."""
    config: Yaml = json.loads(json.dumps(prometheus_config()))
    config["global"] |= dict.fromkeys(("scrape_interval", "evaluation_interval"), f"{int(seconds * 1000)}ms")
    config["rule_files"] = [str(DOCKER / "prometheus" / pattern) for pattern in config["rule_files"]]
    for job in config["scrape_configs"]:
        for found in job.pop("dns_sd_configs", []):  # there is no such name here
            addresses = [f"{name}:{found['port']}" for name in found["names"]]
            job["static_configs"] = [{"targets": addresses}]
        for group in job["static_configs"]:
            group["targets"] = [targets.get(target, target) for target in group["targets"]]
    return config


@contextmanager
def prometheus(folder: Path, service_port: int, seconds: float = 1) -> Iterator[Prometheus]:
    """`prometheus` with the shipped flags; scrapes and evaluates every so many seconds."""
    port = free_port()
    address = f"127.0.0.1:{port}"
    path = folder / "prometheus.yml"
    targets = {"service:8000": f"127.0.0.1:{service_port}", "localhost:9090": address}
    path.write_text(yaml.safe_dump(configuration(targets, seconds)))
    flags = [filled_in(flag) for flag in compose()["services"]["prometheus"]["command"]]
    own = {
        "--config.file": str(path),
        "--storage.tsdb.path": str(folder / "data"),
        "--web.user-assets": str(ROOT),
        "--web.external-url": f"http://{address}",
    }
    flags = [f"{name}={own.get(name, value)}" for name, _, value in (flag.partition("=") for flag in flags)]
    command = ["prometheus", *flags, f"--web.listen-address={address}"]
    with running(command, folder / "prometheus.log", f"http://{address}/-/ready", {}):
        yield Prometheus(f"http://{address}")


class Prometheus:
    """The HTTP API of a Prometheus.

    Attributes:
        at: the time at which queries are evaluated, in seconds since 1970; None: now.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.at: float | None = None

    def api(self, path: str, **parameters: object) -> Any:
        """The `data` of an answer.

        Raises:
            AssertionError: Prometheus answers with an error; its words.
        """
        query = urllib.parse.urlencode({name: value for name, value in parameters.items() if value is not None})
        try:
            answer = json.loads(get(f"{self.url}/api/v1/{path}?{query}"))
        except urllib.error.HTTPError as error:
            raise AssertionError(error.read().decode()) from error
        assert answer["status"] == "success"
        return answer["data"]

    def query(self, expression: str) -> list[float]:
        """The values of an instant query."""
        samples = self.api("query", query=fill(expression), time=self.at)["result"]
        return [float(sample["value"][1]) for sample in samples]


def fill(expression: str, interval: str = "30s") -> str:
    """A panel's query with Grafana's variables filled in."""
    return expression.replace("$__rate_interval", interval).replace("$instance", ".*")


def as_bool(expression: str) -> str:
    """An alarm's expression whose comparisons give 0 or 1 instead of filtering."""
    return re.sub(r" (==|>|<) ", r" \1 bool ", expression)
