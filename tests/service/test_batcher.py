"""The batcher with engines that a test holds, breaks and hangs. Order comes from events, never from sleeping."""

import asyncio
import random
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from typing import Literal

import numpy as np
import pytest
import uvloop

from service.batcher import DynamicBatcher, Prediction
from service.errors import DeadlineExceeded, Draining, InferenceFailed, NotReady
from service.worker import EngineThread
from tests.fakes import FakeEngine, Images, Logits, picture, tiny_images


class Notes:
    """An observer that writes everything down, and raises where it is told to."""

    def __init__(self) -> None:
        self.batches: list[int] = []
        self.waits: list[float] = []
        self.drops: Counter[str] = Counter()
        self.failed_batches: list[int] = []
        self.broken: set[str] = set()

    def _note(self, method: str) -> None:
        if method in self.broken:
            raise RuntimeError(f"the observer is broken in {method}")

    def batch(self, size: int, seconds: float) -> None:
        self._note("batch")
        self.batches.append(size)

    def queued(self, seconds: float) -> None:
        self._note("queued")
        self.waits.append(seconds)

    def dropped(self, reason: Literal["cancelled", "deadline"]) -> None:
        self._note("dropped")
        self.drops[reason] += 1

    def failed_batch(self, size: int) -> None:
        self._note("failed_batch")
        self.failed_batches.append(size)


Start = Callable[..., DynamicBatcher]


@pytest.fixture
async def start() -> AsyncIterator[Start]:
    """Start batchers; at the end let their engines go and close them."""
    started: list[tuple[DynamicBatcher, tuple[FakeEngine, ...]]] = []

    def start(*engines: FakeEngine, **options: object) -> DynamicBatcher:
        batcher = DynamicBatcher(engines, **options)
        batcher.start()
        started.append((batcher, engines))
        return batcher

    yield start
    for batcher, engines in started:
        for engine in engines:
            engine.let_go()
        await batcher.close()


async def begun(engine: FakeEngine, runs: int = 1) -> None:
    """Wait until `engine` has begun so many more runs."""
    for _ in range(runs):
        assert await asyncio.to_thread(engine.runs.acquire, timeout=5)


async def submitted(
    batcher: DynamicBatcher, *numbers: int, deadline: float | None = None
) -> list[asyncio.Task[Prediction]]:
    """Put pictures into the queue, one request each, and return their tasks."""
    tasks = [asyncio.create_task(batcher.submit(picture(number), deadline=deadline)) for number in numbers]
    await asyncio.sleep(0)  # every task runs up to its wait
    return tasks


async def numbers(tasks: list[asyncio.Task[Prediction]]) -> list[int]:
    return [int(prediction.logits[0]) for prediction in await asyncio.gather(*tasks)]


async def holding(start: Start, **options: object) -> tuple[FakeEngine, DynamicBatcher, asyncio.Task[Prediction]]:
    """An engine that runs picture 0 until it is released, and so lets the queue fill."""
    engine = FakeEngine(max_batch_size=4)
    engine.hold()
    batcher = start(engine, **options)
    (first,) = await submitted(batcher, 0)
    await begun(engine)
    return engine, batcher, first


# Batches


async def test_a_picture_gets_its_answer(start: Start) -> None:
    prediction = await start(FakeEngine()).submit(picture(1234))
    assert prediction.logits.tolist() == [1234, 0, 0, 0, 0]
    assert prediction.batch_size == 1
    assert prediction.queue_seconds >= 0
    assert prediction.inference_seconds > 0


async def test_pictures_that_come_together_run_together_in_order(start: Start) -> None:
    engine = FakeEngine(max_batch_size=4)
    tasks = await submitted(start(engine), 5, 3, 9, 1)
    assert await numbers(tasks) == [5, 3, 9, 1]
    assert engine.batches == [[5, 3, 9, 1]]


async def test_late_arrivals_join_the_batch_that_forms_while_one_runs(start: Start) -> None:
    engine, batcher, first = await holding(start)
    tasks = await submitted(batcher, 1, 2)
    tasks += await submitted(batcher, 3)
    assert batcher.queue_length == 3
    engine.release(2)
    assert await numbers([first, *tasks]) == [0, 1, 2, 3]
    assert engine.batches == [[0], [1, 2, 3]]
    assert batcher.queue_length == 0


