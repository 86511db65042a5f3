"""Dynamic batching: claim an engine, then pop. One asyncio task and a deque; no batch waits for a timer.

    wait until the queue is not empty -> claim a free engine -> pop up to max_batch_size, or the engine's share,
    dropping cancelled and expired requests -> run in the engine thread -> end every future exactly once -> release

Batches form by themselves while the engines are busy; an idle service runs an image at once. Late arrivals join until
the pop. `service.batching.queue` defines the order in which images leave the queue. While all engines are busy, a poll
of the queue every TICK_SECONDS fails expired requests, since a run may be long or hang.
"""

import asyncio
import logging
import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from time import perf_counter
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from service.batching.engine_pool import EnginePool, PooledEngine
from service.batching.observer import BatchObserver, NoObserver
from service.batching.queue import Batch, DropReason, FairQueue, FutureLike, Image, Pixels, Prediction, Request
from service.batching.timer import TICK_SECONDS, Timer
from service.engine.onnx_engine import Engine
from service.engine.thread import call_in_loop
from service.errors import Draining, InferenceFailed, NotReady

__all__ = ["BatchObserver", "DynamicBatcher", "NoObserver", "Prediction"]

logger = logging.getLogger(__name__)

T = TypeVar("T")
RunResult = NDArray[np.float32] | Exception


