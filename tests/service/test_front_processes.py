"""Processes of their own for HTTP: what they share, and what happens when one of them ends."""

import asyncio
import os
import signal
import socket
from contextlib import suppress
from pathlib import Path

import pytest

from service import asks, front_processes
from service.settings import Settings
from service.sockets import bound, reserve
from tests.fakes import FakeEngine
from tests.service.harness import Running, png, read_answer, request_head, running


def pids(run: Running) -> list[int]:
    assert run.fronts is not None
    return list(run.fronts.pids().values())


async def spread(run: Running, connections: int = 24) -> list[asyncio.StreamReader]:
    """Post a picture over so many connections; both of two processes have some of them but once in eight million."""
    readers = []
    for _ in range(connections):
        reader, writer = await run.connect()
        writer.write(request_head(len(png(1))) + png(1))
        readers.append(reader)
    return readers


async def test_pictures_of_several_processes_meet_in_one_batch(tmp_path: Path) -> None:
    engine = FakeEngine(max_batch_size=32)
    async with running(tmp_path, engine, http_processes=2) as run:
        first = await run.hold_first()
        readers = await spread(run)
        await run.until(lambda: run.service.house.pictures == 25)
        rows = [run.fronts._ledger.read(row, 0) for row in range(2)]  # type: ignore[union-attr]
        assert min(rows) > 0
        await run.until(lambda: run.service.queue_length == 24)
        engine.release(2)
        assert [(await read_answer(reader))[0] for reader in readers] == [200] * 24
        assert (await first).status_code == 200
        assert engine.batches[1] == [1] * 24


async def test_every_process_counts_and_a_scrape_has_all_of_it(tmp_path: Path) -> None:
    async with running(tmp_path, http_processes=2) as run:
        for reader in await spread(run):
            assert (await read_answer(reader))[0] == 200
        assert (await run.client.post("/predict", content=b"junk")).status_code == 400
        assert await run.metric('perceiver_requests_total{code="200",route="/predict"}') == 24
        assert await run.metric('perceiver_requests_total{code="400",route="/predict"}') == 1
        assert await run.metric('perceiver_rejections_total{reason="not_an_image"}') == 1
        assert await run.metric("perceiver_request_seconds_count") == 25
        assert await run.metric("perceiver_decode_seconds_count") == 24
        assert await run.metric("perceiver_pictures_total") == 24
        assert await run.metric("perceiver_http_processes") == 2
        await run.client.get("/no/such/path")
        assert await run.metric('perceiver_requests_total{code="404",route="other"}') == 1


async def test_what_each_process_takes_is_told(tmp_path: Path) -> None:
    async with running(tmp_path, http_processes=2) as run:
        for process in ("0", "1"):
            of_it = f'{{process="{process}"}}'
            async with asyncio.timeout(60):  # counted in hundredths of a second: a new process may have taken none
                while not await run.metric(f"perceiver_http_process_cpu_seconds_total{of_it}") > 0:
                    await run.client.get("/health")
            assert await run.metric(f"perceiver_http_process_resident_memory_bytes{of_it}") > 10 * 2**20
            assert await run.metric(f"perceiver_http_process_open_fds{of_it}") > 3
        assert (await run.client.get("/metrics", headers={"accept": "application/openmetrics-text"})).status_code == 200


async def test_connections_are_bounded_over_all_processes(tmp_path: Path) -> None:
    async with running(tmp_path, http_processes=2, max_connections=5) as run:
        readers = []
        for number in range(8):
            reader, writer = await run.connect()
            if number >= 5:
                writer.write(request_head(None, target="/models", method="GET"))
            readers.append(reader)
            # One after the other: two processes that count at the same time may both refuse.
            await run.until(lambda: run.connections >= min(number + 1, 5))  # noqa: B023 - awaited at once
        async with asyncio.timeout(10):
            refused = 0
            for reader in readers:
                with suppress(TimeoutError):
                    async with asyncio.timeout(0.5):
                        refused += b"503" in await reader.readline()
        assert refused == 3
        for writer in run.writers:
            writer.close()
        await run.until(lambda: run.connections == 0)