async def test_order_is_kept_over_many_batches(start: Start) -> None:
    engine, batcher, first = await holding(start)
    tasks = await submitted(batcher, *range(1, 40))
    engine.let_go()
    assert await numbers([first, *tasks]) == list(range(40))
    assert engine.batches == [[0], *([*range(at, min(at + 4, 40))] for at in range(1, 40, 4))]


async def test_a_ceiling_that_falls_counts_for_the_next_batch(start: Start) -> None:
    engine, batcher, first = await holding(start)
    tasks = await submitted(batcher, *range(1, 6))
    engine.max_batch_size = 2  # as an engine does that has run out of memory
    engine.let_go()
    assert await numbers([first, *tasks]) == list(range(6))
    assert engine.batches == [[0], [1, 2], [3, 4], [5]]


async def test_a_large_request_is_answered_in_order_over_several_engines(start: Start) -> None:
    engines = [FakeEngine(max_batch_size=4, tag=tag) for tag in range(2)]
    batcher = start(*engines)
    predictions = await batcher.submit_many([picture(number) for number in range(50)])
    assert [int(prediction.logits[0]) for prediction in predictions] == list(range(50))
    assert {int(prediction.logits[1]) for prediction in predictions} == {0, 1}


async def test_a_single_picture_is_in_the_next_batch_after_a_large_request(start: Start) -> None:
    engine, batcher, first = await holding(start)
    large = asyncio.create_task(batcher.submit_many([picture(number) for number in range(100, 164)]))
    await asyncio.sleep(0)
    engine.release()
    await begun(engine)  # a batch of the large request runs
    (single,) = await submitted(batcher, 7)
    engine.release()
    await begun(engine)
    assert 7 in engine.batches[2]
    engine.let_go()
    await asyncio.gather(first, single, large)
    assert sum(map(len, engine.batches)) == 66


async def test_an_incomplete_batch_waits_only_if_it_is_told_to(start: Start) -> None:
    engine = FakeEngine(max_batch_size=3)
    batcher = start(engine, max_queue_delay_ms=60_000)
    tasks = await submitted(batcher, 1, 2)
    await asyncio.sleep(0.02)
    assert engine.batches == []
    tasks += await submitted(batcher, 3)  # full: no reason to wait
    assert await numbers(tasks) == [1, 2, 3]
    assert engine.batches == [[1, 2, 3]]


async def test_the_wait_for_more_ends(start: Start) -> None:
    engine = FakeEngine(max_batch_size=3)
    prediction = await start(engine, max_queue_delay_ms=30).submit(picture(1))
    assert prediction.queue_seconds >= 0.029
    assert engine.batches == [[1]]


async def test_the_wait_for_more_does_not_lose_those_that_are_left(start: Start) -> None:
    engine = FakeEngine(max_batch_size=2)
    batcher = start(engine, max_queue_delay_ms=20)
    assert await numbers(await submitted(batcher, *range(5))) == list(range(5))
    assert engine.batches == [[0, 1], [2, 3], [4]]


async def test_an_empty_request_has_an_empty_answer(start: Start) -> None:
    assert await start(FakeEngine()).submit_many([]) == []


@pytest.mark.parametrize("image", [tiny_images(1), tiny_images(1)[0, 1:], tiny_images(1)[0].astype(np.float32)])
async def test_a_picture_of_another_form_is_kept_out_of_the_batch(start: Start, image: Images) -> None:
    engine = FakeEngine()
    batcher = start(engine)
    with pytest.raises(ValueError, match=r"must be uint8 \(4, 6, 3\)"):
        await batcher.submit_many([picture(1), image])
    assert int((await batcher.submit(picture(2))).logits[0]) == 2
    assert engine.batches == [[2]]


# Cancellation and deadlines


async def test_what_is_cancelled_while_queued_never_runs(start: Start) -> None:
    notes = Notes()
    engine, batcher, first = await holding(start, observer=notes)
    gone, stays = await submitted(batcher, 1, 2)
    gone.cancel()
    engine.release(2)
    assert await numbers([first, stays]) == [0, 2]
    assert engine.batches == [[0], [2]]
    assert gone.cancelled()
    assert notes.drops == {"cancelled": 1}


async def test_a_queue_of_nothing_but_the_cancelled_is_emptied(start: Start) -> None:
    notes = Notes()
    engine, batcher, first = await holding(start, observer=notes)
    for task in await submitted(batcher, 1, 2, 3):
        task.cancel()
    engine.let_go()
    await first
    await batcher.drain()
    assert engine.batches == [[0]]
    assert notes.drops == {"cancelled": 3}
    assert batcher.queue_length == 0


