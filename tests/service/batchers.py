"""What the batcher's tests share: an observer that records everything, and ways to fill a queue."""

import asyncio
import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Literal, Protocol

from service.batching.batcher import DynamicBatcher
from service.batching.queue import Prediction
from tests.fakes import FakeEngine, Images, image


class RecordingObserver:
    """An observer that records every call, and raises in the methods of `broken`."""

    def __init__(self) -> None:
        self.batches: list[int] = []
        self.waits: list[float] = []
        self.unfamiliar_images = 0
        self.drops: Counter[str] = Counter()
        self.failed_batches: list[int] = []
        self.broken: set[str] = set()

    def _record(self, method: str) -> None:
        if method in self.broken:
            raise RuntimeError(f"the observer is broken in {method}")

    def batch(self, size: int, seconds: float, *, is_background: bool) -> None:
        self._record("batch")
        self.batches.append(size)

    def queued(self, seconds: float) -> None:
        self._record("queued")
        self.waits.append(seconds)

    def unfamiliar(self, images: int) -> None:
        self._record("unfamiliar")
        self.unfamiliar_images += images

    def dropped(self, reason: Literal["cancelled", "deadline"]) -> None:
        self._record("dropped")
        self.drops[reason] += 1

    def failed_batch(self, size: int) -> None:
        self._record("failed_batch")
        self.failed_batches.append(size)


Start = Callable[..., DynamicBatcher]


class CanFail(Protocol):
    """A batcher, or a store of models that have them."""

    failure: str


async def failure_of(what: CanFail) -> str:
    """Wait until it has failed; return why."""
    async with asyncio.timeout(20):
        while not what.failure:  # noqa: ASYNC110 - it has no event for this
            await asyncio.sleep(0.005)
    return what.failure


async def classify_many(
    batcher: DynamicBatcher, images: Sequence[Images], *, deadline: float = math.inf
) -> list[Prediction]:
    """Await the predictions of one request; cancel the task that awaits them, and its client has gone."""
    future: asyncio.Future[list[Prediction]] = asyncio.get_running_loop().create_future()
    batcher.submit([image.data for image in images], future, deadline)
    try:
        return await future
    finally:
        del future  # an error's traceback holds this frame: a cycle of references


async def classify(batcher: DynamicBatcher, image: Images, *, deadline: float = math.inf) -> Prediction:
    """Await the prediction of one image."""
    (prediction,) = await classify_many(batcher, (image,), deadline=deadline)
    return prediction


async def begun(engine: FakeEngine, runs: int = 1) -> None:
    """Wait until `engine` has begun so many more runs."""
    for _ in range(runs):
        assert await asyncio.to_thread(engine.runs.acquire, timeout=5)


async def submitted(
    batcher: DynamicBatcher, *numbers: int, deadline: float = math.inf
) -> list[asyncio.Task[Prediction]]:
    """Put images into the queue, one request each, and return their tasks."""
    tasks = [asyncio.create_task(classify(batcher, image(number), deadline=deadline)) for number in numbers]
    await asyncio.sleep(0)  # every task runs up to its wait
    return tasks


async def numbers(tasks: list[asyncio.Task[Prediction]]) -> list[int]:
    return [int(prediction.logits[0]) for prediction in await asyncio.gather(*tasks)]


async def holding(start: Start, **options: object) -> tuple[FakeEngine, DynamicBatcher, asyncio.Task[Prediction]]:
    """An engine that runs image 0 until it is released, and so lets the queue fill."""
    engine = FakeEngine(max_batch_size=4)
    engine.hold()
    batcher = start(engine, **options)
    (first,) = await submitted(batcher, 0)
    await begun(engine)
    return engine, batcher, first
