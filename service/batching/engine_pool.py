"""The engines of a batcher with their threads, and which of them takes the next batch."""

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
    """An engine, its engine thread, and the batch it runs."""

    def __init__(self, engine: Engine, name: str) -> None:
        self.engine = engine
        self.name = name
        self.thread = EngineThread(name)
        self.batch: Batch | None = None
        self.watchdog: asyncio.TimerHandle | None = None
        self.hung = False
        self.failures = 0  # in a row


class EnginePool:
    """The engines of one batcher. Belongs to one event loop.

    Args:
        engines: of one model; at most one of them `runs_alone`.
    """

    def __init__(self, engines: Sequence[Engine]) -> None:
        self.members = [PooledEngine(engine, f"engine-{index}") for index, engine in enumerate(engines)]
        self._free: asyncio.Queue[PooledEngine] = asyncio.Queue()

    @property
    def _alone(self) -> PooledEngine | None:
        # Not stored: removing a member must free its engine.
        return next((member for member in self.members if member.engine.runs_alone), None)

    @property
    def is_busy(self) -> bool:
        """Whether any engine runs a batch."""
        return any(member.batch is not None for member in self.members)

    @property
    def runs_background(self) -> bool:
        """Whether any engine runs a batch of the background."""
        return any(member.batch is not None and member.batch.is_background for member in self.members)

    @property
    def has_free(self) -> bool:
        """Whether an engine is free beside the claimed one."""
        return not self._free.empty()

    @property
    def max_batch_size(self) -> int:
        """Images in the largest batch that any engine takes; 0 without engines."""
        return max((member.engine.max_batch_size for member in self.members), default=0)

    async def on_each(self, function: Callable[[Engine], T]) -> list[T]:
        """Call `function` with each engine in its engine thread.

        Engines on GPUs take turns: a capture would wait for another engine's first run, and the serving model for
        that capture. Engines on a CPU go at once, so that batch size tuning measures them as they serve.
        """

        async def call(member: PooledEngine) -> T:
            return await member.thread.call(partial(function, member.engine))

        on_cpu = all(member.engine.provider == "cpu" for member in self.members)
        together = [member for member in self.members if on_cpu and not member.engine.runs_alone]
        done = dict(zip(together, await asyncio.gather(*map(call, together)), strict=True))
        return [done[member] if member in done else await call(member) for member in self.members]

    def open(self) -> None:
        """Make all engines free."""
        for member in self.members:
            self.release(member)

    async def claim(self) -> PooledEngine:
        """Wait for a free engine, and take it."""
        return await self._free.get()

    def release(self, member: PooledEngine) -> None:
        """Give back an engine."""
        if not member.engine.runs_alone:  # that one is never claimed, see `best`
            self._free.put_nowait(member)

    def room(self, member: PooledEngine, waiting: int) -> int:
        """Return how many of the `waiting` images the next batch of a claimed engine may take.

        On a CPU a batch takes time for each image, so free engines share them. On a GPU a batch takes about as long
        as one image, so one engine takes all and the others stay free.
        """
        size = member.engine.max_batch_size
        if member.engine.provider != "cpu":
            return size
        return min(size, max(1, ceil(waiting / (1 + self._free.qsize()))))

    def best(self, claimed: PooledEngine, size: int, waiting: int) -> PooledEngine:
        """Return the engine for a batch: the one that `runs_alone` if nothing else runs or waits, else `claimed`.

        Args:
            claimed: a claimed engine; it is released if the other is returned.
            size: images in the batch.
            waiting: images that stay in the queue.
        """
        alone = self._alone
        if alone is None or waiting or self.is_busy or size > alone.engine.max_batch_size:
            return claimed
        self.release(claimed)
        return alone
