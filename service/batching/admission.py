"""Admission: bounds the images and bytes in flight, counted before anything is decoded, and how long they wait."""

import time
from collections.abc import Callable

from service.errors import BodyTooLarge, Overloaded, TooManyImages

RATE_WINDOW_SECONDS = 1.0
RATE_DECAY = 0.8  # how much of an old peak a slower window leaves
MAX_RETRY_AFTER_SECONDS = 60.0


class Rate:
    """How many of something are served in a second, of the seconds in which any is in flight.

    A second in which few came shows their number, not the capacity. So a lower rate than before counts only where
    others waited for more than that second, or missed their deadlines; and then the peak fades, and does not end.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._in_flight = self._count = self._missed = 0
        self._seconds = self._resumed = 0.0  # of this window; since when any is in flight
        self.measured = 0.0  # of the last windows; 0 where nothing is known

    def take(self, number: int) -> None:
        """Count so many more in flight."""
        if not self._in_flight:
            self._resumed = self._clock()
        self._in_flight += number

    def give_back(self, number: int, now: float, *, served: bool, missed: bool = False) -> None:
        """Count so many fewer in flight by now; whether they were served, or missed their deadline."""
        if served:
            self._count += number
        self._missed += missed
        seconds = self._seconds + now - self._resumed if self._in_flight else self._seconds
        self._in_flight -= number
        if seconds >= RATE_WINDOW_SECONDS:
            is_busy = self._missed or self._in_flight >= self._count
            self.measured = max(self._count / seconds, self.measured * (RATE_DECAY if is_busy else 1))
            seconds, self._count, self._missed = 0.0, 0, 0
        self._seconds, self._resumed = seconds, now

    def so_far(self) -> float:
        """Return the measured rate, or that of the first window before its end; 0 where nothing is known."""
        # A whole batch ends at once, so the first moments of another window would show any rate.
        seconds = self._seconds + self._clock() - self._resumed if self._in_flight else self._seconds
        return self.measured or (self._count / seconds if seconds > 0 else 0.0)


class Admission:
    """Bounds what is in flight (accepted and not yet answered) over all models. Belongs to one event loop.

    Args:
        max_images: images that may be in flight.
        max_bytes: bytes of request bodies that may be in flight.
        max_wait: seconds after which none of them waits any more, for their deadlines have passed.
        clock: monotonic, in seconds.

    Attributes:
        images: images in flight.
        background_images: those of them that wait until no others do.
        bytes: bytes of request bodies in flight.
    """

    def __init__(
        self,
        max_images: int,
        max_bytes: int,
        *,
        max_wait: float = MAX_RETRY_AFTER_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.max_images = max_images
        self.max_bytes = max_bytes
        self.images = self.background_images = 0
        self.bytes = 0
        self._max_retry_after = min(max(max_wait, 1.0), MAX_RETRY_AFTER_SECONDS)
        self._clock = clock
        self._image_rate, self._byte_rate = Rate(clock), Rate(clock)

    def is_full(self, images: int = 1, size: int = 0) -> bool:
        """Whether so many more images, or so many more bytes, would exceed a bound."""
        return self.images + images > self.max_images or self.bytes + size > self.max_bytes

    def check_wait(self, images: int, timeout: float, expected_rate: float) -> None:
        """Refuse images that would not run before their deadline; those that find none ahead may always try.

        Background images are never ahead, and the rate is not theirs.

        Args:
            images: more than those in flight.
            timeout: seconds until their deadline.
            expected_rate: images a second to begin with; 0 where nothing is known.

        Raises:
            Overloaded
        """
        rate = self._image_rate.measured = self._image_rate.measured or expected_rate
        ahead = self.images - self.background_images
        if not ahead:
            return
        wait = (ahead + images - 1) / rate if rate else 0.0
        if wait > timeout:
            raise Overloaded(
                f"The queue would take about {wait:.3g} s, and the deadline is in {timeout:g} s; try again later.",
                retry_after=self._bounded(wait - timeout),
            )

    def retry_after(self, size: int = 0) -> float:
        """Return the seconds until all in flight is answered at the measured rate, or has met its deadline.

        Args:
            size: bytes that were refused. If they exceed the bound, the rate in bytes counts as well.

        Returns:
            At least 1, at most 60 and `max_wait`.
        """
        rate = self._image_rate.so_far()
        seconds = self.images / rate if rate else 0.0
        if self.bytes + size > self.max_bytes and (rate := self._byte_rate.so_far()):
            seconds = max(seconds, self.bytes / rate)
        return self._bounded(seconds)

    def _bounded(self, seconds: float) -> float:
        return min(max(seconds, 1.0), self._max_retry_after)

    def _take(self, ticket: "Ticket", images: int, size: int) -> None:
        if self.images + images > self.max_images or self.bytes + size > self.max_bytes:
            if ticket.images + images > self.max_images:
                raise TooManyImages(f"A request can hold at most {self.max_images} images; send several requests.")
            if ticket.bytes + size > self.max_bytes:
                raise BodyTooLarge(f"A request can hold at most {self.max_bytes} bytes; send several requests.")
            raise Overloaded(retry_after=self.retry_after(size))
        if ticket.is_background:
            others = self.background_images - ticket.images
            if others and self.background_images + images > self.max_images // 2:
                raise Overloaded("Too many explanations are in flight; try again later.")
            self.background_images += images
        elif images:
            self._image_rate.take(images)
        self.images += images
        if size:
            self.bytes += size
            self._byte_rate.take(size)

    def _give_back(self, ticket: "Ticket", *, served: bool, missed: bool) -> None:
        now = self._clock()
        self.images -= ticket.images
        self.bytes -= ticket.bytes
        if ticket.is_background:
            self.background_images -= ticket.images
        else:
            self._image_rate.give_back(ticket.images, now, served=served, missed=missed)
        self._byte_rate.give_back(ticket.bytes, now, served=True)


class Ticket:
    """The share of one request in what is in flight.

    Args:
        admission: of the service.
        is_background: whether the images wait until no others do. Such tickets have half of the bound, or one has more.
    """

    __slots__ = ("_admission", "bytes", "images", "is_background")

    def __init__(self, admission: Admission, *, is_background: bool = False) -> None:
        self._admission = admission
        self.is_background = is_background
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

    def release(self, *, served: bool = True, missed: bool = False) -> None:
        """Give all of it back, at the end of the request.

        Args:
            served: whether it got its predictions; if not, it is no sign of speed.
            missed: whether its deadline has passed.
        """
        self._admission._give_back(self, served=served, missed=missed)
        self.images = self.bytes = 0