async def test_what_is_cancelled_while_it_runs_harms_nobody(start: Start) -> None:
    engine, batcher, first = await holding(start)
    gone, stays = await submitted(batcher, 1, 2)
    engine.release()
    await begun(engine)
    gone.cancel()
    engine.let_go()
    assert await numbers([first, stays]) == [0, 2]
    assert gone.cancelled()
    assert int((await batcher.submit(picture(3))).logits[0]) == 3


async def test_what_expires_in_the_queue_never_runs(start: Start) -> None:
    notes = Notes()
    engine, batcher, first = await holding(start, observer=notes)
    now = asyncio.get_running_loop().time()
    (late,) = await submitted(batcher, 1, deadline=now)
    (patient,) = await submitted(batcher, 2, deadline=now + 60)
    engine.release(2)
    with pytest.raises(DeadlineExceeded):
        await late
    assert await numbers([first, patient]) == [0, 2]
    assert engine.batches == [[0], [2]]
    assert notes.drops == {"deadline": 1}


async def test_what_has_begun_in_time_is_answered_late(start: Start) -> None:
    engine = FakeEngine()
    engine.hold()
    loop = asyncio.get_running_loop()
    deadline = loop.time() + 0.3
    (task,) = await submitted(start(engine), 1, deadline=deadline)
    await begun(engine)
    await asyncio.sleep(deadline - loop.time() + 0.01)
    engine.release()
    assert await numbers([task]) == [1]


# Failures


