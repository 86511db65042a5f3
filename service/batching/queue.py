"""The queue of the batcher: requests in the order they came, large ones in turns.

A request of many images gives at most half a batch of them at its turn and then goes to the end of the queue. So it
delays each request behind it by at most half a batch, however large it is.
"""

import logging
import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Literal, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from service.batching.logits import BatchLogits
from service.errors import DeadlineExceeded

logger = logging.getLogger(__name__)

T = TypeVar("T")
Image = NDArray[np.uint8]
Pixels = memoryview | bytes
DropReason = Literal["cancelled", "deadline"]


class FutureLike(Protocol):
    """Where the answer to a request goes: an `asyncio.Future`, or what does as one."""

    def done(self) -> bool:
        """Whether it has ended, or nobody waits for it any more."""

    def cancelled(self) -> bool:
        """Whether nobody waits for it any more."""

    def set_result(self, result: "list[Prediction]", /) -> None:
        """End it with one prediction an image."""

    def set_exception(self, exception: Exception, /) -> None:
        """End it with an error."""


@dataclass(slots=True)
class Prediction:
    """The answer for one image.

    Attributes:
        batch_logits: of its batch.
        row: its row there.
        queue_seconds: from `submit` until its batch left the queue.
        inference_seconds: its batch's time in the engine's thread: stacking the images, and the run.
        batch_size: images of that batch.
    """

    batch_logits: BatchLogits
    row: int
    queue_seconds: float
    inference_seconds: float
    batch_size: int

    def top(self, k: int) -> tuple[list[int], list[float]]:
        """Return the `k` most probable classes and their probabilities; see `BatchLogits.top`."""
        return self.batch_logits.top(self.row, k)

    @property
    def logits(self) -> NDArray[np.float32]:
        """Its own, float32 [C]."""
        row: NDArray[np.float32] = self.batch_logits.logits[self.row]
        return row


class Request:
    """Images that came together, and one future for all of them.

    Args:
        images: at least one, the memory of uint8 [H, W, 3] each.
        future: ends with one `Prediction` an image, in order, or with the first error.
        deadline: loop time; infinity for none.

    Attributes:
        enqueued: `perf_counter` at its making; uvloop's loop time counts in whole milliseconds.
        taken: so many of its images are in batches.
        answers: by number, where it is answered in parts: two engines may end them in any order.
    """

    __slots__ = ("answers", "deadline", "enqueued", "future", "images", "taken")

    def __init__(
        self,
        images: Sequence[Pixels],
        future: FutureLike,
        deadline: float = math.inf,
    ) -> None:
        self.images = images
        self.future = future
        self.deadline = deadline
        self.enqueued = perf_counter()
        self.taken = 0
        self.answers: dict[int, Prediction] = {}

    def is_over(self, now: float) -> bool:
        """Whether what is left of it need not be run: cancelled, failed in part, or expired at `now`."""
        return self.future.done() or now >= self.deadline


@dataclass(slots=True, eq=False)
class Batch:
    """What one run of an engine serves.

    Attributes:
        parts: (request, its first image, one after its last).
        size: images.
        dropped: a reason for each image that left the queue on this occasion without being run.
        started: `perf_counter` of the pop.
    """

    size: int = 0
    parts: list[tuple[Request, int, int]] = field(default_factory=list)
    dropped: list[DropReason] = field(default_factory=list)
    started: float = field(default_factory=perf_counter)

    def images(self) -> list[Pixels]:
        """List the images in the order of the parts."""
        return [image for request, start, stop in self.parts for image in request.images[start:stop]]

    def answer(self, logits: NDArray[np.float32], seconds: float) -> None:
        """Give each image its row of float32 [N, C], and end the futures of requests that are complete."""
        batch_logits, row, size = BatchLogits(logits), 0, self.size
        for request, start, stop in self.parts:
            queued = self.started - request.enqueued
            rows = range(row, row + stop - start)
            row = rows.stop
            predictions = [Prediction(batch_logits, row, queued, seconds, size) for row in rows]
            whole = len(request.images)
            if len(predictions) < whole:
                request.answers |= zip(range(start, stop), predictions, strict=True)
                if len(request.answers) < whole:
                    continue
                predictions = [request.answers[index] for index in range(whole)]
            if not request.future.done():
                end_safely(request.future.set_result, predictions)

    def fail(self, error: Callable[[], Exception]) -> None:
        """End the futures that have not ended yet, each with an exception of its own."""
        for request, _, _ in self.parts:
            if not request.future.done():
                end_safely(request.future.set_exception, error())


def end_safely(end: Callable[[T], None], value: T) -> None:
    """End one of many outcomes; the others get theirs even where this one fails."""
    try:
        end(value)
    except Exception:
        logger.exception("an answer could not be given")


class FairQueue:
    """A deque of requests that counts images and gives out batches."""

    def __init__(self) -> None:
        self._requests: deque[Request] = deque()
        self.images = 0

    def __bool__(self) -> bool:
        return bool(self._requests)

    @property
    def oldest(self) -> float:
        """When the request came whose turn it is, by `perf_counter`; the queue must not be empty."""
        return self._requests[0].enqueued

    def earliest_deadline(self) -> float:
        """Return the loop time at which the first of them is too late; the queue must not be empty."""
        return min(request.deadline for request in self._requests)

    def put(self, request: Request) -> None:
        """Append a request."""
        self._requests.append(request)
        self.images += len(request.images)

    def pop(self, room: int, now: float) -> Batch:
        """Take up to `room` images; drop on the way what is over at `now`."""
        batch = Batch()
        turn = max(1, room // 2)
        while batch.size < room and self._requests:
            request = self._requests.popleft()
            start = request.taken
            if request.is_over(now):
                self._drop(request, batch.dropped)
                continue
            stop = request.taken = min(len(request.images), start + min(turn, room - batch.size))
            batch.parts.append((request, start, stop))
            batch.size += stop - start
            if stop < len(request.images):
                self._requests.append(request)
        self.images -= batch.size
        return batch

    def drop_expired(self, now: float) -> list[DropReason]:
        """Drop what is over at `now`, wherever it stands.

        Returns:
            A reason for each image, as `Batch.dropped`.
        """
        dropped: list[DropReason] = []
        kept: deque[Request] = deque()
        for request in self._requests:
            if request.is_over(now):
                self._drop(request, dropped)
            else:
                kept.append(request)
        self._requests = kept
        return dropped

    def fail_all(self, error: Callable[[], Exception]) -> None:
        """Empty the queue and end its futures with an exception each."""
        while self._requests:
            request = self._requests.popleft()
            if not request.future.done():
                end_safely(request.future.set_exception, error())
        self.images = 0

    def _drop(self, request: Request, dropped: list[DropReason]) -> None:
        left = len(request.images) - request.taken
        self.images -= left
        if not request.future.done():
            end_safely(request.future.set_exception, DeadlineExceeded())
            dropped += ["deadline"] * left
        elif request.future.cancelled():
            dropped += ["cancelled"] * left