async def test_a_scrape_does_not_wait_for_a_process_that_hangs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(asks, "PATIENCE_SECONDS", 0.2)
    async with running(tmp_path, http_processes=1) as run:
        assert run.fronts is not None
        (pid,) = pids(run)
        os.kill(pid, signal.SIGSTOP)
        try:
            async with asyncio.timeout(5):
                await asyncio.gather(*(run.fronts.ask_all() for _ in range(3)))
            assert caplog.text.count("the HTTP process 0 takes long to answer") == 1
            monkeypatch.setattr(asks, "QUIET_SECONDS", 0)  # as a minute later
            await run.fronts.ask_all()
            assert caplog.text.count("the HTTP process 0 takes long to answer") > 1
        finally:
            os.kill(pid, signal.SIGCONT)
        assert await run.metric("perceiver_http_processes") == 1


async def test_who_asks_at_the_same_time_is_answered_at_the_same_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(asks, "PATIENCE_SECONDS", 1000)
    async with running(tmp_path, http_processes=1) as run:
        assert run.fronts is not None
        (front,) = run.fronts._fronts

        async def ask_after(turns: int) -> None:
            for _ in range(turns):
                await asyncio.sleep(0)
            await front.ask()

        async with asyncio.timeout(20):
            await asyncio.gather(*(ask_after(turns) for turns in range(100)))
        assert front._asks._open == {}


async def test_who_asks_a_process_that_ends_waits_no_longer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(asks, "PATIENCE_SECONDS", 1000)
    monkeypatch.setattr(front_processes, "ASK_SECONDS", 1000)  # else the one in its place would be asked, and answer
    async with running(tmp_path, http_processes=1) as run:
        assert run.fronts is not None
        (pid,) = pids(run)
        os.kill(pid, signal.SIGSTOP)
        asked = asyncio.create_task(run.fronts.ask_all())
        await asyncio.sleep(0)
        os.kill(pid, signal.SIGKILL)
        async with asyncio.timeout(20):
            await asked
        assert "takes long" not in caplog.text


async def test_every_process_is_told_how_long_a_drain_may_take(tmp_path: Path) -> None:
    async with running(tmp_path, http_processes=2) as run:
        assert run.fronts is not None
        run.fronts.drain(60)
        told = [front._told for front in run.fronts._fronts]
        assert all(one is not None and one.status == "draining" and one.drain_seconds > 50 for one in told)
        await run.until(lambda: not run.fronts.is_running)  # idle, so at once
        assert run.service.failure == ""


async def test_a_model_that_is_swapped_is_retired_when_no_process_holds_it_any_more(tmp_path: Path) -> None:
    engine = FakeEngine()
    async with running(tmp_path, engine, http_processes=2, admin_key="root") as run:
        old = run.service.store.live
        assert old is not None
        waits = await run.hold_first()
        (tmp_path / "1").rename(tmp_path / "2")  # the same files, and so another version
        engine.let_go()
        assert (await run.client.post("/models/reload", headers={"x-api-key": "root"})).json()["live"] == 2
        assert (await waits).json()["version"] == 1
        await run.until(lambda: not run.service.store._retiring)
        assert {(await run.predict()).json()["version"] for _ in range(5)} == {2}


async def test_the_last_counts_of_a_process_are_not_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(front_processes, "ASK_SECONDS", 1000)
    async with running(tmp_path, http_processes=1) as run:
        assert run.fronts is not None
        assert (await run.predict()).status_code == 200
        run.fronts.drain(60)
        await run.until(lambda: not run.fronts.is_running)
        exposition = run.service.metrics.exposition("")[0].decode()
        assert 'perceiver_requests_total{code="200",route="/predict"} 1.0' in exposition


# Listening


def settings(**values: object) -> Settings:
    return Settings.model_validate({"port": 0} | values)


def test_an_address_that_is_taken_can_be_shared_and_gets_no_connection_itself() -> None:
    (taken,) = reserve(settings())
    with taken, bound(taken.family, taken.getsockname(), shared=True) as one:
        one.listen()
        one.setblocking(False)
        for _ in range(20):
            with socket.create_connection(one.getsockname()):
                one.accept()[0].close()


@pytest.mark.parametrize("shared", [False, True])
def test_a_port_that_another_service_has_is_refused_even_where_it_could_be_shared(shared: bool) -> None:
    with bound(2, ("127.0.0.1", 0), shared=shared) as other:
        other.listen()
        with pytest.raises(OSError, match="already in use"):
            reserve(settings(port=other.getsockname()[1]))
