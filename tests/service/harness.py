"""A service that listens on a real socket inside a test's event loop, with an engine that the test holds in its hand.

`FakeEngine` answers [the picture's number, tag, 0, 0, 0], so that a test knows whose answer it has.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import numpy as np

from service.app import PerceiverApp
from service.artifact import GOLDEN_FILE, MODEL_FILE, Golden, save_golden
from service.engine import Engine
from service.front_processes import FrontProcesses
from service.ledger import CONNECTIONS
from service.server import Server, configuration
from service.settings import Settings
from service.sockets import alone as own_sockets
from service.sockets import reserve
from service.state import Service
from service.versions import EngineOptions
from tests.fakes import FakeEngine, picture
from tests.imaging.files import encode

HTTP_PROCESSES = 0  # see `conftest.either_way`
QUICK = True  # whether there is the short way of ordinary requests


@dataclass
class Running:
    """A service under test."""

    service: Service
    server: Server | None
    port: int
    client: httpx.AsyncClient
    engine: FakeEngine
    writers: list[asyncio.StreamWriter] = field(default_factory=list)
    fronts: FrontProcesses | None = None

    @property
    def in_flight(self) -> int:
        """Requests to /predict that are being answered, in whatever process."""
        return self.service.in_flight if self.fronts is None else self.fronts.in_flight

    @property
    def connections(self) -> int:
        """Open connections, to whatever process."""
        if self.fronts is not None:
            return self.fronts._ledger.total(CONNECTIONS)
        assert self.server is not None
        return len(self.server.server_state.connections)

    def drain(self) -> None:
        """Begin what SIGTERM begins, with a minute for it."""
        if self.fronts is None:
            self.service.draining = True
        else:
            self.fronts.drain(60)

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A bare connection, closed at the end."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        self.writers.append(writer)
        return reader, writer

    async def predict(self, number: int = 1, **options: object) -> httpx.Response:
        """Post one picture as a raw body."""
        return await self.client.post("/predict", content=png(number), headers={"content-type": "image/png"}, **options)

    async def hold_first(self) -> asyncio.Task[httpx.Response]:
        """Post picture 1, and return when the engine holds it."""
        self.engine.hold()
        posted = asyncio.create_task(self.predict(1))
        await self.until(lambda: self.engine.batches == [[1]])
        return posted

    async def assert_first_alone_ran(self, first: asyncio.Task[httpx.Response]) -> None:
        """Wait until all others have left, let go what `hold_first` has held, and see that no other picture ran."""
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
    """The picture that `FakeEngine` recognises as `number`, as a PNG."""
    return encode(picture(number), "PNG")


def fake_folder(folder: Path, engine: FakeEngine, versions: Sequence[int] = (1,)) -> Path:
    """A model folder whose golden pictures suit a `FakeEngine`."""
    images = np.stack([picture(number) for number in (3, 1, 2)])
    logits = engine.run(images)
    engine.batches.clear()
    for version in versions:
        (folder / str(version)).mkdir(parents=True)
        (folder / str(version) / MODEL_FILE).write_bytes(b"the fake engine does not read this")
        save_golden(folder / str(version) / GOLDEN_FILE, Golden(images, logits.argmax(axis=1), logits))
    return folder


@asynccontextmanager
async def running(folder: Path, engine: FakeEngine | None = None, **settings: object) -> AsyncIterator[Running]:
    """Serve until the block ends; ready when it begins."""
    engine = engine or FakeEngine()

    def open_engines(path: Path, options: EngineOptions) -> list[Engine]:
        return [engine]

    values = {
        "model_dir": fake_folder(folder, engine),
        "port": 0,
        "provider": "cpu",
        "model_poll_s": 3600,
        "http_processes": HTTP_PROCESSES,
    }
    service = Service(Settings.model_validate(values | settings), open_engines=open_engines)
    async with listening(service, engine) as run:
        await run.until(lambda: service.status == "ready")
        engine.batches.clear()
        yield run


@asynccontextmanager
async def listening(service: Service, engine: FakeEngine) -> AsyncIterator[Running]:
    """Serve on a free port, ready or not."""
    app = PerceiverApp(service)
    begin = with_processes if service.settings.http_processes else alone
    async with AsyncExitStack() as stack:
        server, fronts, port = await stack.enter_async_context(begin(app))
        scheme = "http" if service.settings.tls_cert is None else "https"
        url = f"{scheme}://127.0.0.1:{port}"
        client = await stack.enter_async_context(httpx.AsyncClient(base_url=url, verify=False, timeout=20))
        run = Running(service, server, port, client, engine, fronts=fronts)
        try:
            yield run
        finally:
            if engine._permits is not None:
                engine.release(1000)
            for writer in run.writers:
                writer.close()


@asynccontextmanager
async def alone(app: PerceiverApp) -> AsyncIterator[tuple[Server, None, int]]:
    """All in the test's process.

    What `Server.serve` does beside this, its main loop and its slow and careful end, is tested on real processes.
    """
    config = configuration(app, app.state.service, app.entry.quick if QUICK else None)
    config.load()
    server = Server(config)
    server.lifespan = config.lifespan_class(config)
    await server.startup(own_sockets(config.service.settings))
    try:
        yield server, None, server.servers[0].sockets[0].getsockname()[1]
    finally:
        await stop(server)


@asynccontextmanager
async def with_processes(app: PerceiverApp) -> AsyncIterator[tuple[None, FrontProcesses, int]]:
    """HTTP in processes of its own, the rest in the test's."""
    service: Service = app.state.service
    addresses = reserve(service.settings)
    fronts = FrontProcesses(service, app.routes_alone, addresses, service.settings.http_processes)
    service.start()
    fronts.start()
    try:
        async with asyncio.timeout(20):
            await fronts.listening()
        yield None, fronts, addresses[0].getsockname()[1]
    finally:
        await fronts.stop()
        await service.stop()
        for one in addresses:
            one.close()


async def stop(server: Server) -> None:
    """Close the sockets, let the requests end, and end the lifespan."""
    for listener in server.servers:
        listener.close()
    for connection in list(server.server_state.connections):
        connection.transport.close()
    async with asyncio.timeout(20):
        await asyncio.gather(*server.server_state.tasks, return_exceptions=True)
        await server.lifespan.shutdown()


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
