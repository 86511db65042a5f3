"""A service that listens on a real socket inside a test's event loop, with an engine that the test holds in its hand.

`FakeEngine` answers [the image's number, tag, 0, 0, 0], so that a test knows whose answer it has.
"""

import asyncio
import json
import os
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import numpy as np

from service.api.app import PerceiverApp
from service.engine.metadata import MODEL_FILE
from service.engine.onnx_engine import Engine
from service.lifecycle import Service
from service.repository.folder import GOLDEN_FILE, Golden, save_golden
from service.server.server import Server, configuration
from service.server.sockets import bind, claim_port
from service.settings import Settings
from tests.fakes import FakeEngine, InPlacePool, image
from tests.imaging.files import encode


@dataclass
class Running:
    """A service under test."""

    service: Service
    server: Server
    port: int
    client: httpx.AsyncClient
    engine: FakeEngine
    writers: list[asyncio.StreamWriter] = field(default_factory=list)

    @property
    def in_flight(self) -> int:
        """Requests to /predict that are being answered."""
        return len(self.service.in_flight)

    @property
    def decoded_elsewhere(self) -> int:
        """Images that were not decoded on the event loop."""
        assert isinstance(self.service.decoder.processes, InPlacePool)
        return self.service.decoder.processes.decoded

    @property
    def connections(self) -> int:
        """Open connections."""
        return len(self.server.server_state.connections)

    def drain(self) -> None:
        """Begin what SIGTERM begins, with a minute for it."""
        self.service.draining = True

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A bare connection, closed at the end."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        self.writers.append(writer)
        return reader, writer

    async def predict(self, number: int = 1, **options: object) -> httpx.Response:
        """Post one image as a raw body."""
        return await self.client.post("/predict", content=png(number), headers={"content-type": "image/png"}, **options)

    async def hold_first(self) -> asyncio.Task[httpx.Response]:
        """Post image 1, and return when the engine holds it."""
        self.engine.hold()
        posted = asyncio.create_task(self.predict(1))
        await self.until(lambda: self.engine.batches == [[1]])
        return posted

    async def assert_first_alone_ran(self, first: asyncio.Task[httpx.Response]) -> None:
        """Wait until all others have left, let go what `hold_first` has held, and see that no other image ran."""
        await self.until(lambda: self.in_flight == 1)
        self.engine.let_go()
        assert (await first).status_code == 200
        assert self.engine.batches == [[1]]

    async def metric(self, line: str) -> float:
        """The value of a sample, by its name and labels as they stand in the exposition; 0 where it is absent."""
        text = (await self.client.get("/metrics")).text
        values = [rest for name, _, rest in (row.rpartition(" ") for row in text.splitlines()) if name == line]
        return float(values[0]) if values else 0.0

    async def until(self, condition: object, seconds: float = 10) -> None:
        """Wait until a condition holds."""
        assert callable(condition)
        async with asyncio.timeout(seconds):
            while not condition():  # noqa: ASYNC110 - what is waited for belongs to the code under test
                await asyncio.sleep(0.002)


async def ended(reader: asyncio.StreamReader) -> bool:
    """Whether the server closes the connection, with nothing more to say."""
    async with asyncio.timeout(20):
        try:
            return await reader.read() == b""
        except ConnectionResetError:
            return True


def png(number: int) -> bytes:
    """The image that `FakeEngine` recognises as `number`, as a PNG."""
    return encode(image(number), "PNG")


def fake_folder(folder: Path, engine: FakeEngine, versions: Sequence[int] = (1,)) -> Path:
    """A model folder whose golden images suit a `FakeEngine`."""
    images = np.stack([image(number) for number in (3, 1, 2)])
    has_features = engine.metadata.feature_dim is not None
    logits, unfamiliarity, features = engine.run_outputs(images, with_features=has_features)
    golden = Golden(images, logits.argmax(axis=1), logits, features, unfamiliarity)
    engine.batches.clear()
    for version in versions:
        (folder / str(version)).mkdir(parents=True)
        (folder / str(version) / MODEL_FILE).write_bytes(b"the fake engine does not read this")
        save_golden(folder / str(version) / GOLDEN_FILE, golden)
    return folder


