"""One timer for many deadlines."""

import asyncio

from service.batching.timer import Timer


async def test_it_polls_while_work_is_left() -> None:
    left = [3]
    ended = asyncio.Event()

    def poll() -> bool:
        left[0] -= 1
        if not left[0]:
            ended.set()
        return left[0] > 0

    timer = Timer(poll, 0.001)
    timer.wake()
    timer.wake()  # schedules no second call
    async with asyncio.timeout(10):
        await ended.wait()
    await asyncio.sleep(0.01)
    assert left == [0]
    timer.wake()
    await asyncio.sleep(0.01)
    assert left[0] < 0


async def test_a_stopped_timer_does_not_poll_until_woken() -> None:
    polls = 0

    def poll() -> bool:
        nonlocal polls
        polls += 1
        return True

    timer = Timer(poll, 0.001)
    timer.stop()
    timer.wake()
    timer.stop()
    await asyncio.sleep(0.01)
    assert polls == 0
    timer.wake()
    async with asyncio.timeout(10):
        while polls < 3:  # noqa: ASYNC110 - it is what is counted
            await asyncio.sleep(0.001)
    timer.stop()
    before = polls
    await asyncio.sleep(0.01)
    assert polls == before
