"""Decode processes that are killed, stopped, or can't be started: no image but theirs is lost, and no place."""

import asyncio
import os
import resource
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import pytest

from service.decoding import decode_process, process_pool
from service.decoding.decode_process import DECODED, REPLY, Job, Limits
from service.decoding.process_pool import MODULE, ProcessEndedError, ProcessPool, Reply, environment, launch
from service.settings import Settings
from tests.imaging.files import encode, pixels
from tests.service.decoding.test_decoder import LARGE, until

ARRAY = pixels()
FILE = encode(ARRAY, "TIFF")
JOB = Job(ARRAY.shape[:2], "center", "bicubic", Settings().image_formats, 10**8, 10**8, 10**8)
LIMITS = Limits(memory_bytes=1 << 30, cpu_s=30, wall_s=60)


@asynccontextmanager
async def pool_of(count: int) -> AsyncIterator[tuple[ProcessPool, list[str]]]:
    reasons: list[str] = []
    pool = ProcessPool(count, LIMITS, reasons.append)
    await pool.start()
    try:
        yield pool, reasons
    finally:
        pool.close()


def pids(pool: ProcessPool) -> list[int]:
    return [process.pid for process in pool.processes if process.is_alive]


def check(reply: Reply) -> None:
    assert (reply.kind, reply.pixels, reply.payload) == (DECODED, ARRAY.size // 3, ARRAY.tobytes())


def is_gone(pid: int) -> bool:
    """Whether there is no such process, not even a zombie."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


async def test_one_that_is_killed_over_an_image_fails_that_alone() -> None:
    async with pool_of(2) as (pool, reasons):
        first, second = pids(pool)
        for pid in (first, second):
            os.kill(pid, signal.SIGSTOP)
        images = [asyncio.create_task(pool.run(JOB, FILE)) for _ in range(4)]  # two of them in the processes
        await asyncio.sleep(0.05)
        os.kill(first, signal.SIGKILL)
        await until(lambda: any(image.done() for image in images))
        os.kill(second, signal.SIGCONT)
        outcomes = await asyncio.gather(*images, return_exceptions=True)
        errors = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
        assert [type(error) for error in errors] == [ProcessEndedError]
        for outcome in outcomes:
            if isinstance(outcome, Reply):
                check(outcome)
        await until(lambda: len(pids(pool)) == 2)
        assert reasons == ["died"]
        assert is_gone(first)


async def test_one_that_is_killed_while_it_is_idle_fails_nothing() -> None:
    async with pool_of(2) as (pool, reasons):
        before = pids(pool)
        for pid in before:
            os.kill(pid, signal.SIGKILL)
        await until(lambda: len(reasons) == 2)
        for _ in range(4):
            check(await pool.run(JOB, FILE))
        assert not set(before) & set(pids(pool))


async def test_what_a_terminal_or_a_service_manager_sends_ends_none() -> None:
    async with pool_of(1) as (pool, reasons):
        (pid,) = pids(pool)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            os.kill(pid, number)
        check(await pool.run(JOB, FILE))
        assert (pids(pool), reasons) == ([pid], [])


async def test_an_image_that_nobody_waits_for_is_finished_or_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    async with pool_of(1) as (pool, reasons):
        monkeypatch.setattr(process_pool, "ABANDONED_TIMEOUT_S", 60)
        for image in (FILE, LARGE):
            work = asyncio.create_task(pool.run(JOB, image))
            await asyncio.sleep(0.01)
            work.cancel()
        check(await pool.run(JOB, FILE))
        assert reasons == []
        monkeypatch.setattr(process_pool, "ABANDONED_TIMEOUT_S", 0.05)
        os.kill(pids(pool)[0], signal.SIGSTOP)  # it hangs, where no timer of its own runs
        work = asyncio.create_task(pool.run(JOB, FILE))
        await asyncio.sleep(0.01)
        work.cancel()
        check(await pool.run(JOB, FILE))
        assert reasons == ["abandoned"]


async def test_one_that_is_killed_while_its_reply_is_on_the_way_gets_no_other_image() -> None:
    async with pool_of(1) as (pool, reasons):
        (process,) = pool.processes
        work = asyncio.create_task(pool.run(JOB, FILE))
        await asyncio.sleep(0)
        assert process._reply is not None
        time.sleep(1)  # noqa: ASYNC251 - the loop reads nothing, and the reply is there
        process._is_abandoned = True  # as the timer of `abandon` does
        process.kill()
        work.cancel()
        check(await pool.run(JOB, FILE))
        assert reasons == ["abandoned"]


async def test_where_no_process_can_be_started_images_wait_until_one_can(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_pool, "RESTART_DELAY_S", 0.01)
    async with pool_of(1) as (pool, reasons):
        refusals = 0

        def refuse(*arguments: object, **options: object) -> None:
            nonlocal refusals
            refusals += 1
            raise BlockingIOError("Resource temporarily unavailable")  # EAGAIN, as fork has it

        with monkeypatch.context() as patch:
            patch.setattr(subprocess, "Popen", refuse)
            os.kill(pids(pool)[0], signal.SIGKILL)
            await until(lambda: not pids(pool))
            image = asyncio.create_task(pool.run(JOB, FILE))
            await until(lambda: refusals > 3)
            assert not image.done()
        check(await image)
        assert (len(pids(pool)), reasons) == (1, ["died"])


async def test_a_start_that_fails_says_so_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_pool, "MODULE", "service.decoding.no_such_module")
    pool = ProcessPool(2, LIMITS, lambda reason: None)
    with pytest.raises(OSError, match="ended while it started"):
        await pool.start()
    assert pool.processes == set()


async def test_what_is_closed_is_gone() -> None:
    async with pool_of(2) as (pool, reasons):
        started = pids(pool)
        image = asyncio.create_task(pool.run(JOB, LARGE))
        await asyncio.sleep(0.01)
    image.cancel()
    assert all(map(is_gone, started))
    await asyncio.sleep(0.05)
    assert (reasons, pids(pool)) == ([], [])


async def test_a_process_that_says_what_it_should_not_is_ended() -> None:
    async with pool_of(1) as (pool, reasons):
        (process,) = pool.processes
        process.data_received(b"\xff" * 100)
        await until(lambda: reasons == ["died"])
        check(await pool.run(JOB, FILE))


async def test_what_libraries_say_about_files_is_not_logged(capfd: pytest.CaptureFixture[str]) -> None:
    whole = encode(ARRAY, "TIFF", compression="tiff_adobe_deflate")
    samples = whole.index(struct.pack("<HHI", 277, 3, 1)) + 8
    async with pool_of(1) as (pool, _):
        for file in (
            whole[:30] + b"damaged " + whole[38:],  # libtiff writes by itself
            whole[:samples] + struct.pack("<H", 9999) + whole[samples + 2 :],  # Pillow logs and warns
        ):
            assert (await pool.run(JOB, file)).kind != DECODED
    assert capfd.readouterr().err == ""


def test_an_error_of_the_program_itself_is_logged(capfd: pytest.CaptureFixture[str]) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        process = launch(theirs.fileno(), LIMITS)
        assert len(ours.recv(REPLY.size)) == REPLY.size  # it is ready
        ours.sendall(decode_process.JOB.pack(2, 0) + b"[]")
        assert process.wait(60) == 1
    assert "Traceback" in capfd.readouterr().err


async def test_one_ends_with_the_service_however_that_ends() -> None:
    program = (
        "import asyncio, sys\n"
        "from service.decoding.decode_process import Limits\n"
        "from service.decoding.process_pool import ProcessPool\n"
        "async def main():\n"
        "    pool = ProcessPool(2, Limits(1 << 30, 30, 60), print)\n"
        "    await pool.start()\n"
        "    print(*(process.pid for process in pool.processes), flush=True)\n"
        "    await asyncio.sleep(600)\n"
        "asyncio.run(main())\n"
    )
    root = Path(__file__).parents[3]
    command = [sys.executable, "-c", program]
    parent = await asyncio.create_subprocess_exec(*command, cwd=root, stdout=asyncio.subprocess.PIPE)
    assert parent.stdout is not None
    children = [int(word) for word in (await parent.stdout.readline()).split()]
    assert len(children) == 2
    parent.kill()
    await parent.wait()
    # Nobody here is their parent: they are gone, or wait for whoever is.
    await until(lambda: all(state(child) == "Z" for child in children))


def address_space(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[0]) * resource.getpagesize()


def state(pid: int) -> str:
    """The state that ps shows; that of a zombie for one that is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "Z"


def test_a_process_has_no_settings_and_few_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PERCEIVER_API_KEYS", "secret")
    assert not [name for name in environment() if name.startswith("PERCEIVER_")]
    program = f"import sys, {MODULE}; print(*sys.modules)"
    command = [sys.executable, "-P", "-c", program]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=True, timeout=60)
    packages = {name.partition(".")[0] for name in done.stdout.split()}
    assert {"imaging", "PIL", "simplejpeg", "numpy"} <= packages
    assert not packages & {"onnxruntime", "fastapi", "starlette", "uvicorn", "pydantic", "prometheus_client", "msgspec"}


@pytest.mark.skipif(sys.platform != "linux", reason="Linux alone limits a process's memory")
async def test_memory_is_limited_beyond_what_a_process_has() -> None:
    async with pool_of(1) as (pool, _):
        (pid,) = pids(pool)
        soft, _ = resource.prlimit(pid, resource.RLIMIT_AS)
        used = address_space(pid)
        assert abs(soft - used - LIMITS.memory_bytes) < 8 << 20
        np.testing.assert_array_equal(np.frombuffer((await pool.run(JOB, FILE)).payload, np.uint8), ARRAY.ravel())
