"""What processes of the service say to each other, and the numbers that they share."""

import asyncio
import math
import os
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import cast

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.admission import Admission
from service.distant import GONE, Waiting
from service.errors import NotReady, Overloaded
from service.front_peer import FrontProcess, Reply
from service.ledger import BYTE_RATE, BYTES, IN_FLIGHT, PICTURES, RATE, Ledger, SharedAdmission, Totals
from service.link import LENGTH_BYTES, Link
from service.messages import Alive, Ask, Cancel, FromEngine, FromFront, Message, Released, Submit
from tests.service.test_admission import Clock

MESSAGES = st.lists(
    st.one_of(
        st.builds(Cancel, st.integers(0, 2**60)),
        st.builds(Released, st.integers(0, 2**60)),
        st.builds(
            Submit,
            st.integers(0, 2**60),
            st.integers(0, 9),
            st.floats(allow_nan=False),
            st.lists(st.binary(max_size=300), max_size=3),
        ),
    ),
    min_size=1,
    max_size=5,
)


class Written:
    """A transport that keeps what is written."""

    def __init__(self) -> None:
        self.data = b""
        self.aborted = False

    def write(self, data: bytes) -> None:
        self.data += data

    def abort(self) -> None:
        self.aborted = True

    def set_write_buffer_limits(self, high: int | None) -> None:
        pass


def link(received: list[Message], kind: object = FromFront) -> tuple[Link, Written]:
    one, transport = Link(kind, received.extend, lambda: None), Written()
    one.connection_made(transport)  # type: ignore[arg-type]
    return one, transport


@given(frames=st.lists(MESSAGES, min_size=1, max_size=4), cuts=st.lists(st.integers(1, 700), min_size=1))
def test_messages_arrive_as_they_were_sent_however_the_stream_is_cut(
    frames: list[list[Message]], cuts: list[int]
) -> None:
    async def send() -> bytes:
        sender, transport = link([])
        for messages in frames:
            for message in messages:
                sender.send(message)
            await asyncio.sleep(0)
        return transport.data

    stream = asyncio.run(send())
    arrived: list[Message] = []
    receiver, _ = link(arrived)
    position = 0
    while position < len(stream):
        cut = cuts[position % len(cuts)]
        receiver.data_received(stream[position : position + cut])
        position += cut
    assert arrived == [message for messages in frames for message in messages]


async def test_what_is_said_in_one_turn_goes_out_at_once() -> None:
    sender, transport = link([])
    for number in range(100):
        sender.send(Cancel(number))
    assert transport.data == b""
    await asyncio.sleep(0)
    assert int.from_bytes(transport.data[:LENGTH_BYTES], "big") == len(transport.data) - LENGTH_BYTES
    assert len(msgspec.msgpack.decode(transport.data[LENGTH_BYTES:])) == 100


@pytest.mark.parametrize(
    "payload", [b"\xc1", msgspec.msgpack.encode([[99, 1]]), msgspec.msgpack.encode([[1, "no number"]]), b""]
)
def test_what_is_no_message_ends_the_link(payload: bytes) -> None:
    arrived: list[Message] = []
    receiver, transport = link(arrived)
    receiver.data_received(len(payload).to_bytes(LENGTH_BYTES, "big") + payload)
    assert transport.aborted
    assert arrived == []


@pytest.mark.parametrize("culprit", ["before_send", "message"])
def test_what_can_not_be_sent_ends_the_link(culprit: str) -> None:
    """And is not lost without a word, while those who wait for it go on waiting."""

    def fail() -> None:
        raise MemoryError

    one = Link(FromFront, lambda messages: None, lambda: None, fail if culprit == "before_send" else lambda: None)
    transport = Written()
    one.connection_made(transport)  # type: ignore[arg-type]
    one._outbox.append(cast("Message", object()))
    one.flush()
    assert transport.aborted


def test_each_side_understands_only_what_the_other_may_say() -> None:
    arrived: list[Message] = []
    receiver, transport = link(arrived, FromEngine)
    payload = msgspec.msgpack.encode([Alive(1)])
    receiver.data_received(len(payload).to_bytes(LENGTH_BYTES, "big") + payload)
    assert (transport.aborted, arrived) == (True, [])


@asynccontextmanager
async def pair(*received: list[Message]) -> AsyncIterator[tuple[Link, Link, asyncio.Event]]:
    ends, lost = socket.socketpair(), asyncio.Event()
    one = Link(FromFront, received[0].extend, lost.set)
    other = Link(FromEngine, received[1].extend, lambda: None)
    await Link.open(ends[0], one)
    await Link.open(ends[1], other)
    yield one, other, lost
    one.close()
    other.close()


async def test_both_ways_over_real_sockets_and_the_end() -> None:
    here: list[Message] = []
    there: list[Message] = []
    big = Submit(1, 1, math.inf, [os.urandom(3_000_000)])
    async with pair(here, there) as (one, other, lost), asyncio.timeout(10):
        other.send(big)
        one.send(Ask(7))
        while not (here and there):  # noqa: ASYNC110 - what is waited for is a list
            await asyncio.sleep(0.001)
        assert (here, there) == ([big], [Ask(7)])
        other.close()
        await lost.wait()
        one.send(Ask(8))  # nobody is there to hear it
        await asyncio.sleep(0.01)


