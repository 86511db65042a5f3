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


class Slot:
    """An engine, its thread, and the batch it runs."""

    def __init__(self, engine: Engine, name: str) -> None:
        self.engine = engine
        self.name = name
        self.thread = EngineThread(name)
        self.batch: Batch | None = None
        self.watchdog: asyncio.TimerHandle | None = None
        self.hung = False
        self.failures = 0  # in a row


class Slots:
    """The slots of a batcher. Belongs to one event loop.

    Args:
        engines: of one model; at most one of them `runs_alone`.
    """

    def __init__(self, engines: Sequence[Engine]) -> None:
        self.all = [Slot(engine, f"engine-{index}") for index, engine in enumerate(engines)]
        self._free: asyncio.Queue[Slot] = asyncio.Queue()

    @property
    def _alone(self) -> Slot | None:
        # Not kept: an engine of a version that was refused leaves memory with its place in `all`.
        return next((slot for slot in self.all if slot.engine.runs_alone), None)

    @property
    def is_busy(self) -> bool:
        """Whether any of them runs a batch."""
        return any(slot.batch is not None for slot in self.all)

    @property
    def max_batch_size(self) -> int:
        """Images that one run may have, on the engine that allows the most; 0 without engines."""
        return max((slot.engine.max_batch_size for slot in self.all), default=0)

    async def on_each(self, function: Callable[[Engine], T]) -> list[T]:
        """Call `function` with each engine, in its own thread.

        On GPUs one after the other: the capture of one would wait for the first run of another, which takes long, and
        all that serves would wait for that capture. On a CPU all that serve together at a time, so that what is
        measured then is what they do then.
        """

        async def call(slot: Slot) -> T:
            return await slot.thread.call(partial(function, slot.engine))

        on_cpu = all(slot.engine.provider == "cpu" for slot in self.all)
        together = [slot for slot in self.all if on_cpu and not slot.engine.runs_alone]
        done = dict(zip(together, await asyncio.gather(*map(call, together)), strict=True))
        return [done[slot] if slot in done else await call(slot) for slot in self.all]

    def open(self) -> None:
        """Let them be claimed."""
        for slot in self.all:
            self.release(slot)

    async def claim(self) -> Slot:
        """Wait for a slot that is free, and take it."""
        return await self._free.get()

    def release(self, slot: Slot) -> None:
        """Give back a slot."""
        if not slot.engine.runs_alone:  # which nobody has to wait for, see `best`
            self._free.put_nowait(slot)

    def room(self, slot: Slot, waiting: int) -> int:
        """Return how many of the images that wait the next batch of a claimed slot may take.

        On a CPU, where each takes its time, engines that are free share them. On a GPU all take about as long as one,
        and an engine left free is ready for what comes.
        """
        size = slot.engine.max_batch_size
        if slot.engine.provider != "cpu":
            return size
        return min(size, max(1, ceil(waiting / (1 + self._free.qsize()))))

    def best(self, claimed: Slot, size: int, waiting: int) -> Slot:
        """Return the slot that is to run a batch: the one that runs alone, if nothing else does or waits.

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
