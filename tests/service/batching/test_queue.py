"""The order in which images leave the queue. Futures belong to a loop that need not run."""

import asyncio
import math
from collections.abc import Iterator
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.batching.queue import Batch, FairQueue, PriorityQueue, Request
from service.engine.runners import Outputs
from service.errors import DeadlineExceeded, InferenceFailed
from tests.fakes import CLASSES, image


class Bench:
    """A queue, and requests to put into it."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.queue = FairQueue()

    def put(self, *numbers: int, deadline: float = math.inf) -> Request:
        request = Request([image(number) for number in numbers], self.loop.create_future(), deadline)
        self.queue.put(request)
        return request

    def pop(self, room: int, now: float = 1.0) -> list[int]:
        return numbers_of(self.queue.pop(room, now))


def numbers_of(batch: Batch) -> list[int]:
    numbers = [int(image[0, 0, 0]) * 256 + int(image[0, 0, 1]) for image in batch.images()]
    assert batch.size == len(numbers)
    return numbers


@pytest.fixture
def bench() -> Iterator[Bench]:
    loop = asyncio.new_event_loop()
    yield Bench(loop)
    loop.close()


def test_single_images_leave_in_the_order_they_came(bench: Bench) -> None:
    for number in range(10):
        bench.put(number)
    assert bench.queue.images == 10
    assert [bench.pop(4), bench.pop(4), bench.pop(4)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert bench.queue.images == 0
    assert not bench.queue


def test_a_large_request_alone_fills_batches(bench: Bench) -> None:
    bench.put(*range(10))
    assert [bench.pop(4), bench.pop(4), bench.pop(4)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def test_a_large_request_gives_way_after_half_a_batch(bench: Bench) -> None:
    bench.put(*range(100, 116))
    bench.put(1)
    assert bench.pop(4) == [100, 101, 1, 102]
    bench.put(2)  # comes while the large one is at the front again
    bench.put(3)
    assert bench.pop(4) == [103, 104, 2, 3]


def test_two_large_requests_share(bench: Bench) -> None:
    bench.put(*range(100, 106))
    bench.put(*range(200, 206))
    assert [bench.pop(4), bench.pop(4), bench.pop(4)] == [
        [100, 101, 200, 201],
        [102, 103, 202, 203],
        [104, 105, 204, 205],
    ]


def test_batches_of_one_take_turns(bench: Bench) -> None:
    bench.put(100, 101, 102)
    bench.put(1)
    assert [bench.pop(1) for _ in range(4)] == [[100], [1], [101], [102]]


@given(
    ahead=st.lists(st.integers(1, 200), max_size=6),
    room=st.integers(1, 64),
    behind=st.lists(st.integers(1, 200), max_size=6),
)
def test_each_request_ahead_delays_a_single_image_by_at_most_half_a_batch(
    ahead: list[int], room: int, behind: list[int]
) -> None:
    loop = asyncio.new_event_loop()
    bench = Bench(loop)
    for size in ahead:
        bench.put(*range(1, size + 1))
    bench.put(0)
    for size in behind:
        bench.put(*range(1, size + 1))
    left = 0
    while 0 not in (batch := bench.pop(room)):
        left += len(batch)
    turn = max(1, room // 2)
    assert left + batch.index(0) <= sum(min(size, turn) for size in ahead)
    loop.close()


@given(sizes=st.lists(st.integers(1, 50), min_size=1, max_size=10), rooms=st.lists(st.integers(1, 20), min_size=1))
def test_every_image_leaves_exactly_once_and_every_future_ends_in_order(sizes: list[int], rooms: list[int]) -> None:
    loop = asyncio.new_event_loop()
    bench = Bench(loop)
    ends = np.cumsum(sizes)
    requests = [bench.put(*range(end - size, end)) for size, end in zip(sizes, ends, strict=True)]
    batches = []
    while bench.queue:
        batches.append(bench.queue.pop(rooms[len(batches) % len(rooms)], 1.0))
        assert 1 <= batches[-1].size <= rooms[(len(batches) - 1) % len(rooms)]
    assert sorted(number for batch in batches for number in numbers_of(batch)) == list(range(sum(sizes)))
    for batch in reversed(batches):  # engines may end in any order
        logits = np.repeat(np.array(numbers_of(batch), dtype=np.float32)[:, None], CLASSES, axis=1)
        batch.complete(Outputs(logits), 0.5)
    for request, size, end in zip(requests, sizes, ends, strict=True):
        assert [answer.logits[0] for answer in request.future.result()] == list(range(end - size, end))
    loop.close()


def test_cancelled_requests_are_dropped_and_others_take_their_place(bench: Bench) -> None:
    bench.put(1)
    bench.put(2, 3).future.cancel()
    bench.put(4)
    batch = bench.queue.pop(2, 1.0)
    assert numbers_of(batch) == [1, 4]
    assert batch.dropped == ["cancelled", "cancelled"]
    assert bench.queue.images == 0


def test_expired_requests_are_dropped_with_an_error(bench: Bench) -> None:
    late, on_time = bench.put(1, 2, deadline=5.0), bench.put(3, deadline=5.1)
    batch = bench.queue.pop(4, 5.0)
    assert numbers_of(batch) == [3]
    assert batch.dropped == ["deadline", "deadline"]
    assert isinstance(late.future.exception(), DeadlineExceeded)
    assert not on_time.future.done()


def test_expired_requests_are_dropped_wherever_they_stand(bench: Bench) -> None:
    first, late, gone, last = bench.put(1, deadline=9), bench.put(2, 3, deadline=5), bench.put(4), bench.put(5)
    gone.future.cancel()
    assert bench.queue.drop_expired(5.0) == ["deadline", "deadline", "cancelled"]
    assert isinstance(late.future.exception(), DeadlineExceeded)
    assert not first.future.done()
    assert not last.future.done()
    assert bench.queue.images == 2
    assert bench.pop(4) == [1, 5]


def test_the_rest_of_a_request_that_failed_is_never_run(bench: Bench) -> None:
    request = bench.put(*range(6))
    bench.queue.pop(4, 1.0).fail(InferenceFailed)
    bench.put(7)
    batch = bench.queue.pop(4, 1.0)
    assert numbers_of(batch) == [7]
    assert batch.dropped == []  # neither cancelled nor late
    assert isinstance(request.future.exception(), InferenceFailed)


def test_a_request_that_expires_half_way_ends_once(bench: Bench) -> None:
    request = bench.put(*range(6), deadline=2.0)
    first = bench.queue.pop(4, 1.0)
    assert bench.queue.pop(4, 2.0).dropped == ["deadline", "deadline"]
    first.complete(Outputs(np.zeros((4, CLASSES), dtype=np.float32)), 0.1)
    assert isinstance(request.future.exception(), DeadlineExceeded)


def test_each_request_of_a_failed_batch_has_an_exception_of_its_own(bench: Bench) -> None:
    first, second = bench.put(1), bench.put(2)
    bench.queue.pop(4, 1.0).fail(InferenceFailed)
    assert first.future.exception() is not second.future.exception()  # their tracebacks grow apart


@pytest.mark.parametrize("answered", [True, False])
def test_a_future_that_raises_does_not_harm_other_requests(
    bench: Bench, answered: bool, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = [bench.put(1) for _ in range(3)]

    def burst(_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(
        requests[1],
        "future",
        SimpleNamespace(done=lambda: False, cancelled=lambda: False, set_result=burst, set_exception=burst),
    )
    batch = bench.queue.pop(3, 1.0)
    batch.complete(Outputs(np.zeros((3, 2), np.float32)), 0.1) if answered else batch.fail(InferenceFailed)
    assert [requests[index].future.done() for index in (0, 2)] == [True, True]
    assert "a future refused its result" in caplog.text


def test_failing_all_spares_those_that_have_ended(bench: Bench) -> None:
    cancelled, waiting = bench.put(1), bench.put(2, 3)
    cancelled.future.cancel()
    bench.queue.fail_all(InferenceFailed)
    assert cancelled.future.cancelled()
    assert isinstance(waiting.future.exception(), InferenceFailed)
    assert (bench.queue.images, bool(bench.queue)) == (0, False)


def test_predictions_have_their_times_and_batch_size(bench: Bench) -> None:
    request = bench.put(1, 2)
    batch = bench.queue.pop(4, 1.0)
    request.enqueued, batch.started = 3.0, 4.5
    batch.complete(Outputs(np.zeros((2, CLASSES), dtype=np.float32)), 0.25)
    for prediction in request.future.result():
        assert (prediction.queue_seconds, prediction.inference_seconds, prediction.batch_size) == (1.5, 0.25, 2)


def test_background_requests_wait_until_nothing_else_does(bench: Bench) -> None:
    queue = PriorityQueue()
    background = Request([image(number) for number in range(6)], bench.loop.create_future(), is_background=True)
    queue.put(background)
    queue.put(Request([image(10)], bench.loop.create_future()))
    queue.put(Request([image(11)], bench.loop.create_future()))
    assert queue.images == 8
    assert numbers_of(queue.next.pop(4, 1.0)) == [10, 11]  # never together: the batch would take longer
    assert numbers_of(queue.next.pop(4, 1.0)) == [0, 1, 2, 3]
    queue.put(Request([image(12)], bench.loop.create_future()))
    assert numbers_of(queue.next.pop(4, 1.0)) == [12]
    assert numbers_of(queue.next.pop(4, 1.0)) == [4, 5]
    assert not queue


def test_background_requests_expire_and_fail_as_others(bench: Bench) -> None:
    queue = PriorityQueue()
    requests = [
        Request([image(1)], bench.loop.create_future(), deadline, is_background=is_background)
        for deadline in (5.0, 9.0)
        for is_background in (False, True)
    ]
    for request in requests:
        queue.put(request)
    assert queue.earliest_deadline() == 5.0
    assert queue.drop_expired(6.0) == ["deadline", "deadline"]
    assert queue.images == 2
    queue.fail_all(InferenceFailed)
    assert not queue
    assert [type(request.future.exception()) for request in requests] == [DeadlineExceeded] * 2 + [InferenceFailed] * 2
