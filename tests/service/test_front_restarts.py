"""Processes of their own for HTTP that end, hang or can't start, and others in their place."""

import asyncio
import os
import signal
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import httpx
import pytest
import uvloop
from starlette.types import ASGIApp

from service import asks, front_processes, front_start
from service.front_peer import FrontProcess
from service.front_processes import FrontProcesses
from service.state import Service
from tests.fakes import FakeEngine
from tests.service.harness import png, read_answer, running
from tests.service.test_admission import Clock
from tests.service.test_front_processes import pids, settings, spread


async def test_a_process_that_is_killed_takes_its_clients_along_and_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = FakeEngine()
    async with running(tmp_path, engine, http_processes=2) as run:
        first = await run.hold_first()
        readers = await spread(run)
        await run.until(lambda: run.service.queue_length == 24)
        mine = run.fronts._ledger.read(0, 0)  # type: ignore[union-attr]
        os.kill(pids(run)[0], signal.SIGKILL)
        assert run.fronts is not None
        await run.until(lambda: run.service.house.pictures == 25 - mine)
        engine.let_go()
        answered = 0
        for reader in readers:
            with suppress(asyncio.IncompleteReadError, ConnectionResetError):
                answered += (await read_answer(reader))[0] == 200
        is_first_lost = isinstance((await asyncio.gather(first, return_exceptions=True))[0], httpx.HTTPError)
        assert answered + (not is_first_lost) == 25 - mine
        ran = sum(map(len, engine.batches))
        assert ran == 25 - mine + is_first_lost  # the first ran already; the others of the dead process did not
        await run.until(lambda: all(front.is_listening.is_set() for front in run.fronts._fronts), 30)
        assert await run.metric("perceiver_http_process_restarts_total") == 1
        assert [(await read_answer(reader))[0] for reader in await spread(run)] == [200] * 24
        assert run.service.house.pictures == 0


async def test_a_process_that_hangs_is_killed_and_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(front_processes, "HANG_SECONDS", 0.5)
    monkeypatch.setattr(asks, "PATIENCE_SECONDS", 0.1)
    monkeypatch.setattr(front_processes, "ASK_SECONDS", 0.1)
    async with running(tmp_path, http_processes=1) as run:
        (hung,) = pids(run)
        os.kill(hung, signal.SIGSTOP)
        await run.until(lambda: pids(run) not in ([hung], []), 20)
        assert run.fronts is not None
        await run.until(lambda: run.fronts._fronts[0].is_listening.is_set(), 30)
        assert (await run.predict()).status_code == 200


async def test_processes_that_can_not_start_fail_the_service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(front_processes, "FIRST_PAUSE_SECONDS", 0.01)
    async with running(tmp_path, http_processes=1) as run:
        monkeypatch.setattr(front_start.sys, "executable", "/bin/false")
        os.kill(pids(run)[0], signal.SIGKILL)
        await run.until(lambda: run.service.failure != "")
        assert run.service.failure.startswith("the HTTP process 0 ended 3 times before it could listen: has ended with")


