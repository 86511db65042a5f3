"""Several engines, and the thread of each."""

import asyncio
import threading
import time
from typing import Literal

import pytest

from service.batching.batcher import DynamicBatcher
from service.engine.onnx_engine import Engine
from service.engine.thread import EngineThread
from tests.fakes import FakeEngine, image, tiny_images
from tests.service.batchers import RecordingObserver, Start, begun, classify, classify_many, numbers, submitted


async def test_engines_run_at_the_same_time_and_share_one_queue(start: Start) -> None:
    engines = [FakeEngine(max_batch_size=2, tag=tag) for tag in range(3)]
    for engine in engines:
        engine.hold()
    batcher = start(*engines)
    tasks = []
    for number, engine in enumerate(engines):
        tasks += await submitted(batcher, number)
        await begun(engine)  # all three run, none has ended
    tasks += await submitted(batcher, 3, 4)
    engines[1].release(2)  # the one that is free takes what waits
    await begun(engines[1])
    assert engines[1].batches == [[1], [3, 4]]
    for engine in engines:
        engine.let_go()
    assert await numbers(tasks) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("provider", "batches"),
    [("cpu", [[0, 1, 2], [3, 4], [5, 6]]), ("cuda", [[0, 1, 2, 3, 4, 5], [6], []])],
)
async def test_free_cpu_engines_share_the_queue_and_a_gpu_takes_all(
    start: Start, provider: Literal["cpu", "cuda"], batches: list[list[int]]
) -> None:
    engines = [FakeEngine(max_batch_size=6, tag=tag) for tag in range(3)]
    for engine in engines:
        engine.provider = provider
        engine.hold()
    batcher = start(*engines)
    tasks = await submitted(batcher, *range(7))
    for engine, numbers_ in zip(engines, batches, strict=True):
        if numbers_:
            await begun(engine)
        assert engine.batches == ([numbers_] if numbers_ else [])
        engine.let_go()
    assert await numbers(tasks) == list(range(7))


async def test_a_free_cpu_engine_takes_all_while_the_other_is_busy(start: Start) -> None:
    engines = [FakeEngine(max_batch_size=8), FakeEngine(max_batch_size=8)]
    for engine in engines:
        engine.hold()
    batcher = start(*engines)
    tasks = await submitted(batcher, 0)
    await begun(engines[0])
    tasks += await submitted(batcher, 1, 2, 3)
    await begun(engines[1])
    assert engines[1].batches == [[1, 2, 3]]
    for engine in engines:
        engine.let_go()
    assert await numbers(tasks) == [0, 1, 2, 3]


async def test_a_whole_batch_after_a_queue_delay_is_not_shared(start: Start) -> None:
    engines = [FakeEngine(max_batch_size=6), FakeEngine(max_batch_size=6)]
    batcher = start(*engines, max_queue_delay_ms=3_600_000)
    async with asyncio.timeout(5):  # or half of them would wait for the next ones
        assert await numbers(await submitted(batcher, *range(6))) == list(range(6))
    assert [engine.batches for engine in engines] == [[[0, 1, 2, 3, 4, 5]], []]


def alone(*others: FakeEngine) -> FakeEngine:
    """An engine for one image that comes while none of the others runs; all of them hold their runs."""
    engine = FakeEngine(max_batch_size=1, tag=9)
    engine.runs_alone = True
    for one in (engine, *others):
        one.hold()
    return engine


async def test_a_lone_image_runs_on_the_engine_that_runs_alone(start: Start) -> None:
    others = [FakeEngine(max_batch_size=8), FakeEngine(max_batch_size=8)]
    wide = alone(*others)
    batcher = start(*others, wide)
    tasks = await submitted(batcher, 0)
    await begun(wide)
    tasks += await submitted(batcher, 1)  # not alone any more, but it does not have to wait
    await begun(others[1])  # the first had its turn, and gave it away
    tasks += await submitted(batcher, 2, 3)
    await begun(others[0])
    assert [engine.batches for engine in (wide, *others)] == [[[0]], [[2, 3]], [[1]]]
    for engine in (wide, *others):
        engine.release()
    assert await numbers(tasks) == [0, 1, 2, 3]
    tasks = await submitted(batcher, 4)
    await begun(wide)
    assert wide.batches == [[0], [4]]
    for engine in (wide, *others):
        engine.let_go()
    assert await numbers(tasks) == [4]


