"""One timer for many deadlines."""

import asyncio

from service.batching.timer import Timer


async def test_it_looks_again_while_something_is_left() -> None:
    left = [3]
    looked = asyncio.Event()

    def look() -> bool:
        left[0] -= 1
        if not left[0]:
            looked.set()
        return left[0] > 0

    looks = Timer(look, 0.001)
    looks.wake()
    looks.wake()  # it is one timer all the same
    async with asyncio.timeout(10):
        await looked.wait()
    await asyncio.sleep(0.01)
    assert left == [0]
    looks.wake()
    await asyncio.sleep(0.01)
    assert left[0] < 0


async def test_a_stopped_one_looks_no_more_until_woken() -> None:
    looks = 0

    def look() -> bool:
        nonlocal looks
        looks += 1
        return True

    recurring = Timer(look, 0.001)
    recurring.stop()
    recurring.wake()
    recurring.stop()
    await asyncio.sleep(0.01)
    assert looks == 0
    recurring.wake()
    async with asyncio.timeout(10):
        while looks < 3:  # noqa: ASYNC110 - it is what is counted
            await asyncio.sleep(0.001)
    recurring.stop()
    seen = looks
    await asyncio.sleep(0.01)
    assert looks == seen
