"""Engines that raise, hang and go away, and a loop that dies."""

import asyncio
from contextlib import suppress

import pytest
import uvloop

from service.batching.batcher import DynamicBatcher
from service.batching.queue import Prediction
from service.errors import DeadlineExceeded, InferenceFailed, NotReady
from tests.fakes import FakeEngine, Images, Logits, image
from tests.service.batchers import (
    RecordingObserver,
    Start,
    begun,
    classify,
    classify_many,
    failure_of,
    holding,
    numbers,
    submitted,
)


async def test_a_failing_batch_fails_its_own_members_alone(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    observer = RecordingObserver()
    engine, batcher, first = await holding(start, observer=observer)
    engine.fail = lambda batch: RuntimeError("the device says no") if 2 in batch else None
    bad = await submitted(batcher, 1, 2, 3, 4)
    good = await submitted(batcher, 5, 6)
    engine.let_go()
    results = await asyncio.gather(*bad, return_exceptions=True)
    assert [type(result) for result in results] == [InferenceFailed] * 4
    assert await numbers([first, *good]) == [0, 5, 6]
    assert observer.failed_batches == [4]
    assert "the device says no" in caplog.text
    assert not batcher.failure


async def test_a_large_request_fails_with_the_first_of_its_batches_and_the_rest_never_runs(start: Start) -> None:
    engine, batcher, first = await holding(start)
    engine.fail = lambda batch: RuntimeError("no") if 1 in batch else None
    large = asyncio.create_task(classify_many(batcher, [image(number) for number in range(1, 11)]))
    await asyncio.sleep(0)
    engine.let_go()
    with pytest.raises(InferenceFailed):
        await large
    await first
    assert int((await classify(batcher, image(99))).logits[0]) == 99
    assert engine.batches == [[0], [1, 2, 3, 4], [99]]


async def test_an_engine_that_gives_too_few_answers_fails_the_batch(start: Start) -> None:
    class Forgetful(FakeEngine):
        def run(self, images: Images) -> Logits:
            return super().run(images)[1:]

    with pytest.raises(InferenceFailed):
        await classify(start(Forgetful()), image(1))


async def test_an_engine_that_keeps_failing_fails_the_batcher(start: Start) -> None:
    reasons: list[str] = []
    engine = FakeEngine()
    engine.fail = lambda batch: RuntimeError("the device has gone")
    batcher = start(engine, max_failures=3, on_failure=reasons.append)
    for _ in range(3):
        assert not batcher.failure
        with pytest.raises(InferenceFailed):
            await classify(batcher, image(1))
    assert batcher.failure
    assert reasons == [batcher.failure]
    assert "3 batches failed in a row, the last with RuntimeError('the device has gone')" in batcher.failure
    with pytest.raises(NotReady):
        await classify(batcher, image(1))


async def test_failures_that_are_not_in_a_row_do_not(start: Start) -> None:
    engine = FakeEngine()
    engine.fail = lambda batch: RuntimeError("odd") if batch[0] % 2 else None
    batcher = start(engine, max_failures=2)
    for number in range(8):
        with suppress(InferenceFailed):
            await classify(batcher, image(number))
    assert not batcher.failure
    assert int((await classify(batcher, image(8))).logits[0]) == 8


async def test_an_engine_that_hangs_is_found_out(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    observer = RecordingObserver()
    engine, batcher, first = await holding(start, observer=observer, run_timeout_ms=300)
    queued = await submitted(batcher, 1, 2)
    await failure_of(batcher)
    results = await asyncio.gather(first, *queued, return_exceptions=True)
    assert [type(result) for result in results] == [InferenceFailed] * 3
    assert "did not end within 0.3 s" in batcher.failure
    assert batcher.failure in caplog.text
    assert observer.failed_batches == [1]
    with pytest.raises(NotReady):
        await classify(batcher, image(3))
    engine.release()  # it comes back too late
    await batcher.on_each_engine(lambda engine: None)  # behind it in the thread, and behind its end in the loop
    assert observer.batches == []
    await batcher.drain()
    await batcher.close()  # does not wait for a thread that may never end
    assert not engine.closed


async def test_when_one_engine_has_gone_batches_on_the_others_still_end(start: Start) -> None:
    broken, healthy = FakeEngine(), FakeEngine()
    broken.fail = lambda batch: RuntimeError("the device has gone")
    broken.hold()
    healthy.hold()
    batcher = start(broken, healthy, max_failures=1)
    (lost,) = await submitted(batcher, 1)
    await begun(broken)
    (saved,) = await submitted(batcher, 2)
    await begun(healthy)
    broken.let_go()
    with pytest.raises(InferenceFailed):
        await lost
    assert batcher.failure
    draining = asyncio.create_task(batcher.drain())
    healthy.let_go()
    assert await numbers([saved]) == [2]
    await draining


async def test_a_run_that_ends_in_time_leaves_no_watchdog_behind(start: Start) -> None:
    batcher = start(FakeEngine(), run_timeout_ms=250)
    for number in range(5):
        await classify(batcher, image(number))
    await asyncio.sleep(0.3)
    assert not batcher.failure


def test_times_are_finer_than_uvloops_clock_of_whole_milliseconds() -> None:
    async def predict() -> Prediction:
        batcher = DynamicBatcher([FakeEngine(delay=0.0015)], RecordingObserver())
        batcher.start()
        prediction = await classify(batcher, image(1))
        await batcher.close()
        return prediction

    prediction = uvloop.run(predict())
    assert 0 < prediction.queue_seconds % 0.001 < 0.000999
    assert 0 < prediction.inference_seconds % 0.001 < 0.000999


@pytest.mark.parametrize("method", ["dropped", "batch", "queued", "failed_batch"])
async def test_if_the_loop_dies_all_requests_end(start: Start, method: str) -> None:
    """Nothing in the loop can raise but an observer; each of its methods is made to."""
    observer = RecordingObserver()
    engine, batcher, first = await holding(start, observer=observer)
    gone, *queued = await submitted(batcher, *range(1, 11))
    gone.cancel()
    observer.broken = {method}
    engine.fail = lambda batch: RuntimeError("no") if method == "failed_batch" else None
    engine.let_go()
    await failure_of(batcher)
    results = await asyncio.gather(first, *queued, return_exceptions=True)
    assert len(results) == 10
    assert all(isinstance(result, Prediction | InferenceFailed) for result in results)
    assert isinstance(results[-1], InferenceFailed)
    with pytest.raises(NotReady):
        await classify(batcher, image(11))


async def test_an_observer_that_fails_while_the_engine_is_busy_is_noticed(start: Start) -> None:
    observer = RecordingObserver()
    engine, batcher, first = await holding(start, observer=observer)
    observer.broken = {"dropped"}
    (late,) = await submitted(batcher, 1, deadline=asyncio.get_running_loop().time())
    await failure_of(batcher)
    assert "an observer failed" in batcher.failure
    assert [type(error) for error in await asyncio.gather(late, return_exceptions=True)] == [DeadlineExceeded]
    engine.let_go()
    assert await numbers([first]) == [0]


async def test_if_the_loop_is_cancelled_from_outside_that_is_noticed(start: Start) -> None:
    engine, batcher, first = await holding(start)
    queued = await submitted(batcher, 1, 2)
    (loop_task,) = [task for task in asyncio.all_tasks() if task.get_name() == "batcher"]
    loop_task.cancel()
    await failure_of(batcher)
    assert "loop has ended" in batcher.failure
    engine.let_go()
    assert await numbers([first]) == [0]  # it was running, and is answered
    assert [type(error) for error in await asyncio.gather(*queued, return_exceptions=True)] == [InferenceFailed] * 2
