"""Answers as they go over the wire: in one write where they are ordinary, uvicorn's way otherwise."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
from uvicorn.protocols.http.flow_control import FlowControl

from service.server.response_cycle import Cycle
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


def cycle_on(transport: Recorder, *, keep_alive: bool = True, method: str = "GET") -> Cycle:
    return Cycle(
        scope={"method": method},  # type: ignore[arg-type]
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


def start(*headers: tuple[bytes, bytes], status: int = 200) -> dict[str, Any]:
    return START | {"status": status, "headers": list(headers)}


def body(data: bytes, *, more: bool = False) -> dict[str, Any]:
    return {"type": "http.response.body", "body": data, "more_body": more}


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


async def test_an_ordinary_answer_is_one_write(recorder: Recorder) -> None:
    cycle = cycle_on(recorder)
    await cycle.send(START)
    assert (recorder.written, cycle.response_started) == ([], True)
    waiting = asyncio.create_task(cycle.receive())
    await asyncio.sleep(0)
    await cycle.send(body(b"ab"))
    assert (recorder.written, cycle.response_complete) == ([WHOLE], True)
    assert await asyncio.wait_for(waiting, 10) == {"type": "http.disconnect"}


async def test_who_has_his_answer_is_not_asked_to_continue(recorder: Recorder) -> None:
    cycle = cycle_on(recorder)
    cycle.waiting_for_100_continue, cycle.more_body = True, False
    await cycle.send(START)
    await cycle.send(body(b"ab"))
    assert await cycle.receive() == {"type": "http.disconnect"}
    assert recorder.written == [WHOLE]


@pytest.mark.parametrize(
    ("options", "begin", "bodies", "whole"),
    [
        ({"keep_alive": False}, START, [b"ab"], WHOLE.replace(b"\r\n\r\n", b"\r\nconnection: close\r\n\r\n")),
        ({"method": "HEAD"}, START, [b"ab"], WHOLE.removesuffix(b"ab")),
        ({}, START, [b"a", b"b"], WHOLE),
        (
            {},
            start(),
            [b"ab"],
            b"HTTP/1.1 200 OK\r\ndate: now\r\ntransfer-encoding: chunked\r\n\r\n2\r\nab\r\n0\r\n\r\n",
        ),
        (
            {},
            start((b"content-length", b"2"), (b"transfer-encoding", b"chunked")),
            [b"ab"],
            b"HTTP/1.1 200 OK\r\ndate: now\r\ncontent-length: 2\r\ntransfer-encoding: chunked\r\n\r\n"
            b"2\r\nab\r\n0\r\n\r\n",
        ),
        ({}, start(status=204), [b""], b"HTTP/1.1 204 No Content\r\ndate: now\r\n\r\n"),
    ],
    ids=["closing", "HEAD", "in parts", "of unknown length", "in chunks", "without a body"],
)
async def test_any_other_answer_goes_as_uvicorn_sends_it(
    recorder: Recorder, options: dict[str, Any], begin: dict[str, Any], bodies: list[bytes], whole: bytes
) -> None:
    cycle = cycle_on(recorder, **options)
    cycle.more_body = False
    await cycle.send(begin)
    for data in bodies:
        await cycle.send(body(data, more=data is not bodies[-1]))
    assert b"".join(recorder.written) == whole
    assert cycle.response_complete
    assert recorder.closed is (options == {"keep_alive": False})


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


@pytest.mark.parametrize("value", [b"1\r\nset-cookie: a", b"1\n", b"1\r", b"1\0"])
async def test_a_header_can_not_end_its_line(recorder: Recorder, value: bytes) -> None:
    cycle = cycle_on(recorder)
    await cycle.send(start((b"content-length", b"2"), (b"x-one", value)))
    with pytest.raises(RuntimeError, match="Invalid HTTP header value"):
        await cycle.send(body(b"ab"))
    assert recorder.written == []


async def test_a_length_that_is_not_the_bodys_is_an_error(recorder: Recorder) -> None:
    cycle = cycle_on(recorder)
    await cycle.send(START)
    with pytest.raises(RuntimeError, match="longer than Content-Length"):
        await cycle.send(body(b"abc"))


async def test_a_client_that_has_left_is_written_nothing(recorder: Recorder) -> None:
    cycle = cycle_on(recorder)
    await cycle.send(START)
    cycle.disconnected = True
    await cycle.send(body(b"ab"))
    assert recorder.written == []


async def test_an_answer_waits_while_the_client_does_not_read(recorder: Recorder) -> None:
    cycle = cycle_on(recorder)
    cycle.flow.pause_writing()
    await cycle.send(START)
    sending = asyncio.create_task(cycle.send(body(b"ab")))
    await asyncio.sleep(0)
    assert recorder.written == []
    cycle.flow.resume_writing()
    await sending
    assert recorder.written == [WHOLE]


async def test_an_answer_begins_with_its_head(recorder: Recorder) -> None:
    with pytest.raises(RuntimeError, match=r"begins with http\.response\.start"):
        await cycle_on(recorder).send(body(b"ab"))


async def test_head_requests_and_pipelined_ones_are_answered(tmp_path: Path) -> None:
    async with running(tmp_path) as run:
        reader, writer = await run.connect()
        request = b"%s /health/live HTTP/1.1\r\nHost: x\r\n\r\n"
        writer.write(request % b"HEAD" + request % b"GET")
        async with asyncio.timeout(10):
            assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200")
        assert (await read_answer(reader))[2] == b'{"status":"live"}'
