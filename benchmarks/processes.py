"""Runs the load in processes of its own, never in the server's, and reads the server's CPU time beside it."""

import asyncio
import multiprocessing
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing.connection import Connection

from benchmarks.client import DisconnectedError
from benchmarks.common import BenchmarkError
from benchmarks.generator import MAX_CONNECTIONS, Generator, Plan, Records, new_event_loop, split_plan

START_DELAY_S = 0.1  # time for every process to hear when to start


@dataclass(frozen=True)
class Load:
    """What was sent and answered, and the window that counts.

    Attributes:
        records: of all requests, those of the warm-up too.
        begin, end: the window, seconds of the monotonic clock.
        server_cpu_seconds: CPU time of the server within it; None where it can't be read.
    """

    records: Records
    begin: float
    end: float
    server_cpu_seconds: float | None

    @property
    def seconds(self) -> float:
        """Length of the window."""
        return self.end - self.begin


def run_load(
    plan: Plan,
    *,
    warmup_s: float = 0.0,
    processes: int = 1,
    server_cpu: Callable[[], float | None] = lambda: None,
) -> Load:
    """Run a plan in child processes.

    Args:
        plan: its arrivals, or its seconds, include the warm-up. Without either the window is all of the run.
        warmup_s: seconds at the beginning that are sent and not counted.
        processes: how many share the plan.
        server_cpu: reads the server's CPU time so far.

    Raises:
        BenchmarkError: nobody listens at that address, a process died, or there are too many connections.
    """
    parts = split_plan(plan, processes)
    if max(part.connections for part in parts) > MAX_CONNECTIONS:
        raise BenchmarkError(
            f"{plan.connections} connections: one process takes at most {MAX_CONNECTIONS}; raise --processes"
        )
    with ExitStack() as stack:
        pipes = [_start(part, stack) for part in parts]
        for pipe in pipes:
            _receive(pipe)
        start = time.monotonic() + START_DELAY_S
        for pipe in pipes:
            pipe.send(start)
        begin = start + warmup_s
        before = _read_at(begin, server_cpu)
        if plan.seconds is not None:
            after = _read_at(start + plan.seconds, server_cpu)
            end = start + plan.seconds
            records = _collect(pipes)
        else:
            records = _collect(pipes)
            end, after = max(records.ended, default=begin), server_cpu()
    return Load(records, begin, end, None if before is None or after is None else after - before)


def _start(plan: Plan, stack: ExitStack) -> Connection:
    # spawn: a fork would copy this process's threads' locks (onnxruntime's, torch's) in whatever state they are
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_main, args=(plan, theirs), daemon=True)
    process.start()
    theirs.close()
    stack.callback(_stop, process)
    return ours


def _stop(process: multiprocessing.process.BaseProcess) -> None:
    process.join(0.2)
    process.terminate()
    process.join()


def _main(plan: Plan, pipe: Connection) -> None:
    """Body of a child process."""
    try:
        with asyncio.Runner(loop_factory=new_event_loop) as runner:
            pipe.send(runner.run(_run(plan, pipe)))
    except DisconnectedError as error:
        pipe.send(error)
    except KeyboardInterrupt:
        pass  # the parent got it too and reports it


async def _run(plan: Plan, pipe: Connection) -> Records:
    generator = Generator(plan)
    await generator.connect()
    pipe.send(None)
    return await generator.run(pipe.recv())


def _receive(pipe: Connection) -> Records | None:
    try:
        message = pipe.recv()
    except EOFError:
        raise BenchmarkError("a process of the load generator died; its own message stands above") from None
    if isinstance(message, DisconnectedError):
        raise BenchmarkError(str(message))
    assert message is None or isinstance(message, Records)
    return message


def _collect(pipes: list[Connection]) -> Records:
    merged = Records()
    for pipe in pipes:
        records = _receive(pipe)
        assert records is not None
        merged.extend(records)
    return merged


def _read_at(moment: float, read: Callable[[], float | None]) -> float | None:
    time.sleep(max(0.0, moment - time.monotonic()))
    return read()
