import math
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.batching.admission import MAX_RETRY_AFTER_SECONDS, Admission, Ticket
from service.errors import BodyTooLarge, Overloaded, ServiceError, TooManyImages


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def enter(admission: Admission, images: int = 1, size: int = 0) -> Ticket:
    ticket = Ticket(admission)
    ticket.add(images=images, bytes=size)
    return ticket


@contextmanager
def admitted(admission: Admission, images: int = 1, size: int = 0) -> Iterator[Ticket]:
    ticket = enter(admission, images, size)
    try:
        yield ticket
    finally:
        ticket.release()


def test_room_is_counted_while_a_request_is_served_and_given_back_however_it_ends() -> None:
    admission = Admission(10, 1000)
    with admitted(admission, images=2, size=300):
        assert (admission.images, admission.bytes) == (2, 300)
    with pytest.raises(ZeroDivisionError), admitted(admission, images=10, size=1000):
        1 / 0  # noqa: B018 - the point is that it raises
    assert (admission.images, admission.bytes) == (0, 0)


@pytest.mark.parametrize(("images", "size"), [(3, 0), (1, 800)])
def test_a_request_beyond_a_bound_is_refused_and_counts_nothing(images: int, size: int) -> None:
    admission = Admission(4, 1000)
    with admitted(admission, images=2, size=300):
        with pytest.raises(Overloaded) as refused, admitted(admission, images=images, size=size):
            pytest.fail("it was let in")
        assert refused.value.retry_after >= 1
        assert (admission.images, admission.bytes) == (2, 300)
        with admitted(admission, images=2, size=700):  # exactly full
            assert (admission.images, admission.bytes) == (4, 1000)


def test_a_request_grows_while_it_is_read() -> None:
    admission = Admission(4, 1000)
    with admitted(admission, size=100) as ticket:
        ticket.add(images=2, bytes=100)
        assert (ticket.images, ticket.bytes) == (admission.images, admission.bytes) == (3, 200)
        with admitted(admission), pytest.raises(Overloaded):
            ticket.add(images=1)
        assert (admission.images, admission.bytes) == (3, 200)
    assert (admission.images, admission.bytes) == (0, 0)


def test_a_request_that_exceeds_the_bounds_alone_gets_no_retry_after() -> None:
    admission = Admission(4, 1000)
    with pytest.raises(TooManyImages, match="at most 4 images"), admitted(admission, images=5):
        pytest.fail("it was let in")
    with admitted(admission, images=3, size=900) as ticket:
        with pytest.raises(TooManyImages):
            ticket.add(images=2)
        with pytest.raises(BodyTooLarge, match="at most 1000 bytes"):
            ticket.add(bytes=101)
    assert (admission.images, admission.bytes) == (0, 0)


def test_retry_after_is_what_is_in_flight_over_the_measured_rate(clock: Clock) -> None:
    admission = Admission(100, 0, clock=clock)
    tickets = [enter(admission, 10) for _ in range(10)]
    for ticket in tickets[:5]:
        clock.now += 0.5
        ticket.release()  # 20 images a second
    assert admission.images == 50
    assert admission.retry_after() == pytest.approx(50 / 20)
    enter(admission, 50)
    with pytest.raises(Overloaded) as refused:
        enter(admission, 1)
    assert refused.value.retry_after == pytest.approx(100 / 20)


@pytest.mark.parametrize("whole", [True, False])
def test_the_rate_in_bytes_counts_when_bytes_are_full(clock: Clock, whole: bool) -> None:
    """Bodies that are still read hold bytes, and no images yet."""
    admission = Admission(100, 1000, clock=clock)
    tickets = [enter(admission, 1, 100), *(enter(admission, 0, 100) for _ in range(9))]
    clock.now += 2 if whole else 0.5
    tickets.pop().release()
    rate = 50 if whole else 200
    assert admission.retry_after(100) == 1  # there is room for that
    with pytest.raises(Overloaded) as refused:
        enter(admission, 0, 101)
    assert refused.value.retry_after == pytest.approx(900 / rate)


def test_the_rate_in_bytes_does_not_count_when_images_are_full(clock: Clock) -> None:
    admission = Admission(10, 1000, clock=clock)
    ticket, _ = enter(admission, 5, 5), enter(admission, 5, 900)
    clock.now += 1
    ticket.release()
    enter(admission, 5)
    with pytest.raises(Overloaded) as refused:
        enter(admission, 1)
    assert refused.value.retry_after == pytest.approx(10 / 5)


