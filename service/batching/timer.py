"""One timer for many deadlines: setting a timer for each request would cost more than most requests wait."""

import asyncio
from collections.abc import Callable
from typing import Final

TICK_SECONDS: Final = 0.02  # how late a deadline may be noticed


class Timer:
    """Calls a function every so often while it has something to look at. Belongs to one event loop.

    Args:
        look: does what is due, and tells whether anything is left to look at.
        seconds: between two looks.
    """

    def __init__(self, look: Callable[[], bool], seconds: float = TICK_SECONDS) -> None:
        self._look = look
        self._seconds = seconds
        self._next: asyncio.TimerHandle | None = None

    def wake(self) -> None:
        """See to it that there is a next look."""
        if self._next is None:
            self._next = asyncio.get_running_loop().call_later(self._seconds, self._tick)

    def stop(self) -> None:
        """Look no more, until woken."""
        if self._next is not None:
            self._next.cancel()
            self._next = None

    def _tick(self) -> None:
        self._next = None
        again = True
        try:
            again = self._look()
        finally:  # one that fails is reported by the loop, and the next may not
            if again:
                self.wake()
