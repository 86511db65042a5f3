"""Dynamic batching: claim an engine, then pop. One asyncio task and a deque; no batch waits for a timer.

    wait until the queue is not empty -> claim a free engine -> pop up to max_batch_size, or the engine's share,
    dropping cancelled and expired requests -> run in the engine thread -> release -> end every future exactly once

Batches form by themselves while the engines are busy; an idle service runs an image at once. Late arrivals join until
the pop. `service.batching.queue` defines the order in which images leave the queue. Background batches take the last
free engine only when nobody else has come for a second. While all engines are busy, a poll of the queue every
TICK_SECONDS fails expired requests, since a run may be long or hang.
"""

import asyncio
import logging
import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from time import perf_counter
from typing import Protocol, TypeVar

import numpy as np

from service.batching.engine_pool import EnginePool, PooledEngine
from service.batching.queue import Batch, DropReason, FutureLike, Pixels, PriorityQueue, Request
from service.batching.timer import TICK_SECONDS, Timer
from service.engine.onnx_engine import Engine
from service.engine.runners import Outputs
from service.engine.thread import call_in_loop
from service.errors import Draining, InferenceFailed, NotReady

logger = logging.getLogger(__name__)

T = TypeVar("T")

# For so long after another request, background batches leave an engine free: on a CPU they would take its cores.
QUIET_S = 1.0


class BatchObserver(Protocol):
    """Counts images and batches. Called in the event loop; must be quick."""

    def batch(self, size: int, seconds: float, *, is_background: bool) -> None:
        """Record a batch of `size` images that took `seconds`, and whether they are of background requests."""

    def queued(self, seconds: float) -> None:
        """Record the wait of one image that was run."""

    def unfamiliar(self, images: int) -> None:
        """Record how many images of a batch were unlike the training images."""

    def dropped(self, reason: DropReason) -> None:
        """Record an image that left the queue without a run."""

    def failed_batch(self, size: int) -> None:
        """Record a batch that failed or hung."""


