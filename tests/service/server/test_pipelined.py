"""What comes on a connection behind a request that is being answered."""

import asyncio
from pathlib import Path

import pytest

from service.server.response_cycle import AsgiCycle
from tests.fakes import FakeEngine
from tests.service.harness import error_of, png, read_answer, request_head, running

SMALL = request_head(len(png(1))) + png(1)
CHUNKED = request_head(None, "Transfer-Encoding: chunked") + b"%x\r\n%b\r\n0\r\n\r\n" % (len(png(1)), png(1))
LIVE = request_head(None, target="/health/live", method="GET")


@pytest.mark.parametrize("first", [SMALL, CHUNKED, LIVE], ids=["direct", "asgi", "route"])
async def test_what_is_pipelined_is_dropped_and_the_first_answer_closes_the_connection(
    tmp_path: Path, first: bytes
) -> None:
    async with running(tmp_path) as run:
        reader, writer = await run.connect()
        writer.write(first + SMALL + SMALL)
        status, headers, _ = await read_answer(reader)
        assert (status, headers["connection"]) == (200, "close")
        assert await reader.read() == b""
        assert len(run.engine.batches) == (first is not LIVE)


async def test_what_waits_behind_a_request_takes_no_memory(tmp_path: Path) -> None:
    engine = FakeEngine()
    async with running(tmp_path, engine) as run:
        engine.hold()
        reader, writer = await run.connect()
        writer.write(SMALL)
        await run.until(lambda: engine.batches == [[1]])
        for _ in range(20):
            writer.write(bytes(100_000))
            await writer.drain()
        assert run.service.admission.bytes == len(png(1))
        engine.let_go()
        assert (await read_answer(reader))[0] == 200


@pytest.mark.parametrize("late", [0, 10], ids=["in one read", "in two"])
async def test_who_leaves_with_a_request_behind_is_not_run(tmp_path: Path, late: int) -> None:
    engine = FakeEngine()
    async with running(tmp_path, engine) as run:
        held = await run.hold_first()
        _, writer = await run.connect()
        writer.write(SMALL[: len(SMALL) - late])
        await run.until(lambda: run.in_flight == 2)
        writer.write(SMALL[len(SMALL) - late :] + LIVE)
        await run.until(lambda: run.service.queue_length == 1)
        writer.close()
        await run.assert_first_alone_ran(held)
        assert await run.metric('perceiver_requests_total{code="499",route="/predict"}') == 1


@pytest.mark.parametrize("first", [SMALL, CHUNKED, LIVE], ids=["direct", "asgi", "route"])
@pytest.mark.parametrize("rest", [b"\x00", b"junk\r\n\r\n", request_head(None, target="/predict", method="G@T")])
async def test_a_whole_request_is_answered_before_what_can_not_be_read(
    tmp_path: Path, first: bytes, rest: bytes
) -> None:
    async with running(tmp_path) as run:
        reader, writer = await run.connect()
        writer.write(first + rest)
        assert (await read_answer(reader))[0] == 200
        if rest == b"\x00":  # one byte that no request begins with
            status, headers, body = await read_answer(reader)
            assert (status, error_of(body), headers["connection"]) == (400, "bad_request", "close")
        await reader.read()
        assert reader.at_eof()
        code = 'perceiver_requests_total{code="499",route="/predict"}'
        assert await run.metric(code) == 0


async def test_what_comes_between_head_and_body_of_a_response_is_dropped_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    send = AsgiCycle.send

    async def send_and_receive(cycle: AsgiCycle, message: dict[str, object]) -> None:
        connection = cycle.connection
        await send(cycle, message)
        if message["type"] == "http.response.start":
            connection.data_received(LIVE)  # type: ignore[union-attr]

    monkeypatch.setattr(AsgiCycle, "send", send_and_receive)
    async with running(tmp_path) as run:
        reader, writer = await run.connect()
        writer.write(LIVE)
        assert (await read_answer(reader))[0] == 200
        async with asyncio.timeout(10):
            assert await reader.read() == b""
