"""An upgrade as Kubernetes does it, in small: clients that keep their connections get an answer to each request."""

from __future__ import annotations

import asyncio
import re
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import urlsplit

import httpx

from tests.end_to_end.process import SECONDS, Process, on_model, started
from tests.end_to_end.test_service_process import IMAGE
from tests.fakes import make_model_folder
from tests.service.harness import png, request_head

CLIENTS = 4
NOTICED_S = 0.5  # until the last node has taken the pod out of its endpoints
PRE_STOP_S, DRAIN_DELAY_S = 1.0, 5.0
LEAVING = re.compile("leaving: |draining: ")  # what the log says at the signal


class ServiceProxy:
    """What kube-proxy makes of a Service: a new connection goes to one of the endpoints, and stays there.

    Attributes:
        endpoints: URLs of the pods that new connections go to.
    """

    def __init__(self) -> None:
        self.endpoints: list[str] = []
        self._number = 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    @contextmanager
    def running(self) -> Iterator[str]:
        """Yield its URL."""
        self._thread.start()
        starting = asyncio.run_coroutine_threadsafe(asyncio.start_server(self._connected, "127.0.0.1", 0), self._loop)
        server = starting.result(SECONDS)
        try:
            yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        finally:
            asyncio.run_coroutine_threadsafe(self._close(server), self._loop).result(SECONDS)
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    async def _close(self, server: asyncio.Server) -> None:
        server.close()
        await asyncio.gather(
            *asyncio.all_tasks() - {asyncio.current_task()}
        )  # the clients have closed their connections

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._number += 1
        address = urlsplit(self.endpoints[self._number % len(self.endpoints)])
        pod_reader, pod_writer = await asyncio.open_connection(address.hostname, address.port)
        try:
            await asyncio.gather(self._pass_on(reader, pod_writer), self._pass_on(pod_reader, writer))
        finally:
            for one in (writer, pod_writer):
                one.close()

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
            writer.close()


class Seen:
    """What clients were answered: how often each status, and how many answers each client has."""

    def __init__(self) -> None:
        self.statuses = Counter[str]()
        self.answers = [0] * CLIENTS


def post_all_the_time(url: str, number: int, stop: threading.Event, seen: Seen) -> None:
    """What a client does that has one connection, and a new one where the service ends that."""
    with httpx.Client(base_url=url, timeout=SECONDS) as client:
        while not stop.is_set():
            try:
                response = client.post("/predict", content=png(1), headers=IMAGE)
                seen.statuses[f"{response.status_code}"] += 1
            except httpx.TransportError as error:
                seen.statuses[repr(error)] += 1
            seen.answers[number] += 1
            time.sleep(0.02)  # most of the time its connection is idle, as a real client's is


@contextmanager
def clients(url: str) -> Iterator[Seen]:
    """Count what clients see while the block runs, and until each has had its last answer."""
    stop, seen = threading.Event(), Seen()
    threads = [threading.Thread(target=post_all_the_time, args=(url, one, stop, seen)) for one in range(CLIENTS)]
    for thread in threads:
        thread.start()
    try:
        yield seen
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def answered(process: Process) -> float:
    """How many requests a pod has answered."""
    text = httpx.get(f"{process.url()}/metrics").text
    lines = [
        line for line in text.splitlines() if line.startswith('perceiver_requests_total{code="200",route="/predict"')
    ]
    return sum(float(line.split()[-1]) for line in lines)


def upgrade(tmp_path: Path, *, drain_delay_s: float) -> tuple[Counter[str], int]:
    """Replace one pod by another while clients post.

    Args:
        drain_delay_s: setting of the pods.

    Returns:
        What these clients saw, and the status for one whose connection to the old pod was idle at the signal.
    """
    make_model_folder(tmp_path / "m")
    arguments = on_model(tmp_path / "m", "--drain-delay-s", str(drain_delay_s))
    proxy = ServiceProxy()
    with (
        started(tmp_path, *arguments) as old,
        started(tmp_path, *arguments) as new,
        old.ready(),
        new.ready(),
        proxy.running() as url,
        httpx.Client(base_url=url, timeout=SECONDS) as idle,
    ):
        proxy.endpoints = [old.url()]
        assert idle.post("/predict", content=png(1), headers=IMAGE).status_code == 200
        with clients(url) as seen:
            old.wait(lambda: seen.statuses["200"] > 20)
            proxy.endpoints = [old.url(), new.url()]  # maxSurge 1: it is ready before the old one is stopped
            # The old pod is deleted: the kubelet begins with preStop, and the nodes hear of it meanwhile.
            noticed = threading.Timer(NOTICED_S, lambda: proxy.endpoints.remove(old.url()))
            noticed.start()
            time.sleep(PRE_STOP_S)
            noticed.join()
            body = png(1)
            with socket.create_connection((urlsplit(old.url()).hostname, urlsplit(old.url()).port)) as slow:
                slow.sendall(request_head(len(body), "Expect: 100-continue"))
                assert slow.recv(100).startswith(b"HTTP/1.1 100")  # it is accepted, and the old pod waits for it
                slow.sendall(body[:30])
                old.signal()
                old.wait(lambda: LEAVING.search(old.stderr))
                status = idle.post("/predict", content=png(1), headers=IMAGE).status_code
                # The second answer from now on was asked for after the signal: nobody is left on the old pod.
                at_signal = list(seen.answers)
                old.wait(lambda: all(now >= then + 2 for now, then in zip(seen.answers, at_signal, strict=True)))
                slow.sendall(body[30:])  # what was accepted is answered, however slowly it comes
                assert slow.recv(100).startswith(b"HTTP/1.1 200")
            assert old.exit_status() == 0
            before = answered(new)
            new.wait(lambda: answered(new) > before)
    return seen.statuses, status


def test_nobody_notices(tmp_path: Path):
    seen, status = upgrade(tmp_path, drain_delay_s=DRAIN_DELAY_S)
    assert set(seen) == {"200"}
    assert status == 200


def test_a_pause_before_the_signal_is_not_enough(tmp_path: Path):
    """Who keeps a connection to the old pod is told 503 on it: so the test above can fail, and the delay is needed."""
    seen, status = upgrade(tmp_path, drain_delay_s=0)
    assert set(seen) <= {"200", "503"}
    assert status == 503
