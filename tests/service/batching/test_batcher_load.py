"""Everything at once: a storm, and streams that must not starve each other."""

import asyncio
import math
import random
from collections import Counter
from collections.abc import Awaitable

import pytest

from service.batching.batcher import DynamicBatcher
from service.batching.queue import Prediction
from tests.fakes import FakeEngine, image
from tests.service.batchers import (
    RecordingObserver,
    Start,
    begun,
    classify,
    classify_many,
    holding,
    numbers,
    submitted,
)


async def test_observers_record_every_image_once(start: Start) -> None:
    observer = RecordingObserver()
    engine, batcher, first = await holding(start, observer=observer)
    tasks = await submitted(batcher, *range(1, 6))
    engine.let_go()
    await asyncio.gather(first, *tasks)
    assert observer.batches == [1, 4, 1]
    assert len(observer.waits) == 6
    assert not observer.drops


@pytest.mark.parametrize("seed", range(4))
async def test_in_a_storm_everything_ends_exactly_once_and_with_its_own_answer(start: Start, seed: int) -> None:
    """Singles and large requests, cancelled at any time, late, on engines that fail now and then."""
    chance = random.Random(seed)
    observer = RecordingObserver()
    engines = [FakeEngine(max_batch_size=size, delay=0.0005) for size in (1, 3, 8)]
    for engine in engines:
        engine.fail = lambda batch: RuntimeError("unlucky") if chance.random() < 0.05 else None
    batcher = start(*engines, observer=observer, max_failures=1000)
    loop = asyncio.get_running_loop()
    ends: Counter[str] = Counter()
    sent = 0

    async def client() -> None:
        nonlocal sent
        for _ in range(20):
            await asyncio.sleep(chance.random() * 0.004)
            wanted = [chance.randrange(65536) for _ in range(chance.choice([1, 1, 1, 2, 20]))]
            sent += len(wanted)
            deadline = chance.choice([math.inf, loop.time() + chance.random() * 0.02])
            request = asyncio.create_task(classify_many(batcher, [image(n) for n in wanted], deadline=deadline))
            if chance.random() < 0.2:
                loop.call_later(chance.random() * 0.01, request.cancel)
            (result,) = await asyncio.gather(request, return_exceptions=True)
            ends[type(result).__name__] += 1
            if not isinstance(result, BaseException):
                assert [int(prediction.logits[0]) for prediction in result] == wanted

    await asyncio.gather(*(client() for _ in range(25)))
    await batcher.drain()
    assert ends.total() == 500
    assert set(ends) == {"list", "CancelledError", "DeadlineExceeded", "InferenceFailed"}
    ran = sum(observer.batches) + sum(observer.failed_batches)
    assert (
        ran
        == sum(len(batch) for engine in engines for batch in engine.batches)
        == len(observer.waits) + sum(observer.failed_batches)
    )
    assert ran + observer.drops.total() <= sent  # the rest belongs to requests that had failed already
    assert batcher.queue_length == 0
    assert not batcher.failure


async def test_small_requests_do_not_starve_under_a_stream_of_large_ones(start: Start) -> None:
    engine = FakeEngine(max_batch_size=8)
    batcher = start(engine)
    stop = False

    async def flood() -> None:
        while not stop:
            await classify_many(batcher, [image(1)] * 64)

    floods = [asyncio.create_task(flood()) for _ in range(3)]
    for _ in range(50):
        before = len(engine.batches)
        await classify(batcher, image(2))
        # At most the batch that runs, half a batch for each of the three, and its own.
        assert len(engine.batches) - before <= 4
    stop = True
    await asyncio.gather(*floods)


async def test_large_requests_do_not_starve_under_a_stream_of_small_ones(start: Start) -> None:
    engine = FakeEngine(max_batch_size=8)
    batcher = start(engine)
    stop = False

    async def flood() -> None:
        while not stop:
            await classify(batcher, image(1))

    floods = [asyncio.create_task(flood()) for _ in range(32)]
    large: Awaitable[list[Prediction]] = classify_many(batcher, [image(2)] * 64)
    before = len(engine.batches)
    await large
    # 32 small ones and half a batch of the large one in each turn: 16 turns of five batches.
    assert len(engine.batches) - before <= 16 * 5 + 2
    stop = True
    await asyncio.gather(*floods)


async def test_background_images_delay_a_request_by_the_batch_that_runs_and_no_other(start: Start) -> None:
    observer = RecordingObserver()
    engine = FakeEngine(max_batch_size=4)
    engine.hold()
    batcher = start(engine, observer=observer)
    future = in_background(batcher, 12)
    await begun(engine)  # the first four run
    tasks = await submitted(batcher, 100, 101)
    engine.let_go()
    assert await numbers(tasks) == [100, 101]
    assert [int(prediction.logits[0]) for prediction in await future] == list(range(12))
    assert engine.batches == [[0, 1, 2, 3], [100, 101], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert len(observer.waits) == 2  # the waits of background images are none of theirs


def in_background(batcher: DynamicBatcher, count: int) -> asyncio.Future[list[Prediction]]:
    future: asyncio.Future[list[Prediction]] = asyncio.get_running_loop().create_future()
    batcher.submit([image(number).data for number in range(count)], future, is_background=True)
    return future


async def test_background_images_leave_an_engine_free_while_others_come(start: Start) -> None:
    engines = first, second = FakeEngine(max_batch_size=2), FakeEngine(max_batch_size=2)
    batcher = start(*engines)
    assert await numbers(await submitted(batcher, 100)) == [100]
    for engine in engines:
        engine.hold()
    future = in_background(batcher, 8)
    await begun(second)
    tasks = await submitted(batcher, 101)
    await begun(first, 2)  # its first run was before
    assert first.batches == [[100], [101]]
    for engine in engines:
        engine.let_go()
    assert await numbers(tasks) == [101]
    assert [int(prediction.logits[0]) for prediction in await future] == list(range(8))


@pytest.mark.parametrize("came_before", [False, True])
async def test_background_images_take_every_engine_while_nobody_else_comes(
    start: Start, monkeypatch: pytest.MonkeyPatch, came_before: bool
) -> None:
    monkeypatch.setattr("service.batching.batcher.QUIET_S", 0.0)
    engines = FakeEngine(max_batch_size=2), FakeEngine(max_batch_size=2)
    batcher = start(*engines)
    if came_before:
        assert await numbers(await submitted(batcher, 100)) == [100]
        await begun(engines[0])
    for engine in engines:
        engine.hold()
    future = in_background(batcher, 8)
    for engine in engines:
        await begun(engine)
    for engine in engines:
        engine.let_go()
    assert [int(prediction.logits[0]) for prediction in await future] == list(range(8))