@asynccontextmanager
async def running(
    folder: Path, engine: FakeEngine | None = None, *, real_processes: bool = False, **settings: object
) -> AsyncIterator[Running]:
    """Serve until the block ends; ready when it begins. `real_processes` start for tests that are about them."""
    engine = engine or FakeEngine()

    def open_engines(path: Path, settings: Settings) -> list[Engine]:
        return [engine]

    values = {
        "model_dir": fake_folder(folder, engine),
        "port": 0,
        "provider": "cpu",
        "model_poll_s": 3600,
    }
    service = Service(Settings.model_validate(values | settings), open_engines=open_engines)
    if not real_processes:
        service.decoder.processes = InPlacePool(service.decoder.processes)
    async with listening(service, engine) as run:
        await run.until(lambda: service.status == "ready")
        engine.batches.clear()
        engine.features_runs.clear()
        yield run


@asynccontextmanager
async def listening(service: Service, engine: FakeEngine) -> AsyncIterator[Running]:
    """Serve on a free port, ready or not."""
    app = PerceiverApp(service)
    async with AsyncExitStack() as stack:
        server, port = await stack.enter_async_context(serving(app))
        scheme = "http" if service.settings.tls_cert is None else "https"
        url = f"{scheme}://127.0.0.1:{port}"
        client = await stack.enter_async_context(httpx.AsyncClient(base_url=url, verify=False, timeout=20))
        run = Running(service, server, port, client, engine)
        try:
            yield run
        finally:
            if engine._permits is not None:
                engine.release(1000)
            for writer in run.writers:
                writer.close()


@asynccontextmanager
async def serving(app: PerceiverApp) -> AsyncIterator[tuple[Server, int]]:
    """Serve in the test's process.

    What `Server.serve` does beside this, its main loop and its slow and careful end, is tested on real processes.
    """
    config = configuration(app)
    config.load()
    server = Server(config)
    server.lifespan = config.lifespan_class(config)
    settings = config.service.settings
    if settings.management_port is not None:
        server.management_sockets = claim_port(settings.host, settings.management_port, 1)
    await server.startup(bind(settings.host, settings.port))
    try:
        yield server, server.servers[0].sockets[0].getsockname()[1]
    finally:
        await stop(server)


async def stop(server: Server) -> None:
    """Close the sockets, let the requests end, and end the lifespan."""
    for listener in server.servers:
        listener.close()
    for connection in list(server.server_state.connections):
        connection.transport.close()
    async with asyncio.timeout(20):
        await asyncio.gather(*server.server_state.tasks, return_exceptions=True)
        await server.lifespan.shutdown()


def free_ports(count: int) -> int:
    """The first of so many ports in a row that are free now."""
    for first in range(20_000 + os.getpid() % 5000, 60_000, count):
        with ExitStack() as stack, suppress(OSError):
            for offset in range(count):
                stack.enter_context(socket.create_server(("127.0.0.1", first + offset)))
            return first
    raise OSError("no free ports")


def request_head(length: int | None, *headers: str, target: str = "/predict", method: str = "POST") -> bytes:
    """The head of a raw request."""
    lines = [f"{method} {target} HTTP/1.1", "Host: test", "Content-Type: image/png", *headers]
    if length is not None:
        lines.append(f"Content-Length: {length}")
    return "\r\n".join([*lines, "", ""]).encode()


async def read_answer(reader: asyncio.StreamReader) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body of an answer on a bare connection."""
    async with asyncio.timeout(20):
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        status_line, *lines = head.strip().split("\r\n")
        headers = dict(line.lower().split(": ", 1) for line in lines)
        body = await reader.readexactly(int(headers.get("content-length", "0")))
    return int(status_line.split()[1]), headers, body


def error_of(body: bytes) -> str:
    """The code of an error answer."""
    code: str = json.loads(body)["error"]["code"]
    return code
