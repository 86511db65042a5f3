"""The lock that keeps other threads off CUDA while a graph is captured."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from service.engine.session import EngineError

# A run takes milliseconds; a user that holds the lock longer may hang.
CAPTURE_TIMEOUT_S = 5.0


class CaptureLock:
    """A shared lock for users of CUDA, which a thread that captures a graph holds exclusively.

    onnxruntime captures in CUDA's global mode: an allocation or a plain copy by another thread of the process fails
    then, and spoils the capture. So a model that warms up would break the batches of the live one.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._users = 0
        self._capturing = False
        self._captures = 0  # that have ended
        self._waiting = 0  # threads that wait to capture
        self._held_up = 0  # users that wait for a capture
        self._turns = 0  # of those users, to go before the next capture

    @contextmanager
    def shared(self) -> Iterator[None]:
        """Use CUDA; waits for the capture that runs or is next, and for no later one."""
        with self._changed:
            self._held_up += 1
            self._changed.wait_for(lambda: not self._capturing and (not self._waiting or self._turns > 0))
            self._held_up -= 1
            self._turns = max(0, self._turns - 1)
            self._users += 1
        try:
            yield
        finally:
            with self._changed:
                self._users -= 1
                self._changed.notify_all()

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Capture; waits until no other thread uses CUDA.

        Raises:
            EngineError: CUDA was in use for CAPTURE_TIMEOUT_S; users that waited for this capture go on.
        """
        with self._changed:
            self._waiting += 1
            captures = self._captures
            while not self._changed.wait_for(self._is_unused, CAPTURE_TIMEOUT_S):
                if captures == self._captures and not self._capturing:  # otherwise others captured meanwhile
                    self._waiting -= 1
                    self._changed.notify_all()
                    raise EngineError(f"CUDA was in use for {CAPTURE_TIMEOUT_S:g} s: no graph is captured")
                captures = self._captures
            self._waiting -= 1
            self._capturing = True
        try:
            yield
        finally:
            with self._changed:
                self._capturing = False
                self._captures += 1
                self._turns = self._held_up
                self._changed.notify_all()

    def _is_unused(self) -> bool:
        return not self._capturing and not self._users and not self._turns


capture_lock = CaptureLock()  # one for the process, as CUDA's capture mode is
