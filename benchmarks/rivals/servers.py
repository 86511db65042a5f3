"""A rival as processes of its own: started, waited for, measured as a whole tree, always stopped."""

import asyncio
import os
import subprocess
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from benchmarks.client import Client, DisconnectedError
from benchmarks.common import BenchmarkError, ModelPlace
from benchmarks.rivals import job
from benchmarks.rivals.frameworks import Framework, Place
from benchmarks.rivals.process_tree import stop_tree
from benchmarks.server import HOST, free_port
from service.engine.metadata import MODEL_FILE

READY_TIMEOUT_S = 60.0
POLL_S = 0.05
LOG_LINES = 15


class RivalServer:
    """A framework that serves the job on a free port of this machine; a context manager.

    Args:
        framework: what to start.
        python: interpreter of its environment.
        model: what it serves.
        request: a whole request; it is ready when this is answered with 200.

    Attributes:
        port: TCP port it listens on.
        pid: process id of the tree's root.

    Raises:
        BenchmarkError: on entering, when it can't be started, ends, or does not answer a request with 200; with the end
            of its log.
    """

    def __init__(self, framework: Framework, python: Path, model: ModelPlace, request: bytes) -> None:
        self.port = free_port()
        self.pid = 0
        self._framework, self._python, self._model, self._request = framework, python, model, request

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            log = stack.enter_context(tempfile.TemporaryFile())  # a pipe that nobody reads would block
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True)))
            place = Place(self._python, folder, self.port, self._framework.settings)
            process = self._start(place, log)
            self.pid = process.pid
            stack.callback(process.wait)
            stack.callback(stop_tree, self.pid, 0)  # where a signal breaks off the next, which comes first
            stack.callback(stop_tree, self.pid)
            try:
                self._wait_until_ready(process)
            except BenchmarkError as error:
                log.seek(0)
                tail = log.read().decode(errors="replace").splitlines()[-LOG_LINES:]
                raise BenchmarkError("\n".join([str(error), *tail])) from None
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.close()

    def _start(self, place: Place, log: IO[bytes]) -> subprocess.Popen[bytes]:
        try:
            return subprocess.Popen(
                list(self._framework.command(place)),
                cwd=self._framework.directory(place),
                env=self._environment(place),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # by its session the whole tree is found, and Ctrl-C is not for it
            )
        except OSError as error:  # a program for another platform, or none for this Python
            raise BenchmarkError(f"{self._framework.title} can't be started here: {error}") from None

    def _environment(self, place: Place) -> dict[str, str]:
        own = {job.MODEL: str(self._model.path / MODEL_FILE), job.PORT: str(self.port)}
        settings = {job.SETTING + name.upper(): str(value) for name, value in place.settings.items()}
        # What a framework writes into temporary folders goes with its own folder.
        return {**os.environ, "TMPDIR": str(place.folder), **own, **settings, **self._framework.variables(place)}

    def _wait_until_ready(self, process: subprocess.Popen[bytes]) -> None:
        start, status = time.monotonic(), 0
        while (status := asyncio.run(ask_once(self.port, self._request))) != 200:
            if (ended := process.poll()) is not None:
                raise BenchmarkError(f"{self._framework.title} ended with status {ended} before it was ready:")
            if time.monotonic() - start > READY_TIMEOUT_S:
                said = f"answered with status {status}" if status else "did not answer"
                raise BenchmarkError(f"{self._framework.title} {said} after {READY_TIMEOUT_S:g} s:")
            time.sleep(POLL_S)


async def ask_once(port: int, request: bytes, timeout_s: float = 5.0) -> int:
    """Send one request and return the answer's status; 0 without an answer."""
    client = Client(HOST, port)
    try:
        return (await client.send(request, timeout_s)).status
    except (DisconnectedError, TimeoutError):
        return 0
    finally:
        client.close()
