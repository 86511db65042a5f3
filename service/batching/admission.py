"""Admission: bounds the images and bytes in flight, counted before anything is decoded."""

import time
from collections.abc import Callable

from service.errors import BodyTooLarge, Overloaded, TooManyImages

RATE_WINDOW_SECONDS = 1.0
RATE_DECAY = 0.8  # how much of an old peak a quieter window leaves
MAX_RETRY_AFTER_SECONDS = 60.0


class Admission:
    """Bounds what is in flight (accepted and not yet answered) over all models. Belongs to one event loop.

    Args:
        max_images: images that may be in flight.
        max_bytes: bytes of request bodies that may be in flight.
        clock: monotonic, in seconds.

    Attributes:
        images: images in flight.
        bytes: bytes of request bodies in flight.
    """

    def __init__(self, max_images: int, max_bytes: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.max_images = max_images
        self.max_bytes = max_bytes
        self.images = 0
        self.bytes = 0
        self._clock = clock
        self._rate = self._byte_rate = 0.0
        self._window_start = 0.0
        self._window_count = self._window_bytes = 0

    def is_full(self, images: int = 1, size: int = 0) -> bool:
        """Whether so many more images, or so many more bytes, would exceed a bound."""
        return self.images + images > self.max_images or self.bytes + size > self.max_bytes

    def retry_after(self, size: int = 0) -> float:
        """Return the seconds until all in flight is answered at the measured rate: at least 1, at most 60.

        Args:
            size: bytes that were refused. If they exceed the bound, the rate in bytes counts as well.
        """
        elapsed = self._clock() - self._window_start

        def seconds_for(inside: int, measured: float, left: int) -> float:
            # A whole batch ends at once, so the first moments of a window would show any rate.
            rate = measured or (left / elapsed if elapsed > 0 else 0.0)
            return inside / rate if rate > 0 else 0.0

        seconds = seconds_for(self.images, self._rate, self._window_count)
        if self.bytes + size > self.max_bytes:
            seconds = max(seconds, seconds_for(self.bytes, self._byte_rate, self._window_bytes))
        return min(max(seconds, 1.0), MAX_RETRY_AFTER_SECONDS)

    def _take(self, ticket: "Ticket", images: int, size: int) -> None:
        if self.images + images > self.max_images or self.bytes + size > self.max_bytes:
            if ticket.images + images > self.max_images:
                raise TooManyImages(f"A request can hold at most {self.max_images} images; send several requests.")
            if ticket.bytes + size > self.max_bytes:
                raise BodyTooLarge(f"A request can hold at most {self.max_bytes} bytes; send several requests.")
            raise Overloaded(retry_after=self.retry_after(size))
        if self.images == 0 == self.bytes:  # idle time does not count as slowness
            self._window_start, self._window_count, self._window_bytes = self._clock(), 0, 0
        self.images += images
        self.bytes += size

    def _give_back(self, images: int, size: int) -> None:
        self.images -= images
        self.bytes -= size
        self._window_count += images
        self._window_bytes += size
        elapsed = self._clock() - self._window_start
        if elapsed >= RATE_WINDOW_SECONDS:
            self._measure(elapsed)

    def _measure(self, elapsed: float) -> None:
        """End a window of `elapsed` seconds."""
        # A window of few requests shows their number, not the capacity: the peak stays and fades.
        self._rate = max(self._window_count / elapsed, RATE_DECAY * self._rate)
        self._byte_rate = max(self._window_bytes / elapsed, RATE_DECAY * self._byte_rate)
        self._window_start, self._window_count, self._window_bytes = self._clock(), 0, 0


class Ticket:
    """The share of one request in what is in flight."""

    __slots__ = ("_admission", "bytes", "images")

    def __init__(self, admission: Admission) -> None:
        self._admission = admission
        self.images = self.bytes = 0

    def add(self, *, images: int = 0, bytes: int = 0) -> None:  # noqa: A002 - the unit is the best name
        """Admit more for this request, as its body is read.

        Raises:
            Overloaded: a bound would be exceeded now.
            TooManyImages, BodyTooLarge: the request alone would exceed a bound.
        """
        self._admission._take(self, images, bytes)
        self.images += images
        self.bytes += bytes

    def release(self) -> None:
        """Give all of it back, at the end of the request."""
        self._admission._give_back(self.images, self.bytes)
        self.images = self.bytes = 0