async def test_images_that_come_together_do_not_use_the_engine_that_runs_alone(start: Start) -> None:
    others = [FakeEngine(max_batch_size=8), FakeEngine(max_batch_size=8)]
    wide = alone(*others)
    batcher = start(*others, wide)
    predictions = asyncio.create_task(classify_many(batcher, [image(number) for number in range(5)]))
    for engine in others:
        await begun(engine)
    assert [engine.batches for engine in (wide, *others)] == [[], [[0, 1, 2]], [[3, 4]]]
    for engine in (wide, *others):
        engine.let_go()
    assert [int(prediction.logits[0]) for prediction in await predictions] == list(range(5))


async def test_the_engine_that_runs_alone_counts_as_busy_and_is_closed(start: Start) -> None:
    other = FakeEngine()
    wide = alone(other)
    batcher = start(other, wide)
    assert batcher.max_batch_size == 4
    tasks = await submitted(batcher, 7)
    await begun(wide)
    draining = asyncio.create_task(batcher.drain())
    await asyncio.sleep(0)
    assert not draining.done()
    wide.let_go()
    other.let_go()
    await draining
    assert await numbers(tasks) == [7]
    await batcher.close()
    assert wide.closed
    assert other.closed


async def test_cpu_engines_warm_up_together_and_the_one_that_runs_alone_after_them() -> None:
    others, order = [FakeEngine(), FakeEngine()], []
    wide = FakeEngine()
    wide.runs_alone = True
    meeting = threading.Barrier(2, timeout=5)

    def warm_up(engine: Engine) -> int:
        order.append(engine)
        if engine is not wide:
            meeting.wait()
        return len(order)

    batcher = DynamicBatcher([wide, *others], RecordingObserver())
    assert await batcher.on_each_engine(warm_up) == [3, 2, 2]
    assert order[2] is wide
    await batcher.close()


async def test_engines_on_gpus_are_warmed_up_one_after_the_other() -> None:
    engines, running = [FakeEngine() for _ in range(3)], threading.Lock()
    for engine in engines:
        engine.provider = "cuda"

    def warm_up(engine: Engine) -> Engine:
        assert running.acquire(blocking=False)
        time.sleep(0.01)
        running.release()
        return engine

    batcher = DynamicBatcher(engines, RecordingObserver())
    assert await batcher.on_each_engine(warm_up) == engines
    await batcher.close()


async def test_each_engine_has_one_thread_of_its_own_for_warm_up_and_runs() -> None:
    engines = [FakeEngine(), FakeEngine()]
    batcher = DynamicBatcher(engines, RecordingObserver())
    assert await batcher.on_each_engine(lambda engine: engine.warm_up()) == [None, None]
    batcher.start()
    await asyncio.gather(*(classify(batcher, image(number)) for number in range(64)))
    await batcher.drain()
    await batcher.close()
    assert [len(engine.threads) for engine in engines] == [1, 1]
    assert engines[0].threads != engines[1].threads
    assert all(engine.warmed and engine.closed for engine in engines)


async def test_an_error_in_an_engines_thread_comes_back() -> None:
    def fails(engine: object) -> None:
        raise RuntimeError("the golden images differ")

    batcher = DynamicBatcher([FakeEngine()], RecordingObserver())
    with pytest.raises(RuntimeError, match="golden"):
        await batcher.on_each_engine(fails)
    await batcher.close()


async def test_cancelling_a_call_to_an_engine_thread_breaks_nothing() -> None:
    engine = FakeEngine()
    engine.hold()
    thread = EngineThread("test")
    waiting = asyncio.create_task(thread.call(lambda: engine.run(tiny_images(1))))
    await begun(engine)
    waiting.cancel()
    engine.let_go()
    assert await thread.call(lambda: 42) == 42
    thread.stop()


def test_a_batch_that_ends_after_the_event_loop_is_dropped_in_silence(recwarn: pytest.WarningsRecorder) -> None:
    engine = FakeEngine()
    engine.hold()
    thread = EngineThread("test")

    async def leave() -> None:
        task = asyncio.create_task(thread.call(lambda: engine.run(tiny_images(1))))
        await begun(engine)
        task.cancel()

    asyncio.run(leave())
    engine.let_go()
    assert engine.ended.acquire(timeout=5)
    thread.stop()
    assert not recwarn.list
