"""What uvicorn's cycle does not do by itself: it closes late, and with a draining service."""

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from uvicorn.protocols.http.flow_control import FlowControl

from service.server.response_cycle import AsgiCycle
from tests.service.harness import read_answer, running

START = {"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2"), (b"x-one", b"1")]}
WHOLE = b"HTTP/1.1 200 OK\r\ndate: now\r\ncontent-length: 2\r\nx-one: 1\r\n\r\nab"


class Recorder(asyncio.Transport):
    """Keeps what is written."""

    def __init__(self) -> None:
        super().__init__()
        self.written: list[bytes] = []
        self.closed = False

    def write(self, data: bytes) -> None:
        self.written.append(data)

    def is_closing(self) -> bool:
        return self.closed

    def close(self) -> None:
        self.closed = True


def cycle_on(transport: Recorder, *, keep_alive: bool = True, closes: bool = False) -> AsgiCycle:
    cycle = AsgiCycle(
        scope={"method": "GET"},  # type: ignore[arg-type]
        transport=transport,
        flow=FlowControl(transport),
        logger=None,  # type: ignore[arg-type]
        access_logger=None,  # type: ignore[arg-type]
        access_log=False,
        default_headers=[(b"date", b"now")],
        message_event=asyncio.Event(),
        expect_100_continue=False,
        keep_alive=keep_alive,
        on_response=lambda: None,
    )
    cycle.connection = SimpleNamespace(closes=closes)  # type: ignore[assignment]
    return cycle


def start(*headers: tuple[bytes, bytes], status: int = 200) -> dict[str, Any]:
    return START | {"status": status, "headers": list(headers)}


def body(data: bytes, *, more: bool = False) -> dict[str, Any]:
    return {"type": "http.response.body", "body": data, "more_body": more}


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


@pytest.mark.parametrize("more_body", [True, False])
async def test_an_answer_that_closes_does_so_when_the_body_is_there(recorder: Recorder, more_body: bool) -> None:
    cycle = cycle_on(recorder, keep_alive=False)
    cycle.more_body = more_body
    await cycle.send(start((b"content-length", b"2")))
    for data in (b"a", b"b"):
        assert not recorder.closed
        await cycle.send(body(data, more=data == b"a"))
    assert b"connection: close" in b"".join(recorder.written)
    assert (recorder.closed, cycle.closes_late) == (not more_body, more_body)


async def test_an_answer_of_a_draining_service_closes(recorder: Recorder) -> None:
    cycle = cycle_on(recorder, closes=True)
    cycle.more_body = False
    await cycle.send(START)
    await cycle.send(body(b"ab"))
    assert b"".join(recorder.written) == WHOLE.replace(b"\r\n\r\n", b"\r\nconnection: close\r\n\r\n")
    assert recorder.closed


async def test_a_body_that_nobody_has_asked_for_closes(recorder: Recorder) -> None:
    cycle = cycle_on(recorder)
    cycle.waiting_for_100_continue = True
    await cycle.send(START)
    await cycle.send(body(b"ab"))
    assert b"connection: close" in b"".join(recorder.written)
    assert cycle.closes_late


async def test_head_requests_are_answered(tmp_path: Path) -> None:
    async with running(tmp_path) as run:
        reader, writer = await run.connect()
        request = b"%s /health/live HTTP/1.1\r\nHost: x\r\n\r\n"
        writer.write(request % b"HEAD")
        async with asyncio.timeout(10):
            assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200")
        writer.write(request % b"GET")
        assert (await read_answer(reader))[2] == b'{"status":"live"}'
