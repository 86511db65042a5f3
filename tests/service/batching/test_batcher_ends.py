"""Images that are cancelled or late, and batchers that drain and close."""

import asyncio
import math
import threading

import pytest

from service.batching.batcher import DynamicBatcher
from service.errors import DeadlineExceeded, Draining, NotReady
from tests.fakes import FakeEngine, image
from tests.service.batchers import RecordingObserver, Start, begun, classify, holding, numbers, submitted

# Cancellation and deadlines


async def test_a_request_cancelled_in_the_queue_never_runs(start: Start) -> None:
    observer = RecordingObserver()
    engine, batcher, first = await holding(start, observer=observer)
    gone, stays = await submitted(batcher, 1, 2)
    gone.cancel()
    engine.release(2)
    assert await numbers([first, stays]) == [0, 2]
    assert engine.batches == [[0], [2]]
    assert gone.cancelled()
    assert observer.drops == {"cancelled": 1}


async def test_a_queue_of_nothing_but_the_cancelled_is_emptied(start: Start) -> None:
    observer = RecordingObserver()
    engine, batcher, first = await holding(start, observer=observer)
    for task in await submitted(batcher, 1, 2, 3):
        task.cancel()
    engine.let_go()
    await first
    await batcher.drain()
    assert engine.batches == [[0]]
    assert observer.drops == {"cancelled": 3}
    assert batcher.queue_length == 0


async def test_a_request_cancelled_while_it_runs_harms_no_other(start: Start) -> None:
    engine, batcher, first = await holding(start)
    gone, stays = await submitted(batcher, 1, 2)
    engine.release()
    await begun(engine)
    gone.cancel()
    engine.let_go()
    assert await numbers([first, stays]) == [0, 2]
    assert gone.cancelled()
    assert int((await classify(batcher, image(3))).logits[0]) == 3


async def test_an_expired_request_never_runs(start: Start) -> None:
    observer = RecordingObserver()
    engine, batcher, first = await holding(start, observer=observer)
    now = asyncio.get_running_loop().time()
    (late,) = await submitted(batcher, 1, deadline=now)
    (patient,) = await submitted(batcher, 2, deadline=now + 60)
    engine.release(2)
    with pytest.raises(DeadlineExceeded):
        await late
    assert await numbers([first, patient]) == [0, 2]
    assert engine.batches == [[0], [2]]
    assert observer.drops == {"deadline": 1}


async def test_an_expired_request_fails_while_the_engine_is_busy(start: Start) -> None:
    observer = RecordingObserver()
    engine, batcher, first = await holding(start, observer=observer)
    now = asyncio.get_running_loop().time()
    late = await submitted(batcher, 1, 2, deadline=now + 0.05)
    (gone,) = await submitted(batcher, 3)
    gone.cancel()
    for task in late:
        with pytest.raises(DeadlineExceeded):
            await task
    assert not first.done()
    assert batcher.queue_length == 0
    assert observer.drops == {"deadline": 2, "cancelled": 1}
    (next_one,) = await submitted(batcher, 4, deadline=now + 60)
    engine.release(2)
    assert await numbers([first, next_one]) == [0, 4]
    assert engine.batches == [[0], [4]]


async def test_a_drain_waits_for_the_run_and_not_for_expired_requests(start: Start) -> None:
    engine, batcher, first = await holding(start)
    (late,) = await submitted(batcher, 1, deadline=asyncio.get_running_loop().time())
    draining = asyncio.create_task(batcher.drain())
    with pytest.raises(DeadlineExceeded):
        await late
    assert not draining.done()
    engine.release()
    await draining
    assert await numbers([first]) == [0]


async def test_a_run_that_began_in_time_may_end_late(start: Start) -> None:
    engine = FakeEngine()
    engine.hold()
    loop = asyncio.get_running_loop()
    deadline = loop.time() + 0.3
    (task,) = await submitted(start(engine), 1, deadline=deadline)
    await begun(engine)
    await asyncio.sleep(deadline - loop.time() + 0.01)
    engine.release()
    assert await numbers([task]) == [1]