async def test_a_failing_batch_fails_its_own_members_alone(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    notes = Notes()
    engine, batcher, first = await holding(start, observer=notes)
    engine.fail = lambda batch: RuntimeError("the device says no") if 2 in batch else None
    bad = await submitted(batcher, 1, 2, 3, 4)
    good = await submitted(batcher, 5, 6)
    engine.let_go()
    outcomes = await asyncio.gather(*bad, return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [InferenceFailed] * 4
    assert await numbers([first, *good]) == [0, 5, 6]
    assert notes.failed_batches == [4]
    assert "the device says no" in caplog.text
    assert not batcher.failed.is_set()


async def test_a_large_request_fails_with_the_first_of_its_batches_and_the_rest_never_runs(start: Start) -> None:
    engine, batcher, first = await holding(start)
    engine.fail = lambda batch: RuntimeError("no") if 1 in batch else None
    large = asyncio.create_task(batcher.submit_many([picture(number) for number in range(1, 11)]))
    await asyncio.sleep(0)
    engine.let_go()
    with pytest.raises(InferenceFailed):
        await large
    await first
    assert int((await batcher.submit(picture(99))).logits[0]) == 99
    assert engine.batches == [[0], [1, 2, 3, 4], [99]]


async def test_an_engine_that_gives_too_few_answers_fails_the_batch(start: Start) -> None:
    class Forgetful(FakeEngine):
        def run(self, images: Images) -> Logits:
            return super().run(images)[1:]

    with pytest.raises(InferenceFailed):
        await start(Forgetful()).submit(picture(1))


async def test_an_engine_that_keeps_failing_fails_the_batcher(start: Start) -> None:
    reasons: list[str] = []
    engine = FakeEngine()
    engine.fail = lambda batch: RuntimeError("the device has gone")
    batcher = start(engine, max_failures=3, on_failure=reasons.append)
    for _ in range(3):
        assert not batcher.failed.is_set()
        with pytest.raises(InferenceFailed):
            await batcher.submit(picture(1))
    assert batcher.failed.is_set()
    assert reasons == [batcher.failure]
    assert "3 batches failed in a row, the last with RuntimeError('the device has gone')" in batcher.failure
    with pytest.raises(NotReady):
        await batcher.submit(picture(1))


async def test_failures_that_are_not_in_a_row_do_not(start: Start) -> None:
    engine = FakeEngine()
    engine.fail = lambda batch: RuntimeError("odd") if batch[0] % 2 else None
    batcher = start(engine, max_failures=2)
    for number in range(8):
        with suppress(InferenceFailed):
            await batcher.submit(picture(number))
    assert not batcher.failed.is_set()
    assert int((await batcher.submit(picture(8))).logits[0]) == 8


async def test_an_engine_that_hangs_is_found_out(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    notes = Notes()
    engine, batcher, first = await holding(start, observer=notes, run_timeout_ms=300)
    queued = await submitted(batcher, 1, 2)
    await asyncio.wait_for(batcher.failed.wait(), 5)
    outcomes = await asyncio.gather(first, *queued, return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [InferenceFailed] * 3
    assert "did not end within 0.3 s" in batcher.failure
    assert batcher.failure in caplog.text
    assert notes.failed_batches == [1]
    with pytest.raises(NotReady):
        await batcher.submit(picture(3))
    engine.release()  # it comes back too late
    await batcher.on_each_engine(lambda engine: None)  # behind it in the thread, and behind its end in the loop
    assert notes.batches == []
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
    assert batcher.failed.is_set()
    draining = asyncio.create_task(batcher.drain())
    healthy.let_go()
    assert await numbers([saved]) == [2]
    await draining


async def test_a_run_that_ends_in_time_leaves_no_watchdog_behind(start: Start) -> None:
    batcher = start(FakeEngine(), run_timeout_ms=250)
    for number in range(5):
        await batcher.submit(picture(number))
    await asyncio.sleep(0.3)
    assert not batcher.failed.is_set()


def test_times_are_finer_than_uvloops_clock_of_whole_milliseconds() -> None:
    async def predict() -> Prediction:
        batcher = DynamicBatcher([FakeEngine(delay=0.0015)])
        batcher.start()
        prediction = await batcher.submit(picture(1))
        await batcher.close()
        return prediction

    prediction = uvloop.run(predict())
    assert 0 < prediction.queue_seconds % 0.001 < 0.000999
    assert 0 < prediction.inference_seconds % 0.001 < 0.000999


@pytest.mark.parametrize("method", ["dropped", "batch", "queued", "failed_batch"])
async def test_if_the_loop_dies_nobody_waits_for_ever(start: Start, method: str) -> None:
    """Nothing in the loop can raise but an observer; each of its methods is made to."""
    notes = Notes()
    engine, batcher, first = await holding(start, observer=notes)
    gone, *queued = await submitted(batcher, *range(1, 11))
    gone.cancel()
    notes.broken = {method}
    engine.fail = lambda batch: RuntimeError("no") if method == "failed_batch" else None
    engine.let_go()
    await asyncio.wait_for(batcher.failed.wait(), 5)
    outcomes = await asyncio.gather(first, *queued, return_exceptions=True)
    assert len(outcomes) == 10
    assert all(isinstance(outcome, Prediction | InferenceFailed) for outcome in outcomes)
    assert isinstance(outcomes[-1], InferenceFailed)
    with pytest.raises(NotReady):
        await batcher.submit(picture(11))


async def test_if_the_loop_is_cancelled_from_outside_that_is_noticed(start: Start) -> None:
    engine, batcher, first = await holding(start)
    queued = await submitted(batcher, 1, 2)
    (loop_task,) = [task for task in asyncio.all_tasks() if task.get_name() == "batcher"]
    loop_task.cancel()
    await asyncio.wait_for(batcher.failed.wait(), 5)
    assert "loop has ended" in batcher.failure
    engine.let_go()
    assert await numbers([first]) == [0]  # it was running, and is answered
    assert [type(error) for error in await asyncio.gather(*queued, return_exceptions=True)] == [InferenceFailed] * 2


# The end


async def test_before_the_start_nothing_is_accepted() -> None:
    batcher = DynamicBatcher([FakeEngine()])
    with pytest.raises(NotReady):
        await batcher.submit(picture(1))
    await batcher.close()


async def test_draining_answers_all_that_is_here_and_refuses_what_comes(start: Start) -> None:
    engine, batcher, first = await holding(start)
    tasks = await submitted(batcher, *range(1, 8))
    draining = asyncio.create_task(batcher.drain())
    await asyncio.sleep(0)
    with pytest.raises(Draining):
        await batcher.submit(picture(9))
    assert not draining.done()
    engine.let_go()
    await draining
    assert all(task.done() for task in [first, *tasks])
    assert await numbers([first, *tasks]) == list(range(8))


async def test_draining_an_idle_batcher_ends_at_once(start: Start) -> None:
    batcher = start(FakeEngine())
    await batcher.drain()
    await batcher.drain()


async def test_closing_ends_what_runs_and_refuses_what_waits(start: Start) -> None:
    engine, batcher, first = await holding(start)
    queued = await submitted(batcher, 1, 2)
    closing = asyncio.create_task(batcher.close())
    outcomes = await asyncio.gather(*queued, return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [Draining] * 2
    assert not engine.closed
    engine.let_go()
    await closing
    assert engine.closed
    assert await numbers([first]) == [0]
    assert not batcher.failed.is_set()
    await batcher.close()


# Several engines, threads


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


async def test_each_engine_has_one_thread_of_its_own_for_warm_up_and_runs() -> None:
    engines = [FakeEngine(), FakeEngine()]
    batcher = DynamicBatcher(engines)
    assert await batcher.on_each_engine(lambda engine: engine.warm_up()) == [None, None]
    batcher.start()
    await asyncio.gather(*(batcher.submit(picture(number)) for number in range(64)))
    await batcher.drain()
    await batcher.close()
    assert [len(engine.threads) for engine in engines] == [1, 1]
    assert engines[0].threads != engines[1].threads
    assert all(engine.warmed and engine.closed for engine in engines)


async def test_an_error_in_an_engines_thread_comes_back() -> None:
    def fails(engine: object) -> None:
        raise RuntimeError("the golden pictures differ")

    batcher = DynamicBatcher([FakeEngine()])
    with pytest.raises(RuntimeError, match="golden"):
        await batcher.on_each_engine(fails)
    await batcher.close()


async def test_whoever_stops_waiting_for_an_engines_thread_breaks_nothing() -> None:
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


# All together


async def test_observers_hear_of_every_picture_once(start: Start) -> None:
    notes = Notes()
    engine, batcher, first = await holding(start, observer=notes)
    tasks = await submitted(batcher, *range(1, 6))
    engine.let_go()
    await asyncio.gather(first, *tasks)
    assert notes.batches == [1, 4, 1]
    assert len(notes.waits) == 6
    assert not notes.drops


@pytest.mark.parametrize("seed", range(4))
async def test_in_a_storm_everything_ends_exactly_once_and_with_its_own_answer(start: Start, seed: int) -> None:
    """Singles and large requests, cancelled at any time, late, on engines that fail now and then."""
    chance = random.Random(seed)
    notes = Notes()
    engines = [FakeEngine(max_batch_size=size, delay=0.0005) for size in (1, 3, 8)]
    for engine in engines:
        engine.fail = lambda batch: RuntimeError("unlucky") if chance.random() < 0.05 else None
    batcher = start(*engines, observer=notes, max_failures=1000)
    loop = asyncio.get_running_loop()
    ends: Counter[str] = Counter()
    sent = 0

    async def client() -> None:
        nonlocal sent
        for _ in range(20):
            await asyncio.sleep(chance.random() * 0.004)
            wanted = [chance.randrange(65536) for _ in range(chance.choice([1, 1, 1, 2, 20]))]
            sent += len(wanted)
            deadline = chance.choice([None, loop.time() + chance.random() * 0.02])
            request = asyncio.create_task(batcher.submit_many([picture(n) for n in wanted], deadline=deadline))
            if chance.random() < 0.2:
                loop.call_later(chance.random() * 0.01, request.cancel)
            (outcome,) = await asyncio.gather(request, return_exceptions=True)
            ends[type(outcome).__name__] += 1
            if not isinstance(outcome, BaseException):
                assert [int(prediction.logits[0]) for prediction in outcome] == wanted

    await asyncio.gather(*(client() for _ in range(25)))
    await batcher.drain()
    assert ends.total() == 500
    assert set(ends) == {"list", "CancelledError", "DeadlineExceeded", "InferenceFailed"}
    ran = sum(notes.batches) + sum(notes.failed_batches)
    assert (
        ran
        == sum(len(batch) for engine in engines for batch in engine.batches)
        == len(notes.waits) + sum(notes.failed_batches)
    )
    assert ran + notes.drops.total() <= sent  # the rest belongs to requests that had failed already
    assert batcher.queue_length == 0
    assert not batcher.failed.is_set()


async def test_nobody_starves_under_a_stream_of_large_requests(start: Start) -> None:
    engine = FakeEngine(max_batch_size=8)
    batcher = start(engine)
    stop = False

    async def flood() -> None:
        while not stop:
            await batcher.submit_many([picture(1)] * 64)

    floods = [asyncio.create_task(flood()) for _ in range(3)]
    for _ in range(50):
        before = len(engine.batches)
        await batcher.submit(picture(2))
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
            await batcher.submit(picture(1))

    floods = [asyncio.create_task(flood()) for _ in range(32)]
    large: Awaitable[list[Prediction]] = batcher.submit_many([picture(2)] * 64)
    before = len(engine.batches)
    await large
    # 32 small ones and half a batch of the large one in each turn: 16 turns of five batches.
    assert len(engine.batches) - before <= 16 * 5 + 2
    stop = True
    await asyncio.gather(*floods)
