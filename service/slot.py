"""What a batcher has one of for each device."""

import asyncio
from math import ceil

from service.engine import Engine
from service.fair_queue import Batch
from service.worker import EngineThread


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

    def room(self, waiting: int, others: int) -> int:
        """Return how many of the pictures that wait its next batch may take.

        On a CPU, where each takes its time, engines that are free share them. On a GPU all take about as long as one,
        and an engine left free is ready for what comes.

        Args:
            waiting: pictures.
            others: engines that are free as well.
        """
        size = self.engine.max_batch_size
        return min(size, max(1, ceil(waiting / (1 + others)))) if self.engine.provider == "cpu" else size