def test_a_process_that_ends_at_once_is_one_that_can_not_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the event loop of production, whose pipes fail in their own way; many times, since it is a race."""
    monkeypatch.setattr(front_processes, "FIRST_PAUSE_SECONDS", 0)
    monkeypatch.setattr(front_processes, "MOST_FAILURES", 40)

    async def fail_to_start() -> str:
        async with running(tmp_path, http_processes=1) as run:
            monkeypatch.setattr(front_start.sys, "executable", "/bin/false")
            os.kill(pids(run)[0], signal.SIGKILL)
            await run.until(lambda: run.service.failure != "")
            return run.service.failure

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        assert runner.run(fail_to_start()).startswith("the HTTP process 0 ended 40 times before it could listen: ")


async def test_a_process_that_can_not_be_replaced_leaves_its_clients_to_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(front_processes, "FIRST_PAUSE_SECONDS", 0.01)
    async with running(tmp_path, http_processes=2) as run:
        monkeypatch.setattr(front_start.sys, "executable", str(tmp_path / "nowhere"))
        os.kill(pids(run)[0], signal.SIGKILL)
        restarts = run.service.metrics.http_process_restarts._value
        await run.until(lambda: restarts.get() >= front_processes.MOST_FAILURES + 1)
        assert run.service.failure == ""
        assert [(await read_answer(reader))[0] for reader in await spread(run)] == [200] * 24
        assert "the HTTP process 0 could not be started: [Errno 2]" in caplog.text
        monkeypatch.undo()
        await run.until(lambda: len(pids(run)) == 2)


async def test_a_process_that_ends_while_the_service_leaves_is_neither_replaced_nor_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with running(tmp_path, http_processes=1) as run:
        assert run.fronts is not None
        run.service.leaving = True
        os.kill(pids(run)[0], signal.SIGKILL)
        await run.until(lambda: run.fronts._tasks[0].done())
        assert pids(run) == []
        assert run.service.metrics.http_process_restarts._value.get() == 0
        assert "is started anew" not in caplog.text
        assert run.service.failure == ""


async def test_a_process_that_takes_the_place_of_another_has_the_settings_of_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(tmp_path, http_processes=1, api_keys="secret") as run:
        monkeypatch.setenv("PERCEIVER_API_KEYS_FILE", str(tmp_path / "gone"))
        monkeypatch.setenv("PERCEIVER_ADMIN_KEY", "not a key")
        (killed,) = pids(run)
        os.kill(killed, signal.SIGKILL)
        await run.until(lambda: pids(run) not in ([killed], []), 20)
        assert run.fronts is not None
        await run.until(lambda: run.fronts._fronts[0].is_listening.is_set(), 30)
        assert (await run.client.post("/predict", content=png(1))).status_code == 401
        keyed = await run.client.post("/predict", content=png(1), headers={"x-api-key": "secret"})
        assert keyed.status_code == 200


async def test_a_reload_goes_on_when_the_process_that_asked_ends(tmp_path: Path) -> None:
    async with running(tmp_path, http_processes=1, admin_key="root") as run:
        (tmp_path / "1").rename(tmp_path / "2")
        store = run.service.store
        async with store._reloading:  # so that the request waits
            _, writer = await run.connect()
            writer.write(b"POST /models/reload HTTP/1.1\r\nhost: a\r\nx-api-key: root\r\ncontent-length: 0\r\n\r\n")
            assert run.fronts is not None
            await run.until(lambda: len(run.fronts._fronts[0]._calls) == 1)
            os.kill(pids(run)[0], signal.SIGKILL)
            await run.until(lambda: not run.fronts._fronts[0].is_listening.is_set())
        await run.until(lambda: store.live is not None and store.live.version == 2)


async def test_what_a_process_held_that_was_killed_is_retired_all_the_same(tmp_path: Path) -> None:
    async with running(tmp_path, http_processes=1, admin_key="root") as run:
        assert run.fronts is not None
        (front,) = run.fronts._fronts
        front.kill()
        await run.until(lambda: not front.is_listening.is_set())
        await run.until(front.is_listening.is_set, 30)
        (tmp_path / "1").rename(tmp_path / "2")
        assert (await run.client.post("/models/reload", headers={"x-api-key": "root"})).json()["live"] == 2
        await run.until(lambda: not run.service.store._retiring)


async def test_a_process_that_does_not_come_to_listen_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(front_processes, "ASK_SECONDS", 0.05)
    sleeper = tmp_path / "sleeper"
    sleeper.write_text("#!/bin/sh\nexec sleep 600\n")
    sleeper.chmod(0o755)
    async with running(tmp_path / "m", http_processes=1) as run:
        monkeypatch.setattr(front_processes, "START_SECONDS", 0.5)
        monkeypatch.setattr(front_start.sys, "executable", str(sleeper))
        os.kill(pids(run)[0], signal.SIGKILL)
        await run.until(lambda: "the HTTP process 0 has hung for 0.5 s; it is killed" in caplog.text)
        await run.until(lambda: caplog.text.count("the HTTP process 0 has ended with status -9") >= 2)


async def test_pauses_before_a_process_is_started_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    service = Service(settings(model_dir=tmp_path))
    fronts = FrontProcesses(service, cast("ASGIApp", None), [], 1)
    (front,) = fronts._fronts
    front.has_listened = True
    clock = Clock()
    lives, pauses = [1, 1, 60, 1, 1, 1, 1, 61, 1, 1], list[float]()

    async def live(one: FrontProcess) -> str:
        clock.now += lives.pop(0)
        service.draining = not lives
        return "has ended"

    async def sleep(seconds: float) -> None:
        pauses.append(seconds)

    monkeypatch.setattr(fronts, "_run", live)
    monkeypatch.setattr(front_processes, "time", SimpleNamespace(monotonic=clock))
    monkeypatch.setattr(front_processes, "asyncio", SimpleNamespace(sleep=sleep))
    await fronts._keep(front)
    assert pauses == [0.2, 0.4, 0.8, 1.6, 3.2, 5, 5, 0.1, 0.2]