class DynamicBatcher:
    """Serves images in batches on one or several engines of one model. Belongs to one event loop.

    Args:
        engines: share one queue; the batcher owns them, and `close` closes them.
        observer: counts images and batches.
        max_queue_delay_ms: milliseconds that an incomplete batch waits for more images although an engine is free.
        run_timeout_ms: milliseconds after which a run counts as hung and fails the batcher.
        max_failures: failed batches of one engine in a row that fail the batcher, since the GPU is probably gone.
        on_failure: called once with the reason when the batcher fails.

    Attributes:
        failure: that an engine hangs or keeps failing, or that the loop has ended, so that the process should be
            replaced; "" until then.
    """

    def __init__(
        self,
        engines: Sequence[Engine],
        observer: BatchObserver,
        *,
        max_queue_delay_ms: float = 0,
        run_timeout_ms: float = 30_000,
        max_failures: int = 16,
        on_failure: Callable[[str], None] | None = None,
    ) -> None:
        self._pool = EnginePool(engines)
        self._shape = (*engines[0].metadata.input_size, 3)
        self._bytes = math.prod(self._shape)
        self._delay = max_queue_delay_ms / 1000
        self._run_timeout = run_timeout_ms / 1000
        self._max_failures = max_failures
        self._observer = observer
        self._on_failure = on_failure
        self._queue = PriorityQueue()
        self._arrived = asyncio.Event()  # the queue is not empty
        self._idle = asyncio.Event()  # the queue is empty, no engine runs, and all futures have ended
        self._idle.set()
        self._ending = 0  # batches that have run and whose futures have not ended
        self._loop_task: asyncio.Task[None] | None = None
        self._last_normal = -math.inf  # when a request came that is not of the background, in loop time
        self._expiry_timer = Timer(self._drop_expired)
        self._refusal: Callable[[], Exception] | None = NotReady
        self.failure = ""

    @property
    def queue_length(self) -> int:
        """Images in the queue, including those that will be dropped."""
        return self._queue.images

    @property
    def max_batch_size(self) -> int:
        """Images in the largest batch that any engine takes; 0 after `close`."""
        return self._pool.max_batch_size

    async def on_each_engine(self, function: Callable[[Engine], T]) -> list[T]:
        """Call `function` with each engine in its engine thread, for warm-up and checks."""
        return await self._pool.on_each(function)

    def start(self) -> None:
        """Start to serve; call it in the event loop."""
        self._loop = asyncio.get_running_loop()
        self._pool.open()
        self._refusal = None
        self._loop_task = self._loop.create_task(self._dispatch(), name="batcher")
        self._loop_task.add_done_callback(self._loop_ended)

    def submit(
        self,
        images: Sequence[Pixels],
        future: FutureLike,
        deadline: float = math.inf,
        *,
        is_background: bool = False,
        with_features: bool = False,
    ) -> None:
        """Queue the images of one request and return at once; they succeed or fail together.

        `future` ends with one `Prediction` an image, or with an error:
            DeadlineExceeded: the deadline passed while an image was queued.
            InferenceFailed: the batch of an image failed, or the batcher did.
            Draining: the batcher was aborted or closed.

        Args:
            images: at least one, each the memory of a uint8 [H, W, 3]; it must not change before `future` ends.
            future: its `done` is true once its client has gone; images that are still queued are dropped then.
            deadline: seconds on the clock of `loop.time()`; no image starts to run after it. Infinity for none.
            is_background: whether the images wait until no others do; they delay others by at most one batch, and leave
                one of several engines free while others come.
            with_features: whether the predictions have features, which the model must have.

        Raises:
            NotReady: the batcher has not been started, or has failed; `future` is left alone.
            Draining: the batcher shuts down; `future` is left alone.
            ValueError: an image is not of the model's input size.
        """
        if self._refusal is not None:
            raise self._refusal()
        for image in images:  # a wrong one would fail its whole batch
            size = len(image) if isinstance(image, bytes) else image.nbytes
            if size != self._bytes:
                raise ValueError(f"an image must have {self._bytes} bytes, and has {size}")
        request = Request(images, future, deadline, is_background=is_background, with_features=with_features)
        self._queue.put(request)
        if not is_background:
            self._last_normal = self._loop.time()
        self._arrived.set()
        self._idle.clear()
        self._expiry_timer.wake()

    def _drop_expired(self) -> bool:
        """Drop expired requests; return whether others are queued."""
        self._record_dropped(self._queue.drop_expired(self._loop.time()))
        return bool(self._queue)

    async def drain(self) -> None:
        """Refuse new requests, and return when all queued and running ones are answered."""
        self._refusal = self._refusal or Draining
        await self._idle.wait()

    def abort(self) -> None:
        """Refuse new requests, and fail all queued and running ones with Draining at once."""
        self._refusal = self._refusal or Draining
        self._queue.fail_all(Draining)
        for member in self._pool.members:
            if member.batch is not None:
                member.batch.fail(Draining)
        self._update_idle()

    def abandon(self) -> None:
        """Have the engine threads close the engines, without waiting; for a batcher that was never started."""
        while self._pool.members:
            member = self._pool.members.pop()
            member.thread.abandon(member.engine.close)

    async def close(self) -> None:
        """Abort queued requests, wait for running ones, close the engines. Call `drain` first to abort none."""
        self._refusal = self._refusal or Draining
        task, self._loop_task = self._loop_task, None
        if task is not None:
            task.cancel()
            await asyncio.wait([task])
        self._queue.fail_all(Draining)
        self._expiry_timer.stop()
        self._update_idle()
        await self._idle.wait()
        while self._pool.members:  # popped one by one: a cancelled `close` leaves the rest to the next call
            member = self._pool.members.pop(0)
            try:
                if not member.hung:
                    await member.thread.call(member.engine.close)
            finally:
                member.thread.stop()

    async def _dispatch(self) -> None:
        """Form and start batches for ever. Nothing between pop and start may raise, or popped requests are lost."""
        while True:
            await self._arrived.wait()
            member = await self._pool.claim()
            if self._leaves_engine_free():
                self._pool.release(member)
                self._arrived.clear()  # until another request comes, or a batch ends
                continue
            room = member.engine.max_batch_size
            if not self._delay:
                room = self._pool.room(member, self._queue.next.images)
            elif self._queue:  # the poll may have dropped all of it
                await self._wait_for_more(room)  # for a whole batch, which engines do not share
            batch = self._queue.next.pop(room, self._loop.time())
            if batch.size:
                self._start_run(self._pool.best(member, batch.size, self._queue.images), batch)
            else:
                self._pool.release(member)
            (self._arrived.set if self._queue else self._arrived.clear)()
            self._record_dropped(batch.dropped)

    def _leaves_engine_free(self) -> bool:
        """Whether only the background waits, runs already, and would take the last free engine while others come."""
        if not self._queue.is_background or self._loop.time() - self._last_normal > QUIET_S:
            return False
        return self._pool.runs_background and not self._pool.has_free

    async def _wait_for_more(self, size: int) -> None:
        with suppress(TimeoutError):  # the delay of the oldest is over, or a deadline is near
            while self._queue and self._queue.next.images < size:
                in_time = self._queue.earliest_deadline() - self._loop.time() - 2 * TICK_SECONDS
                async with asyncio.timeout(min(self._queue.next.oldest + self._delay - perf_counter(), in_time)):
                    self._arrived.clear()
                    await self._arrived.wait()

    def _start_run(self, member: PooledEngine, batch: Batch) -> None:
        member.batch = batch
        member.watchdog = self._loop.call_later(self._run_timeout, self._hung, member, batch)
        member.thread.post(partial(self._run, member, batch))

    def _run(self, member: PooledEngine, batch: Batch) -> None:
        """Stack the images and run them; in the engine thread."""
        result: Outputs | Exception
        begun = perf_counter()
        try:
            # np.concatenate would release and retake the GIL for each image.
            images = np.frombuffer(b"".join(batch.images()), dtype=np.uint8).reshape(batch.size, *self._shape)
            result = member.engine.run_outputs(images, with_features=batch.with_features)
            if len(result.logits) != batch.size:
                raise ValueError(f"the engine returned {len(result.logits)} rows for {batch.size} images")
        except Exception as error:
            result = error
        try:
            call_in_loop(self._loop, self._finish, member, batch, result, perf_counter() - begun)
        finally:
            del result  # an error's traceback holds this frame: a cycle that keeps the images and the session

    def _finish(self, member: PooledEngine, batch: Batch, result: Outputs | Exception, seconds: float) -> None:
        """Release the engine of a batch and end its futures; in the event loop."""
        if member.hung:
            return  # `_hung` has failed them
        if member.watchdog is not None:
            member.watchdog.cancel()
        member.batch = None
        self._ending += 1
        if isinstance(result, Exception):  # ended before: what is left of its requests must not run
            self._end(member, batch, result, seconds)
        self._pool.release(member)
        if self._queue:
            self._arrived.set()
        if not isinstance(result, Exception):
            # Ended after: clients are answered while the next batch runs, which the release starts.
            self._loop.call_soon(self._end, member, batch, result, seconds)

    def _end(self, member: PooledEngine, batch: Batch, result: Outputs | Exception, seconds: float) -> None:
        self._ending -= 1
        try:
            if isinstance(result, Exception):
                self._fail_batch(member, batch, result)
            else:
                self._complete(member, batch, result, seconds)
        except Exception as error:  # raised by an observer
            self._observer_failed(error)
        self._update_idle()

    def _complete(self, member: PooledEngine, batch: Batch, outputs: Outputs, seconds: float) -> None:
        member.failures = 0
        batch.complete(outputs, seconds)
        self._observer.batch(batch.size, seconds, is_background=batch.is_background)
        if batch.is_background:
            return  # its wait says nothing about that of others, and covered images are unlike any
        if (limit := member.engine.metadata.unfamiliarity) is not None and outputs.unfamiliarity is not None:
            flagged = int(np.count_nonzero(outputs.unfamiliarity > limit.threshold))
            if flagged:
                self._observer.unfamiliar(flagged)
        queued, started = self._observer.queued, batch.started
        for request, start, stop in batch.parts:
            for _ in range(start, stop):
                queued(started - request.enqueued)

    def _fail_batch(self, member: PooledEngine, batch: Batch, error: Exception) -> None:
        """Fail the requests of one batch, and the batcher after `max_failures` in a row."""
        batch.fail(InferenceFailed)
        logger.error("%s: a batch of %d failed", member.name, batch.size, exc_info=error)
        member.failures += 1
        if member.failures >= self._max_failures:
            self._fail(f"{member.name}: {member.failures} batches failed in a row, the last with {error!r}")
        self._observer.failed_batch(batch.size)

    def _record_dropped(self, dropped: Sequence[DropReason]) -> None:
        self._update_idle()
        try:
            for reason in dropped:
                self._observer.dropped(reason)
        except Exception as error:
            self._observer_failed(error)

    def _observer_failed(self, error: Exception) -> None:
        """Fail the batcher, since its metrics would be wrong. Futures end before an observer is called."""
        logger.exception("an observer failed")
        self._fail(f"an observer failed: {error!r}")

    def _hung(self, member: PooledEngine, batch: Batch) -> None:
        """Fail the batcher for a run that does not end; only the process can be stopped, not its thread."""
        member.hung, member.batch = True, None
        batch.fail(InferenceFailed)
        self._fail(f"{member.name}: a batch of {batch.size} did not end within {self._run_timeout:g} s")
        self._observer.failed_batch(batch.size)

    def _loop_ended(self, task: "asyncio.Task[None]") -> None:
        # Otherwise `close` has cancelled it, or the process ends.
        if self._loop_task is task and self._refusal is not Draining:
            error = None if task.cancelled() else task.exception()
            self._fail(f"the batcher's loop has ended: {error!r}")

    def _fail(self, reason: str) -> None:
        """Fail queued requests and refuse new ones; batches that run on other engines still end."""
        if self.failure:
            return
        logger.critical("the batcher has failed: %s", reason)
        self.failure = reason
        self._refusal = NotReady
        if self._loop_task is not None:
            self._loop_task.cancel()
        self._queue.fail_all(InferenceFailed)
        self._update_idle()
        if self._on_failure is not None:
            self._on_failure(reason)

    def _update_idle(self) -> None:
        if not self._queue and not self._pool.is_busy and not self._ending:
            self._idle.set()
