"""Who waits for the answer of a process that speaks HTTP."""

import asyncio

from service.asks import Asks
from service.messages import Ask


async def test_an_answer_is_for_its_own_ask_and_for_all_before() -> None:
    asks, sent = Asks(0), list[Ask]()
    waiting = [asyncio.create_task(asks.ask(sent.append)) for _ in range(4)]
    await asyncio.sleep(0)
    assert [message.number for message in sent] == [1, 2, 3, 4]
    asks.answer(2)  # although others have asked since
    await asyncio.wait(waiting[:2], timeout=20)
    assert [one.done() for one in waiting] == [True, True, False, False]
    asks.answer(1)  # again
    asks.end()
    await asyncio.wait(waiting, timeout=20)
    assert all(one.done() for one in waiting)
    assert asks._open == {}