def test_the_first_seconds_rate_counts_before_that_second_is_over(clock: Clock) -> None:
    admission = Admission(100, 0, clock=clock)
    ticket, _ = enter(admission, 10), enter(admission, 80)
    clock.now += 0.5
    ticket.release()  # 20 a second so far
    assert admission.retry_after() == pytest.approx(80 / 20)


def test_batches_that_leave_at_once_are_no_higher_rate_at_any_moment(clock: Clock) -> None:
    admission = Admission(512, 0, clock=clock)
    inside = [enter(admission) for _ in range(512)]
    for number in range(8):
        clock.now += 0.5
        for _ in range(32):  # 64 images a second
            inside.pop(0).release()
        inside += [enter(admission) for _ in range(32)]
        for _ in range(4 if number > 2 else 0):
            assert admission.retry_after() == pytest.approx(512 / 64, rel=0.05)
            clock.now += 0.1
        clock.now -= 0.4 if number > 2 else 0


def test_before_anything_is_measured_it_is_a_second(clock: Clock) -> None:
    admission = Admission(1, 0, clock=clock)
    enter(admission)
    assert admission.retry_after() == 1


def test_it_is_never_shorter_than_a_second_nor_longer_than_a_minute(clock: Clock) -> None:
    fast, slow = Admission(1000, 0, clock=clock), Admission(1000, 0, clock=clock)
    for admission, n in ((fast, 900), (slow, 1)):
        ticket, _ = enter(admission, n), enter(admission, 99)
        clock.now += 10
        ticket.release()
    assert fast.retry_after() == pytest.approx(99 / 90)
    assert slow.retry_after() == MAX_RETRY_AFTER_SECONDS
    with admitted(fast, images=1):
        pass
    clock.now += 100
    assert fast.retry_after() >= 1


def test_idle_time_does_not_count_as_slowness(clock: Clock) -> None:
    admission = Admission(1000, 0, clock=clock)
    for _ in range(3):
        ticket = enter(admission, 100)
        clock.now += 1
        ticket.release()  # 100 a second
        clock.now += 3600
    for _ in range(5):
        enter(admission, 100)
    assert admission.retry_after() == pytest.approx(5)


@pytest.mark.parametrize("sign", ["none", "others wait", "a deadline was missed"])
def test_a_slow_second_fades_the_peak_where_it_is_a_sign_of_slowness(clock: Clock, sign: str) -> None:
    admission = Admission(1000, 0, clock=clock)
    ticket = enter(admission, 100)
    clock.now += 1
    ticket.release()
    ticket = enter(admission, 1)  # one image in a second shows how many came, not how many could
    if sign == "others wait":
        enter(admission, 1)
    if sign == "a deadline was missed":
        enter(admission, 1).release(served=False, missed=True)
    clock.now += 1
    ticket.release()
    enter(admission, 400)
    assert admission.retry_after() == pytest.approx(admission.images / (100 if sign == "none" else 80))


# Deadlines


def test_what_can_not_run_before_its_deadline_is_refused_at_once(clock: Clock) -> None:
    admission = Admission(100, 0, max_wait=10, clock=clock)
    Admission(100, 0).check_wait(64, 0.001, 10)  # none is ahead: it may try
    enter(admission, 50)
    admission.check_wait(1, 0.001, 0)  # nothing is known
    admission.check_wait(1, 5, 10)
    with pytest.raises(Overloaded, match=r"about 5 s, and the deadline is in 3 s") as refused:
        admission.check_wait(1, 3, 10)
    assert refused.value.retry_after == pytest.approx(2)  # then 30 are ahead
    with pytest.raises(Overloaded, match="about 6 s"):
        admission.check_wait(11, 5, 10)


def test_what_serving_shows_counts_more_than_what_was_expected(clock: Clock) -> None:
    admission = Admission(100, 0, clock=clock)
    tickets = [enter(admission, 10) for _ in range(5)]
    clock.now += 2
    tickets.pop().release()  # 5 a second
    with pytest.raises(Overloaded, match="about 8 s"):
        admission.check_wait(1, 7, 1000)


def test_what_was_not_served_is_no_sign_of_speed(clock: Clock) -> None:
    admission = Admission(100, 0, clock=clock)
    tickets = [enter(admission, 10) for _ in range(5)]
    clock.now += 2
    for ticket in tickets[:3]:
        ticket.release(served=ticket is tickets[0])
    assert admission.retry_after() == pytest.approx(20 / 5)


def test_retry_after_is_never_longer_than_anything_waits(clock: Clock) -> None:
    admission = Admission(100, 0, max_wait=10, clock=clock)
    ticket, _ = enter(admission, 1), enter(admission, 99)
    clock.now += 5
    ticket.release()
    assert admission.retry_after() == 10
    with pytest.raises(Overloaded) as refused:
        admission.check_wait(1, 1, 0)
    assert refused.value.retry_after == 10


