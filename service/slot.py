"""What a batcher has one of for each device."""

import asyncio

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
