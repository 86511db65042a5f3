"""The batcher's queue: requests in the order of arrival, large ones in turns.

A request of many images gives at most half a batch at its turn, then goes to the end of the queue. So it delays each
request behind it by at most half a batch, however large it is. Background requests have a queue of their own, from
which a batch is taken only while the other is empty: they delay a request by at most the batch that runs.
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
from service.engine.runners import Outputs
from service.errors import DeadlineExceeded

logger = logging.getLogger(__name__)

T = TypeVar("T")
Image = NDArray[np.uint8]
Pixels = memoryview | bytes
DropReason = Literal["cancelled", "deadline"]


class FutureLike(Protocol):
    """The part of `asyncio.Future` that receives the predictions of a request."""

    def done(self) -> bool:
        """Whether it has a result, an error, or was cancelled."""

    def cancelled(self) -> bool:
        """Whether its client has gone."""

    def set_result(self, result: "list[Prediction]", /) -> None:
        """End it with one prediction an image."""

    def set_exception(self, exception: Exception, /) -> None:
        """End it with an error."""


@dataclass(slots=True)
class Prediction:
    """The result for one image.

    Attributes:
        batch_logits: logits of its batch.
        row: index of the image there.
        queue_seconds: from `submit` to the pop of its batch.
        inference_seconds: the batch's time in the engine thread, which stacks the images and runs them.
        batch_size: images in that batch.
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
        """The logits of this image, float32 [C]."""
        row: NDArray[np.float32] = self.batch_logits.logits[self.row]
        return row

    @property
    def unfamiliarity(self) -> float | None:
        """How unlike the training images this one is; see `BatchLogits.score`."""
        return self.batch_logits.score(self.row)

    @property
    def features(self) -> NDArray[np.float32]:
        """The features of this image, float32 [D]; its request has asked for them."""
        assert self.batch_logits.features is not None
        row: NDArray[np.float32] = self.batch_logits.features[self.row]
        return row


class Request:
    """The images of one request, and one future for all of them.

    Args:
        images: at least one, each the memory of a uint8 [H, W, 3].
        future: ends with one `Prediction` an image, in order, or with the first error.
        deadline: loop time; infinity for none.
        is_background: whether it waits until nothing else does.
        with_features: whether its predictions have features too.

    Attributes:
        enqueued: `perf_counter` at arrival; uvloop's loop time counts in whole milliseconds.
        taken: number of its images that are in batches.
        predictions: by index, of a request in several batches; engines may end them in any order.
    """

    __slots__ = ("deadline", "enqueued", "future", "images", "is_background", "predictions", "taken", "with_features")

    def __init__(
        self,
        images: Sequence[Pixels],
        future: FutureLike,
        deadline: float = math.inf,
        *,
        is_background: bool = False,
        with_features: bool = False,
    ) -> None:
        self.images = images
        self.future = future
        self.deadline = deadline
        self.is_background = is_background
        self.with_features = with_features
        self.enqueued = perf_counter()
        self.taken = 0
        self.predictions: dict[int, Prediction] = {}

    def is_over(self, now: float) -> bool:
        """Whether the rest need not run: cancelled, failed in part, or expired at `now`."""
        return self.future.done() or now >= self.deadline


@dataclass(slots=True, eq=False)
class Batch:
    """The images of one run.

    Attributes:
        parts: (request, its first image, one after its last).
        size: number of images.
        dropped: a reason for each image that this pop dropped from the queue.
        started: `perf_counter` of the pop.
    """

    size: int = 0
    parts: list[tuple[Request, int, int]] = field(default_factory=list)
    dropped: list[DropReason] = field(default_factory=list)
    started: float = field(default_factory=perf_counter)

    def images(self) -> list[Pixels]:
        """List the images in the order of the parts."""
        return [image for request, start, stop in self.parts for image in request.images[start:stop]]

    @property
    def is_background(self) -> bool:
        """Whether its requests are of the background; never some of them alone."""
        return bool(self.parts) and self.parts[0][0].is_background

    @property
    def with_features(self) -> bool:
        """Whether any of its requests has asked for features."""
        return any(request.with_features for request, _, _ in self.parts)

    def complete(self, outputs: Outputs, seconds: float) -> None:
        """Give each image its row of the outputs, and set the results of complete requests."""
        batch_logits, row, size = BatchLogits(*outputs), 0, self.size
        for request, start, stop in self.parts:
            queued = self.started - request.enqueued
            rows = range(row, row + stop - start)
            row = rows.stop
            predictions = [Prediction(batch_logits, row, queued, seconds, size) for row in rows]
            whole = len(request.images)
            if len(predictions) < whole:
                request.predictions |= zip(range(start, stop), predictions, strict=True)
                if len(request.predictions) < whole:
                    continue
                predictions = [request.predictions[index] for index in range(whole)]
            if not request.future.done():
                end_safely(request.future.set_result, predictions)

    def fail(self, error: Callable[[], Exception]) -> None:
        """Fail the futures that have not ended, each with its own exception."""
        for request, _, _ in self.parts:
            if not request.future.done():
                end_safely(request.future.set_exception, error())


def end_safely(end: Callable[[T], None], value: T) -> None:
    """End one of many futures; one that raises does not keep the others from theirs."""
    try:
        end(value)
    except Exception:
        logger.exception("a future refused its result")


class FairQueue:
    """A deque of requests that counts images and gives out batches."""

    def __init__(self) -> None:
        self._requests: deque[Request] = deque()
        self.images = 0

    def __bool__(self) -> bool:
        return bool(self._requests)

    @property
    def oldest(self) -> float:
        """`perf_counter` at the arrival of the first request; the queue must not be empty."""
        return self._requests[0].enqueued

    def earliest_deadline(self) -> float:
        """Return the earliest deadline, in loop time; the queue must not be empty."""
        return min(request.deadline for request in self._requests)

    def put(self, request: Request) -> None:
        """Append a request."""
        self._requests.append(request)
        self.images += len(request.images)

    def pop(self, room: int, now: float) -> Batch:
        """Take up to `room` images, and drop requests that are over at `now` on the way."""
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
        """Drop all requests that are over at `now`; return a reason for each image, as `Batch.dropped`."""
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
        """Empty the queue, and fail each future with its own exception."""
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


class PriorityQueue:
    """Two fair queues; the background one gives out images only while the other is empty."""

    def __init__(self) -> None:
        self._normal = FairQueue()
        self._background = FairQueue()

    def __bool__(self) -> bool:
        return bool(self._normal) or bool(self._background)

    @property
    def images(self) -> int:
        """Images in both queues."""
        return self._normal.images + self._background.images

    @property
    def is_background(self) -> bool:
        """Whether the next batch is of the background."""
        return not self._normal and bool(self._background)

    @property
    def next(self) -> FairQueue:
        """The queue that gives the next batch."""
        return self._normal or self._background

    def put(self, request: Request) -> None:
        """Append a request to its queue."""
        (self._background if request.is_background else self._normal).put(request)

    def earliest_deadline(self) -> float:
        """Return the earliest deadline, in loop time; one of the queues must not be empty."""
        return min(queue.earliest_deadline() for queue in (self._normal, self._background) if queue)

    def drop_expired(self, now: float) -> list[DropReason]:
        """Drop all requests that are over at `now`; see `FairQueue.drop_expired`."""
        return self._normal.drop_expired(now) + self._background.drop_expired(now)

    def fail_all(self, error: Callable[[], Exception]) -> None:
        """Empty both queues, and fail each future with its own exception."""
        self._normal.fail_all(error)
        self._background.fail_all(error)
