"""The service as a process of its own: started, waited for, its CPU time and memory read, always stopped."""

import http.client
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from types import TracebackType
from typing import Self

from benchmarks.common import ROOT, BenchmarkError, ModelPlace
from benchmarks.rivals.process_tree import tree_cpu_seconds
from service.engine.cpus import usable_cores

HOST = "127.0.0.1"
PREFIX = "PERCEIVER_"
STOP_TIMEOUT_S = 60.0
POLL_S = 0.005
LOG_LINES = 15


class Server:
    """`python -m service` with one model, on a free port of this machine; a context manager.

    Args:
        model: what to serve.
        settings: values by setting name, as `max_batch_size`; several workers get management ports. Variables of the
            caller's environment are not passed on: they would change what is measured without being seen.
        command: other words after the interpreter than `-m service`, for a server to compare with.
        checkout: whose code runs.
        ready_timeout_s: seconds until it must be ready.

    Attributes:
        port: TCP port it listens on.
        pid: process id.
        seconds_to_ready: from the start of the process until /health/ready of each worker answers 200.

    Raises:
        BenchmarkError: on entering, when it ends or does not become ready; with the end of its log.
    """

    def __init__(
        self,
        model: ModelPlace,
        settings: Mapping[str, str] | None = None,
        *,
        command: Sequence[str] = ("-m", "service"),
        checkout: Path = ROOT,
        ready_timeout_s: float = 120.0,
    ) -> None:
        self.port = free_port()
        self.seconds_to_ready = 0.0
        self._command = [sys.executable, *command]
        self._checkout = checkout
        settings = dict(settings or {})
        self._health_ports = [self.port]
        if (workers := worker_count(settings)) > 1:  # on the port that they share, the first would answer for all
            first = free_ports(workers)
            settings["management_port"] = str(first)
            self._health_ports = list(range(first, first + workers))
        self._environment = environment(model, self.port, settings)
        self._ready_timeout_s = ready_timeout_s

    def __enter__(self) -> Self:
        self._log = tempfile.TemporaryFile()  # closed in __exit__; a pipe that nobody reads would block
        start = time.monotonic()
        self._process = subprocess.Popen(
            self._command,
            cwd=self._checkout,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C is for the benchmark, which then stops the server itself
        )
        try:
            self._wait_until_ready(start)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        self.seconds_to_ready = time.monotonic() - start
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._log.close()

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    @property
    def url(self) -> str:
        """Where it answers."""
        return f"http://{HOST}:{self.port}"

    def cpu_seconds(self) -> float | None:
        """CPU time of it and its decode processes, in seconds; None where there is no /proc (only Linux has it)."""
        return tree_cpu_seconds(self.pid)

    def rss_bytes(self) -> int | None:
        """Memory in use now, in bytes, without its decode processes; None where there is no /proc."""
        return rss_bytes(self.pid)

    def log_tail(self) -> str:
        """Return the last lines that it wrote."""
        self._log.seek(0)
        return "\n".join(self._log.read().decode(errors="replace").splitlines()[-LOG_LINES:])

    def _wait_until_ready(self, start: float) -> None:
        while not all(map(is_ready, self._health_ports)):
            if (status := self._process.poll()) is not None:
                raise BenchmarkError(f"the server ended with status {status} before it was ready:\n{self.log_tail()}")
            if time.monotonic() - start > self._ready_timeout_s:
                raise BenchmarkError(f"the server was not ready in {self._ready_timeout_s:g} s:\n{self.log_tail()}")
            time.sleep(POLL_S)


def worker_count(settings: Mapping[str, str]) -> int:
    """Return how many workers the service starts; 1 where only the service can say, as on a GPU."""
    text = settings.get("workers", "1")
    if text in ("auto", "0"):
        return usable_cores() if settings.get("provider") == "cpu" else 1
    return int(text) if text.isdecimal() else 1


def environment(model: ModelPlace, port: int, settings: Mapping[str, str]) -> dict[str, str]:
    """Environment of a server: the caller's without its own settings, then the ones given here."""
    base = {name: value for name, value in os.environ.items() if not name.upper().startswith(PREFIX)}
    own = {"model_dir": str(model.folder), "model_version": str(model.version), "host": HOST, "port": str(port)}
    return base | {PREFIX + name.upper(): value for name, value in (own | dict(settings)).items()}


def parse_settings(texts: Sequence[str]) -> dict[str, str]:
    """Read ["name=value", ...].

    Raises:
        BenchmarkError: there is no "=".
    """
    for text in texts:
        if "=" not in text:
            raise BenchmarkError(f"--setting {text}: must have the form name=value, as max_batch_size=64")
    return {name.strip(): value for name, _, value in (text.partition("=") for text in texts)}


def free_port() -> int:
    """Return a port that nobody listens on."""
    with closing(socket.socket()) as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port


def free_ports(count: int) -> int:
    """Return the first of `count` neighbouring ports that nobody listens on, below those of outgoing connections."""
    while True:
        first = random.randrange(10_000, 32_000)  # noqa: S311 (no secret)
        with ExitStack() as stack:
            try:
                for port in range(first, first + count):
                    stack.enter_context(closing(socket.socket())).bind((HOST, port))
            except OSError:
                continue
        return first


def is_ready(port: int) -> bool:
    """Ask /health/ready once."""
    with closing(http.client.HTTPConnection(HOST, port, timeout=5)) as connection:
        try:
            connection.request("GET", "/health/ready")
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False


def cpu_seconds(pid: int) -> float | None:
    """User and system time of a process, all threads, in seconds; None where there is no /proc. Steps of 10 ms."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()  # the name before may hold spaces and brackets
    user, system = int(fields[11]), int(fields[12])
    return (user + system) / os.sysconf("SC_CLK_TCK")


def rss_bytes(pid: int) -> int | None:
    """Resident memory of a process in bytes; None where there is no /proc."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text(encoding="utf-8").split()[1])
    except OSError:
        return None
    return pages * os.sysconf("SC_PAGE_SIZE")