# The end


async def test_before_the_start_nothing_is_accepted() -> None:
    batcher = DynamicBatcher([FakeEngine()], RecordingObserver())
    with pytest.raises(NotReady):
        await classify(batcher, image(1))
    await batcher.close()


async def test_draining_serves_accepted_requests_and_refuses_new_ones(start: Start) -> None:
    engine, batcher, first = await holding(start)
    tasks = await submitted(batcher, *range(1, 8))
    draining = asyncio.create_task(batcher.drain())
    await asyncio.sleep(0)
    with pytest.raises(Draining):
        await classify(batcher, image(9))
    assert not draining.done()
    engine.let_go()
    await draining
    assert all(task.done() for task in [first, *tasks])
    assert await numbers([first, *tasks]) == list(range(8))


async def test_a_drain_waits_for_answers_of_a_run_after_which_nobody_waits(start: Start) -> None:
    engine, batcher, first = await holding(start)
    (cancelled,) = await submitted(batcher, 1)
    cancelled.cancel()
    engine.release()
    await batcher.drain()
    assert first.done()


async def test_draining_an_idle_batcher_ends_at_once(start: Start) -> None:
    batcher = start(FakeEngine())
    await batcher.drain()
    await batcher.drain()


async def test_closing_waits_for_runs_and_aborts_the_queue(start: Start) -> None:
    engine, batcher, first = await holding(start)
    queued = await submitted(batcher, 1, 2)
    closing = asyncio.create_task(batcher.close())
    results = await asyncio.gather(*queued, return_exceptions=True)
    assert [type(result) for result in results] == [Draining] * 2
    assert not engine.closed
    engine.let_go()
    await closing
    assert engine.closed
    assert await numbers([first]) == [0]
    assert not batcher.failure
    await batcher.close()


async def test_abort_fails_running_and_queued_requests_at_once(start: Start) -> None:
    engine, batcher, first = await holding(start)
    (waiting,) = await submitted(batcher, 1)
    batcher.abort()
    for task in (first, waiting):
        with pytest.raises(Draining):
            await asyncio.wait_for(task, 5)  # while the engine is still at it
    with pytest.raises(Draining):
        await classify(batcher, image(2))
    engine.let_go()


async def test_pixels_of_another_size_reach_no_batch(start: Start) -> None:
    batcher = start(FakeEngine())
    future: asyncio.Future[object] = asyncio.get_running_loop().create_future()
    right = image(1).tobytes()
    for wrong in (right[:-1], right + b"x", b"", memoryview(right)[1:]):
        with pytest.raises(ValueError, match=rf"an image must have {len(right)} bytes, and has {len(wrong)}"):
            batcher.submit([right, wrong], future, math.inf)  # type: ignore[arg-type]
    assert batcher.queue_length == 0
    assert not future.done()


class SlowToClose(FakeEngine):
    """As one whose memory a driver takes its time to free."""

    def __init__(self) -> None:
        super().__init__()
        self.begun, self.may_close = threading.Event(), threading.Event()

    def close(self) -> None:
        self.begun.set()
        assert self.may_close.wait(5)
        super().close()


async def test_engines_that_a_cancelled_close_left_are_closed_by_the_next(start: Start) -> None:
    """As when the service ends while an old version retires."""
    slow, other = SlowToClose(), FakeEngine()
    batcher = start(slow, other)
    retiring = asyncio.create_task(batcher.close())
    assert await asyncio.to_thread(slow.begun.wait, 5)
    retiring.cancel()
    await asyncio.wait([retiring])
    assert not other.closed
    await batcher.close()
    assert other.closed
    slow.may_close.set()
    assert await asyncio.to_thread(slow.closing.wait, 5)
