"""What was asked of a process that speaks HTTP, and who waits for the answer."""

import asyncio
import logging
import math
import time
from collections.abc import Callable
from typing import Final

from service.messages import Ask

logger = logging.getLogger(__name__)

PATIENCE_SECONDS: Final = 1.0  # that a scrape waits for the newest counts
QUIET_SECONDS: Final = 60.0  # between two warnings


class Asks:
    """The asks of one such process, several at a time: each scrape asks, and so does `FrontProcesses` every second.

    Args:
        row: number of that process.
    """

    def __init__(self, row: int) -> None:
        self._row = row
        self._last = 0
        self._open: dict[int, asyncio.Future[None]] = {}
        self._warned = -math.inf

    async def ask(self, send: Callable[[Ask], None]) -> None:
        """Return when the process has answered, or has ended, or after a while without."""
        self._last = number = self._last + 1
        answered = self._open[number] = asyncio.get_running_loop().create_future()
        send(Ask(number))
        try:
            async with asyncio.timeout(PATIENCE_SECONDS):
                await answered
        except TimeoutError:
            self._warn()
        finally:
            self._open.pop(number, None)

    def answer(self, number: float) -> None:
        """Take note of the answer to an ask, and to all before it: what those ask for has come as well."""
        for one in [one for one in self._open if one <= number]:
            if not (answered := self._open.pop(one)).done():
                answered.set_result(None)

    def end(self) -> None:
        """No answer comes any more."""
        self.answer(math.inf)

    def _warn(self) -> None:
        """Say once in a while that it takes long: a process that hangs is asked again and again."""
        if time.monotonic() - self._warned >= QUIET_SECONDS:
            self._warned = time.monotonic()
            logger.warning("the HTTP process %d takes long to answer", self._row)
