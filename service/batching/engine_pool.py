"""What a batcher has one of for each engine, and which of them takes the next batch."""

import asyncio
from collections.abc import Callable, Sequence
from functools import partial
from math import ceil
from typing import TypeVar

from service.batching.queue import Batch
from service.engine.onnx_engine import Engine
from service.engine.thread import EngineThread

T = TypeVar("T")


class PooledEngine:
    """An engine, its thread, and the batch it runs."""

    def __init__(self, engine: Engine, name: str) -> None:
        self.engine = engine
        self.name = name
        self.thread = EngineThread(name)
        self.batch: Batch | None = None
        self.watchdog: asyncio.TimerHandle | None = None
        self.hung = False
        self.failures = 0  # in a row


class EnginePool:
    """The members of a batcher. Belongs to one event loop.

    Args:
        engines: of one model; at most one of them `runs_alone`.
    """

    def __init__(self, engines: Sequence[Engine]) -> None:
        self.members = [PooledEngine(engine, f"engine-{index}") for index, engine in enumerate(engines)]
        self._free: asyncio.Queue[PooledEngine] = asyncio.Queue()

    @property
    def _alone(self) -> PooledEngine | None:
        # Not kept: an engine of a version that was refused leaves memory with its place in `all`.
        return next((member for member in self.members if member.engine.runs_alone), None)

    @property
    def is_busy(self) -> bool:
        """Whether any of them runs a batch."""
        return any(member.batch is not None for member in self.members)

    @property
    def max_batch_size(self) -> int:
        """Images that one run may have, on the engine that allows the most; 0 without engines."""
        return max((member.engine.max_batch_size for member in self.members), default=0)

    async def on_each(self, function: Callable[[Engine], T]) -> list[T]:
        """Call `function` with each engine, in its own thread.

        On GPUs one after the other: the capture of one would wait for the first run of another, which takes long, and
        all that serves would wait for that capture. On a CPU all that serve together at a time, so that what is
        measured then is what they do then.
        """

        async def call(member: PooledEngine) -> T:
            return await member.thread.call(partial(function, member.engine))

        on_cpu = all(member.engine.provider == "cpu" for member in self.members)
        together = [member for member in self.members if on_cpu and not member.engine.runs_alone]
        done = dict(zip(together, await asyncio.gather(*map(call, together)), strict=True))
        return [done[member] if member in done else await call(member) for member in self.members]

    def open(self) -> None:
        """Let them be claimed."""
        for member in self.members:
            self.release(member)

    async def claim(self) -> PooledEngine:
        """Wait for a member that is free, and take it."""
        return await self._free.get()

    def release(self, member: PooledEngine) -> None:
        """Give back a member."""
        if not member.engine.runs_alone:  # which nobody has to wait for, see `best`
            self._free.put_nowait(member)

    def room(self, member: PooledEngine, waiting: int) -> int:
        """Return how many of the images that wait the next batch of a claimed member may take.

        On a CPU, where each takes its time, engines that are free share them. On a GPU all take about as long as one,
        and an engine left free is ready for what comes.
        """
        size = member.engine.max_batch_size
        if member.engine.provider != "cpu":
            return size
        return min(size, max(1, ceil(waiting / (1 + self._free.qsize()))))

    def best(self, claimed: PooledEngine, size: int, waiting: int) -> PooledEngine:
        """Return the member that is to run a batch: the one that runs alone, if nothing else does or waits.

        Args:
            claimed: any other; it is released if it is not taken.
            size: of the batch.
            waiting: images behind it.
        """
        alone = self._alone
        if alone is None or waiting or self.is_busy or size > alone.engine.max_batch_size:
            return claimed
        self.release(claimed)
        return alone
