"""One timer for many deadlines: a timer for each request would cost more than most requests wait."""

import asyncio
from collections.abc import Callable
from typing import Final

TICK_SECONDS: Final = 0.02  # a deadline is noticed at most this much later


class Timer:
    """Calls a function at an interval while it has work. Belongs to one event loop.

    Args:
        poll: does what is due, and returns whether any work is left.
        seconds: between two calls.
    """

    def __init__(self, poll: Callable[[], bool], seconds: float = TICK_SECONDS) -> None:
        self._poll = poll
        self._seconds = seconds
        self._next: asyncio.TimerHandle | None = None

    def wake(self) -> None:
        """Schedule the next call if none is scheduled."""
        if self._next is None:
            self._next = asyncio.get_running_loop().call_later(self._seconds, self._tick)

    def stop(self) -> None:
        """Cancel the next call; `wake` starts again."""
        if self._next is not None:
            self._next.cancel()
            self._next = None

    def _tick(self) -> None:
        self._next = None
        again = True
        try:
            again = self._poll()
        finally:  # the loop reports an error, and the next call may succeed
            if again:
                self.wake()
