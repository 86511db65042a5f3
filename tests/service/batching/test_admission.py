from collections.abc import Iterator
from contextlib import contextmanager

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


def test_a_quiet_time_fades_the_peak_and_does_not_end_it(clock: Clock) -> None:
    admission = Admission(1000, 0, clock=clock)
    ticket = enter(admission, 100)
    clock.now += 1
    ticket.release()
    ticket = enter(admission, 1)  # one image in a second shows how many came, not how many could
    clock.now += 1
    ticket.release()
    enter(admission, 400)
    assert admission.retry_after() == pytest.approx(400 / 80)


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
