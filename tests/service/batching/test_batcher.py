"""Batches: how they form, and in which order they are answered. Order comes from events, never from sleeping."""

import asyncio

import numpy as np
import pytest

from tests.fakes import FakeEngine, Images, image, tiny_images
from tests.service.batchers import Start, begun, classify, classify_many, holding, numbers, submitted


async def test_an_image_gets_its_prediction(start: Start) -> None:
    prediction = await classify(start(FakeEngine()), image(1234))
    assert prediction.logits.tolist() == [1234, 0, 0, 0, 0]
    assert prediction.batch_size == 1
    assert prediction.queue_seconds >= 0
    assert prediction.inference_seconds > 0


async def test_images_that_come_together_run_together_in_order(start: Start) -> None:
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


class Answer:
    """A future whose result takes long to write: until the engine has begun another run."""

    def __init__(self, engine: FakeEngine) -> None:
        self._engine = engine
        self._is_done = False
        self.ran_meanwhile: list[bool] = []

    def done(self) -> bool:
        return self._is_done

    def cancelled(self) -> bool:
        return False

    def set_result(self, _result: object) -> None:
        self._is_done = True
        self.ran_meanwhile.append(self._engine.runs.acquire(timeout=5))

    def set_exception(self, exception: Exception) -> None:
        raise exception


async def test_the_next_batch_runs_while_answers_are_written(start: Start) -> None:
    engine = FakeEngine(max_batch_size=1)
    engine.hold()
    batcher = start(engine)
    answer = Answer(engine)
    batcher.submit([image(0).data], answer)
    await begun(engine)
    tasks = await submitted(batcher, 1)
    engine.let_go()
    assert await numbers(tasks) == [1]
    assert answer.ran_meanwhile == [True]


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
    predictions = await classify_many(batcher, [image(number) for number in range(50)])
    assert [int(prediction.logits[0]) for prediction in predictions] == list(range(50))
    assert {int(prediction.logits[1]) for prediction in predictions} == {0, 1}


async def test_a_single_image_is_in_the_next_batch_after_a_large_request(start: Start) -> None:
    engine, batcher, first = await holding(start)
    large = asyncio.create_task(classify_many(batcher, [image(number) for number in range(100, 164)]))
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


async def test_an_incomplete_batch_waits_only_with_a_queue_delay(start: Start) -> None:
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
    prediction = await classify(start(engine, max_queue_delay_ms=30), image(1))
    assert prediction.queue_seconds >= 0.029
    assert engine.batches == [[1]]


async def test_the_wait_for_more_ends_before_a_deadline(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.batching.batcher.TICK_SECONDS", 10.0)  # a busy machine needs more than two real ones
    engine = FakeEngine(max_batch_size=3)
    batcher = start(engine, max_queue_delay_ms=60_000)
    loop = asyncio.get_running_loop()
    patient = await submitted(batcher, 1)
    hurried = asyncio.create_task(classify(batcher, image(2), deadline=loop.time() + 20.2))
    assert await numbers([*patient, hurried]) == [1, 2]
    assert engine.batches == [[1, 2]]


async def test_the_wait_for_more_does_not_lose_those_that_are_left(start: Start) -> None:
    engine = FakeEngine(max_batch_size=2)
    batcher = start(engine, max_queue_delay_ms=20)
    assert await numbers(await submitted(batcher, *range(5))) == list(range(5))
    assert engine.batches == [[0, 1], [2, 3], [4]]


@pytest.mark.parametrize(
    "other",
    [tiny_images(2), tiny_images(1)[0, 1:], tiny_images(1)[0].astype(np.float32)],
)
async def test_an_image_of_another_form_is_kept_out_of_the_batch(start: Start, other: Images) -> None:
    engine = FakeEngine()
    batcher = start(engine)
    with pytest.raises(ValueError, match="must have 72 bytes, and has"):
        await classify_many(batcher, [image(1), other])
    assert int((await classify(batcher, image(2))).logits[0]) == 2
    assert engine.batches == [[2]]
