import asyncio
from typing import Literal

import numpy as np
import pytest

from benchmarks.client import DisconnectedError
from benchmarks.common import BenchmarkError
from benchmarks.generator import Generator, Plan, Records, arrival_times, new_event_loop, split_plan
from benchmarks.processes import run_load
from tests.benchmarks.http_server import OK, always_ok, http_server, request

REQUESTS = [request(b"%d" % number) for number in range(10)]


async def send(plan: Plan) -> tuple[Records, float]:
    """Run a plan here and now; return its records and the moment it began."""
    generator = Generator(plan)
    await generator.connect()
    start = asyncio.get_running_loop().time() + 0.01
    return await generator.run(start), start


def test_even_arrivals_are_at_equal_distances() -> None:
    assert arrival_times(4, 1.5, "even").tolist() == [0, 0.25, 0.5, 0.75, 1.0, 1.25]


def test_poisson_arrivals() -> None:
    times = arrival_times(1000, 10, "poisson", seed=1)
    assert np.array_equal(times, arrival_times(1000, 10, "poisson", seed=1))
    assert not np.array_equal(times[:100], arrival_times(1000, 10, "poisson", seed=2)[:100])
    assert (np.diff(times) >= 0).all()
    assert times[0] >= 0
    assert times[-1] < 10
    assert abs(len(times) - 10_000) < 5 * 100  # five standard deviations
    gaps = np.diff(times) * 1000
    assert abs(gaps.std() - 1) < 0.05  # exponential gaps: as wide as their mean


@pytest.mark.parametrize("processes", [1, 2, 3, 9])
def test_a_split_plan_sends_every_request_once(processes: int) -> None:
    parts = split_plan(Plan("h", 1, REQUESTS, connections=5), processes)
    assert sum(part.connections for part in parts) == 5
    assert min(part.connections for part in parts) >= 1
    numbers = [number for part in parts for number in range(part.first, len(REQUESTS), part.stride)]
    assert sorted(numbers) == list(range(10))


async def test_each_request_is_sent_once_by_so_many_connections() -> None:
    async with http_server() as log:
        records, _ = await send(Plan("127.0.0.1", log.port, REQUESTS, connections=3))
    assert sorted(log.bodies) == [b"%d" % number for number in range(10)]
    assert sorted(records.number) == list(range(10))
    assert records.status == [200] * 10
    assert log.connections == 3


async def test_a_closed_loop_keeps_its_concurrency_and_ends_in_time() -> None:
    async def reply(body: bytes) -> bytes:
        await asyncio.sleep(0.01)
        return OK

    async with http_server(reply) as log:
        records, start = await send(Plan("127.0.0.1", log.port, REQUESTS, connections=4, seconds=0.15))
    assert log.most_at_once == 4
    assert len(records) > len(REQUESTS)  # the list is sent again and again
    assert max(records.scheduled) < start + 0.15
    assert records.scheduled == pytest.approx(records.sent, abs=0.01)


async def test_an_open_loop_measures_from_the_scheduled_time_while_the_server_stalls() -> None:
    release = asyncio.Event()

    async def reply(body: bytes) -> bytes:
        await release.wait()
        return OK

    arrivals = np.array([0.0, 0.01, 0.02, 0.03])
    async with http_server(reply) as log:
        plan = Plan("127.0.0.1", log.port, REQUESTS, connections=1, seconds=0.04, arrivals=arrivals)
        task = asyncio.create_task(send(plan))
        await asyncio.sleep(0.2)
        released = asyncio.get_running_loop().time()
        release.set()
        records, start = await task
    assert records.scheduled == pytest.approx((start + arrivals).tolist())
    assert log.most_at_once == 1
    waited = [ended - scheduled for ended, scheduled in zip(records.ended, records.scheduled, strict=True)]
    assert all(wait >= released - scheduled for wait, scheduled in zip(waited, records.scheduled, strict=True))
    assert min(records.sent[1:]) >= released  # they had to wait for the one connection, and that counts


