"""The model that another process runs: who waits for it, how long, and what is noted meanwhile."""

import asyncio
import math
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from service.distant import MOST_TIMES, PATIENCE_SECONDS, SILENCE_SECONDS, DistantBatcher, Notes, Waiting
from service.errors import DeadlineExceeded, NotReady, Overloaded
from service.ledger import Ledger
from service.link import Link
from service.messages import Counts, FromEngine, Message
from service.recurring import TICK_SECONDS

PICTURE = bytes(1_000_000)


class Silent(Ledger):
    """A ledger whose maker has been silent for as long as the test says."""

    seconds = 0.0

    def silence(self) -> float:
        return self.seconds


@asynccontextmanager
async def unread(most_unread: int | None = None) -> AsyncIterator[tuple[Link, socket.socket]]:
    """A link, and its other end, which nobody reads."""
    end, other = socket.socketpair()
    link = Link(FromEngine, lambda messages: None, lambda: None, most_unread=most_unread)
    await Link.open(end, link)
    with other:
        yield link, other
        link.close()


async def read_all(end: socket.socket, link: Link) -> None:
    """Read until there is room again."""
    end.setblocking(False)
    async with asyncio.timeout(10):
        while link.is_full:
            await asyncio.get_running_loop().sock_recv(end, 1 << 20)


def future() -> asyncio.Future[object]:
    return asyncio.get_running_loop().create_future()


async def test_a_link_is_full_while_the_other_end_leaves_too_much_unread() -> None:
    async with unread(3_000_000) as (link, other):
        batcher = DistantBatcher(1, link, Waiting(link, Ledger(1)))
        posted = 0
        while not link.is_full:
            batcher.post([PICTURE], future(), math.inf)  # type: ignore[arg-type]
            posted += 1
            await asyncio.sleep(0)
        assert 4 <= posted <= 5  # and what the socket itself has taken
        with pytest.raises(Overloaded) as refused:
            batcher.post([PICTURE], future(), math.inf)  # type: ignore[arg-type]
        assert refused.value.retry_after >= 1
        with pytest.raises(Overloaded):  # other requests as well
            Waiting(link, Ledger(1)).begin(future())  # type: ignore[arg-type]
        await read_all(other, link)
        batcher.post([PICTURE], future(), math.inf)  # type: ignore[arg-type]


async def test_who_was_refused_does_not_wait() -> None:
    async with unread(1000) as (link, _):
        waiting = Waiting(link, Ledger(1))
        batcher = DistantBatcher(1, link, waiting)
        batcher.post([PICTURE], future(), math.inf)  # type: ignore[arg-type]
        await asyncio.sleep(0)
        with pytest.raises(Overloaded):
            batcher.post([PICTURE], future(), math.inf)  # type: ignore[arg-type]
        assert not waiting.give_up(2)


@pytest.mark.parametrize("is_alive", [False, True])
async def test_what_is_too_late_is_said_here_only_while_the_other_process_is_silent(is_alive: bool) -> None:
    """It knows what runs already, and answers that, late as it is."""
    ledger = Ledger(1)
    async with unread() as (link, _):
        waiting = Waiting(link, ledger)
        now = asyncio.get_running_loop().time()
        late, early, never = future(), future(), future()
        waiting.begin(late, now + 0.01)  # type: ignore[arg-type]
        waiting.begin(early, now + 600)  # type: ignore[arg-type]
        waiting.begin(never)  # type: ignore[arg-type]
        until = now + SILENCE_SECONDS + 5 * TICK_SECONDS
        while asyncio.get_running_loop().time() < until and not late.done():
            if is_alive:
                ledger.beat()
            await asyncio.sleep(TICK_SECONDS / 4)
        assert late.done() is not is_alive
        assert not early.done()
        assert not never.done()
        if not is_alive:
            with pytest.raises(DeadlineExceeded):
                late.result()
            early.cancel()


async def test_who_has_no_deadline_is_told_when_the_other_process_is_silent_for_long() -> None:
    ledger = Silent(1)
    async with unread(1000) as (link, other):
        waiting = Waiting(link, ledger)
        call, early = future(), future()
        waiting.begin(call)  # type: ignore[arg-type]
        waiting.begin(early, 1e12)  # type: ignore[arg-type]
        ledger.seconds = PATIENCE_SECONDS + 0.1
        with pytest.raises(NotReady, match="does not answer"):
            async with asyncio.timeout(10):
                await call
        assert not early.done()
        DistantBatcher(1, link, waiting).post([PICTURE], early, 1e12)  # type: ignore[arg-type]
        await asyncio.sleep(0)
        assert link.is_full
        with pytest.raises(NotReady, match="does not answer"):  # and not that a queue is full
            waiting.begin(future())  # type: ignore[arg-type]
        ledger.seconds = 0
        await read_all(other, link)
        waiting.begin(future())  # type: ignore[arg-type]
        early.cancel()


def test_another_process_sees_that_one_is_silent_and_the_numbers_are_not_touched_by_it() -> None:
    ledger = Ledger(2)
    before = ledger.silence()
    ledger.beat()
    assert ledger.silence() < before
    assert [ledger.total(column) for column in range(5)] == [0] * 5


class Broken:
    """An outcome that can't be ended."""

    def done(self) -> bool:
        return False

    def set_result(self, result: object) -> None:
        raise RuntimeError("broken")

    set_exception = set_result


@pytest.mark.parametrize("end", ["answer", "refusal", "the other process"])
async def test_an_outcome_that_fails_does_not_take_the_others_along(caplog: pytest.LogCaptureFixture, end: str) -> None:
    async with unread() as (link, _):
        waiting = Waiting(link, Ledger(1))
        last = future()
        for outcome in (Broken(), last):
            waiting.begin(outcome)  # type: ignore[arg-type]
        if end == "the other process":
            waiting.fail_all(DeadlineExceeded)
        for number in (1, 2):
            if end == "answer":
                waiting.end(number, [])
            else:
                waiting.fail(number, DeadlineExceeded())
        assert last.done()
        last.exception()
        assert "an answer could not be given" in caplog.text


# What happened, until it is told


class Heard:
    """A link that keeps what it is to send."""

    def __init__(self) -> None:
        self.messages: list[Message] = []
        self.is_full = False

    def send(self, message: Message) -> None:
        self.messages.append(message)

    def wake(self) -> None:
        pass


def times(heard: Heard) -> list[int]:
    return [len(message.request_seconds) for message in heard.messages if isinstance(message, Counts)]


def test_times_are_told_before_there_are_too_many_of_them() -> None:
    heard = Heard()
    notes = Notes(heard)  # type: ignore[arg-type]
    for number in range(2 * MOST_TIMES + 1):
        notes.predicted(0.1, str(number))
    assert times(heard) == [MOST_TIMES, MOST_TIMES]
    notes.send()
    assert times(heard) == [MOST_TIMES, MOST_TIMES, 1]


def test_times_that_nobody_reads_do_not_pile_up_and_the_numbers_are_not_lost() -> None:
    heard = Heard()
    notes = Notes(heard)  # type: ignore[arg-type]
    heard.is_full = True
    for number in range(2 * MOST_TIMES + 1):
        notes.request("/predict", 503)
        notes.decoded(0.1)
        notes.predicted(0.1, str(number))
    assert heard.messages == []
    heard.is_full = False
    notes.send()
    (counts,) = heard.messages
    assert isinstance(counts, Counts)
    assert counts.answered == [("/predict", 503, 2 * MOST_TIMES + 1)]
    assert (len(counts.request_seconds), len(counts.decode_seconds)) == (1, 1)