class DynamicBatcher:
    """Serves images in batches on one or several engines of one model. Belongs to one event loop.

    Args:
        engines: one member each and one queue for all; they become the batcher's, `close` closes them.
        max_queue_delay_ms: how long an incomplete batch waits for more although an engine is free.
        run_timeout_ms: a run that takes longer counts as hung, and fails the batcher.
        max_failures: so many failing batches of one engine in a row fail the batcher: its device is gone.
        observer: counts.
        on_failure: called once with the reason when the batcher fails.

    Attributes:
        failed: set when an engine hangs or keeps failing or the loop has ended: the process should be replaced.
        failure: why; "" until then.
    """

    def __init__(
        self,
        engines: Sequence[Engine],
        *,
        max_queue_delay_ms: float = 0,
        run_timeout_ms: float = 30_000,
        max_failures: int = 16,
        observer: BatchObserver | None = None,
        on_failure: Callable[[str], None] | None = None,
    ) -> None:
        self._pool = EnginePool(engines)
        self._shape = (*engines[0].metadata.input_size, 3)
        self._bytes = math.prod(self._shape)
        self._delay = max_queue_delay_ms / 1000
        self._run_timeout = run_timeout_ms / 1000
        self._max_failures = max_failures
        self._observer: BatchObserver = observer or NoObserver()
        self._on_failure = on_failure
        self._queue = FairQueue()
        self._arrived = asyncio.Event()  # there is something in the queue
        self._idle = asyncio.Event()  # the queue is empty and no engine runs
        self._idle.set()
        self._loop_task: asyncio.Task[None] | None = None
        self._expiry_timer = Timer(self._drop_expired)
        self._refusal: Callable[[], Exception] | None = NotReady
        self.failed = asyncio.Event()
        self.failure = ""

    @property
    def queue_length(self) -> int:
        """Images that wait for a batch, including those that are about to be dropped."""
        return self._queue.images

    @property
    def max_batch_size(self) -> int:
        """Images that one run may have, on the engine that allows the most; 0 after `close`."""
        return self._pool.max_batch_size

    async def on_each_engine(self, function: Callable[[Engine], T]) -> list[T]:
        """Call `function` with each engine, in its own thread; for warm-up and checks."""
        return await self._pool.on_each(function)

    def start(self) -> None:
        """Serve from now on."""
        self._loop = asyncio.get_running_loop()
        self._pool.open()
        self._refusal = None
        self._loop_task = self._loop.create_task(self._dispatch(), name="batcher")
        self._loop_task.add_done_callback(self._loop_ended)

    async def submit(self, image: Image, *, deadline: float | None = None) -> Prediction:
        """Classify one image; see `submit_many`."""
        (prediction,) = await self.submit_many((image,), deadline=deadline)
        return prediction

    async def submit_many(self, images: Sequence[Image], *, deadline: float | None = None) -> list[Prediction]:
        """Classify the images of one request, each uint8 [H, W, 3]; they succeed or fail together.

        Cancel the task that awaits this, and what still waits in the queue is never run.

        Args:
            images: of the model's input size; they must not change until the answer is there.
            deadline: on the clock of `loop.time()`; what has not been begun by then is not begun.

        Raises:
            DeadlineExceeded: the deadline passed while one of them waited.
            InferenceFailed: the batch that one of them was in failed.
            NotReady: the batcher has not been started, or has failed.
            Draining: it is about to stop.
        """
        self._check_open()
        for image in images:
            # It would fail all others of its batch.
            if image.shape != self._shape or image.dtype != np.uint8 or not image.flags.c_contiguous:
                raise ValueError(
                    f"an image must be uint8 {self._shape} without gaps, and is {image.dtype} {image.shape}"
                )
        if not images:
            return []
        future: asyncio.Future[list[Prediction]] = self._loop.create_future()
        self._put(Request([image.data for image in images], future, math.inf if deadline is None else deadline))
        try:
            return await future
        finally:
            del future  # an error's traceback holds this frame, and the future the error: a cycle for the collector

    def post(self, images: Sequence[Pixels], outcome: FutureLike, deadline: float) -> None:
        """Do the same for somebody who waits elsewhere: `outcome` gets what `submit_many` would return or raise.

        Args:
            images: at least one, the memory of uint8 [H, W, 3] each.
            outcome: `done` once nobody waits any more.
            deadline: as in `submit_many`.

        Raises:
            NotReady, Draining: as `submit_many`; `outcome` gets nothing then.
        """
        self._check_open()
        for image in images:
            size = len(image) if isinstance(image, bytes) else image.nbytes
            if size != self._bytes:
                raise ValueError(f"an image must have {self._bytes} bytes, and has {size}")
        self._put(Request(images, outcome, deadline))

    def _check_open(self) -> None:
        if self._refusal is not None:
            raise self._refusal()

    def _put(self, request: Request) -> None:
        self._queue.put(request)
        self._arrived.set()
        self._idle.clear()
        self._expiry_timer.wake()

    def _drop_expired(self) -> bool:
        """Answer those in the queue whose deadline has passed; return whether there are others."""
        self._record_dropped(self._queue.drop_expired(self._loop.time()))
        return bool(self._queue)

    async def drain(self) -> None:
        """Refuse what comes, serve what is here, and return when all of it has its answer."""
        self._refusal = self._refusal or Draining
        await self._idle.wait()

    def abort(self) -> None:
        """Refuse what comes, and answer what waits and what runs with Draining, now."""
        self._refusal = self._refusal or Draining
        self._queue.fail_all(Draining)
        for member in self._pool.members:
            if member.batch is not None:
                member.batch.fail(Draining)
        self._update_idle()

    def abandon(self) -> None:
        """Close the engines when their threads come to it, which nobody waits for; only where it was never started."""
        while self._pool.members:
            member = self._pool.members.pop()
            member.thread.abandon(member.engine.close)

    async def close(self) -> None:
        """Refuse what comes and what waits, let runs end, close the engines. `drain` first, and nothing is refused."""
        self._refusal = self._refusal or Draining
        task, self._loop_task = self._loop_task, None
        if task is not None:
            task.cancel()
            await asyncio.wait([task])
        self._queue.fail_all(Draining)
        self._expiry_timer.stop()
        self._update_idle()
        await self._idle.wait()
        while self._pool.members:  # one by one: who is cancelled here leaves the others to the next call
            member = self._pool.members.pop(0)
            try:
                if not member.hung:
                    await member.thread.call(member.engine.close)
            finally:
                member.thread.stop()

    async def _dispatch(self) -> None:
        """Serve for ever. From the pop to the hand-over nothing can raise: what is popped is in good hands."""
        while True:
            await self._arrived.wait()
            member = await self._pool.claim()
            room = member.engine.max_batch_size
            if not self._delay:
                room = self._pool.room(member, self._queue.images)
            elif self._queue:  # else all of it was late
                await self._wait_for_more(room)  # who waits for a whole batch does not share it then
            batch = self._queue.pop(room, self._loop.time())
            if batch.size:
                self._start_run(self._pool.best(member, batch.size, self._queue.images), batch)
            else:
                self._pool.release(member)
            (self._arrived.set if self._queue else self._arrived.clear)()
            self._record_dropped(batch.dropped)

    async def _wait_for_more(self, size: int) -> None:
        with suppress(TimeoutError):  # the oldest has waited its time, or one would soon be too late
            while self._queue and self._queue.images < size:
                in_time = self._queue.earliest_deadline() - self._loop.time() - 2 * TICK_SECONDS
                async with asyncio.timeout(min(self._queue.oldest + self._delay - perf_counter(), in_time)):
                    self._arrived.clear()
                    await self._arrived.wait()

    def _start_run(self, member: PooledEngine, batch: Batch) -> None:
        member.batch = batch
        member.watchdog = self._loop.call_later(self._run_timeout, self._hung, member, batch)
        member.thread.post(partial(self._run, member, batch))

    def _run(self, member: PooledEngine, batch: Batch) -> None:
        """Stack and run; in the engine's thread."""
        outcome: RunResult
        begun = perf_counter()
        try:
            # Not np.concatenate, which gives the interpreter's lock away for each image, and waits to get it back.
            images = np.frombuffer(b"".join(batch.images()), dtype=np.uint8).reshape(batch.size, *self._shape)
            outcome = member.engine.run(images)
            if len(outcome) != batch.size:
                raise ValueError(f"the engine gave {len(outcome)} answers to {batch.size} images")
        except Exception as error:
            outcome = error
        call_in_loop(self._loop, self._finish, member, batch, outcome, perf_counter() - begun)

    def _finish(self, member: PooledEngine, batch: Batch, outcome: RunResult, seconds: float) -> None:
        """End the futures of a batch and release its member; back in the loop's thread."""
        if member.hung:
            return  # the watchdog has ended them, and the process is to be replaced
        if member.watchdog is not None:
            member.watchdog.cancel()
        member.batch = None
        try:
            if isinstance(outcome, Exception):
                self._end_failed(member, batch, outcome)
            else:
                self._end_answered(member, batch, outcome, seconds)
        except Exception as error:  # an observer's
            self._observer_failed(error)
        self._pool.release(member)
        self._update_idle()

    def _end_answered(self, member: PooledEngine, batch: Batch, logits: NDArray[np.float32], seconds: float) -> None:
        member.failures = 0
        batch.answer(logits, seconds)
        self._observer.batch(batch.size, seconds)
        queued, started = self._observer.queued, batch.started
        for request, start, stop in batch.parts:
            for _ in range(start, stop):
                queued(started - request.enqueued)

    def _end_failed(self, member: PooledEngine, batch: Batch, error: Exception) -> None:
        """Fail the members of one batch; the next one is served, unless this goes on and on."""
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
        """Fail: nobody would know any more what happens. Every future has ended before an observer is asked."""
        logger.exception("an observer failed")
        self._fail(f"an observer failed: {error!r}")

    def _hung(self, member: PooledEngine, batch: Batch) -> None:
        """Give up an engine whose run does not end; its thread can't be stopped, only the process can."""
        member.hung, member.batch = True, None
        batch.fail(InferenceFailed)
        self._fail(f"{member.name}: a batch of {batch.size} did not end within {self._run_timeout:g} s")
        self._observer.failed_batch(batch.size)

    def _loop_ended(self, task: "asyncio.Task[None]") -> None:
        # Else `close` has ended it, or the process ends without that.
        if self._loop_task is task and self._refusal is not Draining:
            error = None if task.cancelled() else task.exception()
            self._fail(f"the batcher's loop has ended: {error!r}")

    def _fail(self, reason: str) -> None:
        """Refuse all that waits and all that comes; batches that run on other engines still end."""
        if self.failed.is_set():
            return
        logger.critical("the batcher has failed: %s", reason)
        self.failure = reason
        self._refusal = NotReady
        self.failed.set()
        if self._loop_task is not None:
            self._loop_task.cancel()
        self._queue.fail_all(InferenceFailed)
        self._update_idle()
        if self._on_failure is not None:
            self._on_failure(reason)

    def _update_idle(self) -> None:
        if not self._queue and not self._pool.is_busy:
            self._idle.set()
