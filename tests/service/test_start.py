"""What signals ask of the service where HTTP has processes of its own."""

import asyncio
import signal
from types import SimpleNamespace

from service.start import Stopping


async def test_the_first_signal_has_the_service_leave_in_the_same_turn_and_the_second_ends_it() -> None:
    service = SimpleNamespace(leaving=False)
    stopping = Stopping(service)  # type: ignore[arg-type]
    try:
        signal.raise_signal(signal.SIGTERM)
        async with asyncio.timeout(10):
            while not stopping.asked:  # noqa: ASYNC110 - a signal
                await asyncio.sleep(0)
        assert service.leaving  # before anybody can see that an HTTP process has ended of the same signal
        assert not stopping.at_once
        signal.raise_signal(signal.SIGINT)
        async with asyncio.timeout(10):
            while not stopping.at_once:  # noqa: ASYNC110 - a signal
                await asyncio.sleep(0)
    finally:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            asyncio.get_running_loop().remove_signal_handler(number)
