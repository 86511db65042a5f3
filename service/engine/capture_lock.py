"""Who may use CUDA while a graph is captured."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from service.engine.session import EngineError

# A run takes milliseconds. Who uses CUDA for so long may hang, as a load that was given up does.
CAPTURE_TIMEOUT_S = 5.0


class CaptureLock:
    """Lets many use CUDA at once, and keeps all others away while one captures a graph.

    onnxruntime captures in CUDA's global mode: an allocation or a plain copy by any other thread of the process
    fails meanwhile, and spoils the capture. So a model that warms up would break the batches of the one that serves.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._users = 0
        self._capturing = False
        self._captures = 0  # so far
        self._waiting = 0  # to capture
        self._held_up = 0  # by a capture
        self._turns = 0  # of those, before the next capture

    @contextmanager
    def shared(self) -> Iterator[None]:
        """Use CUDA; waits for the capture that runs or is waiting to begin, and for no other after it."""
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
        """Capture; waits until nobody else uses CUDA.

        Raises:
            EngineError: that did not come about in time; those who were held up meanwhile go on.
        """
        with self._changed:
            self._waiting += 1
            captures = self._captures
            while not self._changed.wait_for(self._is_unused, CAPTURE_TIMEOUT_S):
                if captures == self._captures and not self._capturing:  # else others captured meanwhile
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


capture_lock = CaptureLock()  # one a process, as the prohibition is