async def test_an_open_loop_opens_no_more_connections_than_it_needs() -> None:
    arrivals = arrival_times(50, 0.2, "even")
    async with http_server() as log:
        await send(Plan("127.0.0.1", log.port, REQUESTS, connections=100, seconds=0.2, arrivals=arrivals))
    assert len(log.bodies) == 10
    assert log.connections < 10


async def test_what_is_not_answered_is_recorded_with_its_reason() -> None:
    never = asyncio.Event()

    async def reply(body: bytes) -> bytes:
        if body == b"0":
            return b""
        if body == b"1":
            await never.wait()
        return b"HTTP/1.1 503 Busy\r\nContent-Length: 4\r\n\r\nfull" if body == b"2" else OK

    async with http_server(reply) as log:
        records, _ = await send(Plan("127.0.0.1", log.port, REQUESTS[:4], connections=1, timeout_s=0.1))
    assert records.status == [0, 0, 503, 200]
    assert records.failure == ["disconnected", "client_timeout", "", ""]
    assert records.body == [b"", b"", b"full", b""]
    assert records.server_timing[3].startswith(b"decode")


async def test_a_client_gives_up_a_request_that_is_overdue_before_it_could_be_sent() -> None:
    async def reply(body: bytes) -> bytes:
        await asyncio.sleep(0.2)
        return OK

    async with http_server(reply) as log:
        arrivals = np.array([0.0, 0.0])
        plan = Plan("127.0.0.1", log.port, REQUESTS, connections=1, seconds=0.1, arrivals=arrivals, timeout_s=0.1)
        records, _ = await send(plan)
    assert records.failure == ["client_timeout"] * 2
    assert log.bodies == [b"0"]


async def test_bodies_are_kept_when_asked_for() -> None:
    async with http_server() as log:
        records, _ = await send(Plan("127.0.0.1", log.port, REQUESTS, connections=2, keep_bodies=True))
    assert records.body == [b"{}"] * 10


def test_the_loop_sleeps_for_less_than_a_millisecond() -> None:
    async def shortest() -> float:
        loop = asyncio.get_running_loop()
        gaps = []
        for _ in range(50):
            before = loop.time()
            await asyncio.sleep(0.0002)
            gaps.append(loop.time() - before)
        return min(gaps)  # the best of many: other work on the machine can only lengthen them

    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        assert runner.run(shortest()) < 0.001


@pytest.mark.parametrize("kind", ["closed", "open"])
async def test_child_processes_share_the_load(kind: Literal["closed", "open"]) -> None:
    readings = iter([1.0, 3.5])
    async with http_server(always_ok) as log:
        arrivals = arrival_times(100, 0.3, "even") if kind == "open" else None
        plan = Plan("127.0.0.1", log.port, REQUESTS, connections=2, seconds=0.3, arrivals=arrivals)
        load = await asyncio.to_thread(run_load, plan, warmup_s=0.1, processes=2, server_cpu=lambda: next(readings))
    assert load.seconds == pytest.approx(0.2)
    assert load.server_cpu_seconds == 2.5
    assert len(load.records) == len(log.bodies)
    assert len(set(load.records.number)) == len(load.records)
    if kind == "open":
        assert sorted(load.records.number) == list(range(30))
    assert load.records.cpu_seconds > 0


async def test_nobody_listens() -> None:
    async with http_server() as log:
        plan = Plan("127.0.0.1", log.port, REQUESTS, connections=1)
    with pytest.raises(DisconnectedError):
        await send(plan)
    with pytest.raises(BenchmarkError, match="no connection to"):
        await asyncio.to_thread(run_load, plan)


def test_more_connections_than_select_can_watch() -> None:
    with pytest.raises(BenchmarkError, match="at most 900; raise --processes"):
        run_load(Plan("127.0.0.1", 1, REQUESTS, connections=1000))