def test_rare_requests_are_no_sign_of_slowness(clock: Clock) -> None:
    """One at a time, each for two seconds: a burst of a hundred may come."""
    admission = Admission(512, 0, clock=clock)
    for _ in range(100):
        admission.check_wait(1, 10, 100)
        ticket = enter(admission)
        clock.now += 2
        ticket.release()
        clock.now += 10
    enter(admission, 100)
    admission.check_wait(1, 10, 100)


def test_background_images_are_never_ahead_and_no_sign_of_slowness(clock: Clock) -> None:
    admission = Admission(100, 0, clock=clock)
    background = Ticket(admission, is_background=True)
    background.add(images=32)
    for _ in range(20):  # rare ones, which an explanation accompanies
        admission.check_wait(1, 0.5, 10)
        ticket = enter(admission)
        clock.now += 1
        ticket.release()
    background.release(served=False, missed=True)
    enter(admission, 5)
    admission.check_wait(1, 0.5, 10)


def test_background_images_leave_half_of_the_room(clock: Clock) -> None:
    admission = Admission(100, 0, clock=clock)
    tickets = [Ticket(admission, is_background=True) for _ in range(2)]
    tickets[0].add(images=32)
    with pytest.raises(Overloaded):
        tickets[1].add(images=32)
    tickets[0].add(images=32)  # none but its own: it may have more
    with admitted(admission, 36):
        assert (admission.images, admission.background_images) == (100, 64)
    for ticket in tickets:
        ticket.release()
    assert admission.images == admission.background_images == 0


@pytest.mark.parametrize("timeout", [10.0, 1.0])
@pytest.mark.parametrize(("rate", "batch"), [(24, 4), (24, 1), (200, 32)])
@pytest.mark.parametrize(("factor", "expected"), [(1.5, 1), (10, 1), (10, 0), (10, 2)])
def test_of_those_that_are_accepted_nearly_all_meet_their_deadline(
    clock: Clock, timeout: float, rate: int, batch: int, factor: float, expected: float
) -> None:
    """An engine of so many images a second, in an open loop of several times as many requests.

    What was expected of it is right, unknown, or twice as much.
    """
    random, admission = Random(0), Admission(512, 0, max_wait=timeout, clock=clock)
    end, next_request, next_batch = clock.now + 30, clock.now, math.inf
    waiting: deque[tuple[Ticket, float]] = deque()
    running: list[Ticket] = []
    outcomes: Counter[str] = Counter()
    while clock.now < end:
        clock.now = min(next_request, next_batch)
        if clock.now == next_batch:
            for ticket in running:
                ticket.release(served=True)
            outcomes["in time"] += len(running)
        else:
            next_request += random.expovariate(factor * rate)
            try:
                admission.check_wait(1, timeout, expected * rate)
                waiting.append((enter(admission), clock.now + timeout))
            except Overloaded as refused:
                outcomes["refused"] += 1
                outcomes["of no honest Retry-After"] += not 1 <= refused.retry_after <= timeout
        if clock.now == next_batch or next_batch == math.inf:
            running = []
            while waiting and len(running) < batch:
                ticket, deadline = waiting.popleft()
                if deadline >= clock.now:
                    running.append(ticket)
                else:
                    ticket.release(served=False, missed=True)
                    outcomes["late"] += clock.now > end - 15  # it has had the time to learn
            next_batch = clock.now + len(running) / rate if running else math.inf
    assert outcomes["late"] <= 0.02 * outcomes["in time"], outcomes
    assert outcomes["in time"] >= 0.9 * 30 * rate, outcomes  # and the engine is hardly ever idle for it
    assert outcomes["refused"] > 0 or factor < 2
    assert not outcomes["of no honest Retry-After"]


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 600), st.booleans()), max_size=40))
def test_the_bounds_hold_and_nothing_is_lost(steps: list[tuple[int, int, bool]]) -> None:
    admission = Admission(10, 1000)
    inside: list[Ticket] = []
    for images, size, goes in steps:
        if goes and inside:
            inside.pop(images % len(inside)).release()
        try:
            ticket = enter(admission, images, size)
        except ServiceError:
            continue
        finally:
            assert 0 <= admission.images <= 10
            assert 0 <= admission.bytes <= 1000
        inside.append(ticket)
    assert admission.images == sum(ticket.images for ticket in inside)
    for ticket in inside:
        ticket.release()
    assert (admission.images, admission.bytes) == (0, 0)