# The ledger


def rows(*numbers: tuple[int, int]) -> Ledger:
    ledger = Ledger(len(numbers))
    for row, (pictures, size) in enumerate(numbers):
        ledger.write(row, PICTURES, pictures)
        ledger.write(row, BYTES, size)
    return ledger


def test_another_process_sees_what_is_written_and_the_sum_of_all() -> None:
    ledger = rows((1, 10), (2, 20), (4, 40))
    same = Ledger(3, os.dup(ledger.descriptor))
    ledger.write(1, IN_FLIGHT, 5)
    assert (same.read(1, IN_FLIGHT), same.total(PICTURES), same.total(BYTES), same.total(IN_FLIGHT)) == (5, 7, 70, 5)
    same.clear(2)
    assert (Totals(ledger).pictures, Totals(ledger).bytes) == (3, 30)


def test_the_limits_hold_for_all_processes_together() -> None:
    ledger = Ledger(2)
    here, there = (SharedAdmission(10, 1000, ledger, row) for row in range(2))
    with here.admit(pictures=6, bytes=100):
        with pytest.raises(Overloaded), there.admit(pictures=5, bytes=1):
            pass
        with pytest.raises(Overloaded), there.admit(pictures=1, bytes=901):
            pass
        with there.admit(pictures=4, bytes=900):
            assert (ledger.total(PICTURES), ledger.total(BYTES)) == (10, 1000)
            with pytest.raises(Overloaded), here.admit(pictures=1):
                pass
    assert (ledger.total(PICTURES), ledger.total(BYTES)) == (0, 0)
    with here.admit(pictures=10, bytes=1000):
        pass


def test_retry_after_counts_what_others_hold_and_answer() -> None:
    ledger = Ledger(2)
    here, _ = (SharedAdmission(400, 1000, ledger, row) for row in range(2))
    ledger.write(0, RATE, 999_000)  # its own, which it knows better
    ledger.write(1, PICTURES, 300)
    ledger.write(1, RATE, 20_000)  # thousandths of a picture a second
    ledger.write(1, BYTES, 800)
    ledger.write(1, BYTE_RATE, 20)
    with here.admit(pictures=100, bytes=200):
        ledger.write(0, RATE, 999_000)
        ledger.write(0, BYTE_RATE, 999)
        assert here.retry_after() == pytest.approx(400 / 20)
        assert here.retry_after(1) == pytest.approx(1000 / 20)


def test_others_learn_the_rates_that_were_measured() -> None:
    ledger = Ledger(2)
    now = 0.0
    here = SharedAdmission(400, 1000, ledger, 0)
    here._clock = lambda: now
    with here.admit(pictures=8, bytes=800):
        now = 2.0
    assert (ledger.read(0, RATE), ledger.read(0, BYTE_RATE)) == (4000, 400)


@given(
    st.lists(
        st.tuples(st.integers(0, 1), st.integers(0, 6), st.integers(0, 60), st.booleans()), min_size=1, max_size=40
    )
)
def test_two_processes_in_turn_admit_what_one_would(steps: Sequence[tuple[int, int, int, bool]]) -> None:
    ledger = Ledger(2)
    several = [SharedAdmission(10, 100, ledger, row) for row in range(2)]
    alone = Admission(10, 100)
    held: list[tuple[object, object]] = []
    for row, pictures, size, leave in steps:
        if leave and held:
            for ticket in held.pop(0):
                ticket.__exit__(None, None, None)  # type: ignore[attr-defined]
            continue
        outcomes = []
        tickets = []
        for admission in (several[row], alone):
            try:
                tickets.append(admission.admit(pictures=pictures, bytes=size).__enter__())
                outcomes.append("in")
            except Overloaded:
                outcomes.append("out")
        assert outcomes[0] == outcomes[1]
        if tickets:
            held.append((tickets[0], tickets[1]))
        assert (ledger.total(PICTURES), ledger.total(BYTES)) == (alone.pictures, alone.bytes)


def test_a_process_that_was_refused_sees_when_there_is_room_again() -> None:
    ledger = Ledger(2)
    here, there = (SharedAdmission(10, 100, ledger, row) for row in range(2))
    with here.admit(pictures=10):
        assert there.is_full()
        with pytest.raises(Overloaded), there.admit():
            pass
    assert not there.is_full()


def test_retry_after_counts_what_is_elsewhere_and_how_fast_it_leaves() -> None:
    ledger = Ledger(2)
    here, there = (SharedAdmission(1000, 100, ledger, row) for row in range(2))
    clock = Clock()
    here._clock = clock
    with here.admit(pictures=100):
        clock.now += 1
    assert there.retry_after() == 1
    with here.admit(pictures=500):
        assert there.is_full() is False
        assert there.retry_after() == pytest.approx(5)
    ledger.clear(0)
    assert there.retry_after() == 1


def test_what_is_posted_when_the_other_process_is_gone_is_refused_and_does_not_wait() -> None:
    waiting = Waiting(link([])[0], Ledger(1))
    waiting.fail_all(lambda: NotReady(GONE))
    with pytest.raises(NotReady):
        waiting.begin(Reply(cast("FrontProcess", None), 1))
