"""Requests that wait on a connection behind the one that is answered: how much of them is read, and who leaves."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from service.server.connections import MOST_WAITING_BYTES
from tests.fakes import FakeEngine
from tests.service.harness import Running, png, read_answer, request_head, running

SMALL = request_head(len(png(1))) + png(1)
LARGE = request_head(200_000) + bytes(200_000)  # no image
LIVE = request_head(None, target="/health/live", method="GET")
ONE_READ = 256 * 1024  # asyncio's; uvloop's is a little less


async def busy_connection(run: Running) -> Any:
    """The server's side of the only connection that has something to do."""
    connections = run.server.server_state.connections
    await run.until(lambda: any(connection._is_working() for connection in connections))
    (connection,) = (each for each in connections if each._is_working())
    return connection


async def test_what_waits_is_bounded_in_bytes_however_many_were_answered(tmp_path: Path) -> None:
    engine, answered = FakeEngine(), 10
    async with running(tmp_path, engine) as run:
        engine.hold()
        reader, writer = await run.connect()
        writer.write(SMALL * (answered + 1) + LARGE * 20)
        for number in range(answered):  # each of them asks for more of the connection when its turn has come
            await run.until(lambda number=number: len(engine.batches) == number + 1)
            engine.release()
        await run.until(lambda: len(engine.batches) == answered + 1)
        connection = await busy_connection(run)
        await run.until(lambda: connection.flow.read_paused)
        await asyncio.sleep(0.2)  # in which the guard of the held one begins to look for the client's leaving
        assert connection.flow.read_paused
        assert sum(len(cycle.body) for cycle, _ in connection.pipeline) <= MOST_WAITING_BYTES + ONE_READ
        engine.let_go()
        statuses = [(await read_answer(reader))[0] for _ in range(answered + 1 + 20)]
        assert statuses == [200] * (answered + 1) + [400] * 20
        assert not connection.flow.read_paused


@pytest.mark.parametrize("late", [0, 10], ids=["short way", "long way"])
async def test_who_leaves_with_a_request_behind_is_not_run(tmp_path: Path, late: int) -> None:
    engine = FakeEngine()
    async with running(tmp_path, engine) as run:
        held = await run.hold_first()
        _, writer = await run.connect()
        writer.write(SMALL[: len(SMALL) - late])
        await run.until(lambda: run.in_flight == 2)
        writer.write(SMALL[len(SMALL) - late :] + LIVE)
        await run.until(lambda: any(connection.pipeline for connection in run.server.server_state.connections))
        writer.close()
        await run.assert_first_alone_ran(held)
        assert await run.metric('perceiver_requests_total{code="499",route="/predict"}') == 1


async def test_who_leaves_with_too_much_behind_is_found_out_with_the_answer(tmp_path: Path) -> None:
    engine = FakeEngine()
    async with running(tmp_path, engine) as run:
        engine.hold()
        _, writer = await run.connect()
        writer.write(SMALL + LARGE * 5)
        connection = await busy_connection(run)
        await run.until(lambda: connection.flow.read_paused)
        writer.transport.abort()
        await run.until(lambda: engine.batches == [[1]])
        engine.let_go()
        await run.until(lambda: connection not in run.server.server_state.connections)
        assert run.in_flight == 0


async def test_a_large_body_that_waits_is_read_on_when_its_turn_comes(tmp_path: Path) -> None:
    engine = FakeEngine()
    async with running(tmp_path, engine) as run:
        engine.hold()
        reader, writer = await run.connect()
        writer.write(SMALL + request_head(2_000_000) + bytes(2_000_000) + SMALL)
        connection = await busy_connection(run)
        await run.until(lambda: connection.flow.read_paused)
        engine.let_go()
        assert [(await read_answer(reader))[0] for _ in range(3)] == [200, 400, 200]


async def test_the_heads_of_what_waits_count_too(tmp_path: Path) -> None:
    engine = FakeEngine()
    async with running(tmp_path, engine) as run:
        engine.hold()
        reader, writer = await run.connect()
        writer.write(SMALL)
        connection = await busy_connection(run)
        for number in range(1, 5):
            assert not connection.flow.read_paused
            writer.write(request_head(None, "X-Filler: " + "x" * 20_000, target="/health/live", method="GET"))
            await run.until(lambda number=number: len(connection.pipeline) == number)
        assert connection.flow.read_paused
        engine.let_go()
        assert [(await read_answer(reader))[0] for _ in range(5)] == [200] * 5
