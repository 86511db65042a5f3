"""The engine thread, and calls that leave the event loop for a thread."""

import asyncio
import threading
from collections.abc import Callable
from contextlib import suppress
from errno import ETIMEDOUT
from functools import partial
from queue import SimpleQueue
from typing import TypeVar, cast

T = TypeVar("T")


class EngineThread:
    """Runs jobs one after another in one daemon thread.

    A captured CUDA graph belongs to the thread that captured it, so warm-up and all runs of an engine come here.
    Threads of concurrent.futures are no daemons: one that hangs in a driver would keep the process from ending.
    """

    def __init__(self, name: str) -> None:
        self._jobs: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        threading.Thread(target=self._work, name=name, daemon=True).start()

    def post(self, job: Callable[[], None]) -> None:
        """Run `job` after those before it; it must not raise."""
        self._jobs.put(job)

    async def call(self, function: Callable[[], T]) -> T:
        """Run `function` in the thread; return its result or raise its error."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()
        self.post(partial(_perform, function, loop, future))
        try:
            return await future
        finally:
            del future  # breaks a cycle that would keep a session: future, error, traceback, this frame

    def abandon(self, last: Callable[[], None]) -> None:
        """End the thread after the queued jobs and `last`, whose errors are ignored."""

        def job() -> None:
            with suppress(Exception):
                last()

        self.post(job)
        self.stop()

    def stop(self) -> None:
        """End the thread after the queued jobs."""
        self._jobs.put(None)

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()
            del job  # frees the batch before the next one comes


async def run_in_thread(function: Callable[[], T]) -> T:
    """Call a function in a daemon thread of its own; a slow disk or driver may hang it."""
    thread = EngineThread("background")
    try:
        return await thread.call(function)
    finally:
        thread.stop()


class BackgroundPoll:
    """Calls a function beside the event loop with a timeout. A call that hangs goes on, and none is added to it.

    So a disk that does not answer takes one thread, however often it is polled.
    """

    def __init__(self) -> None:
        self._task: asyncio.Task[object] | None = None

    async def run(self, function: Callable[[], T], timeout_s: float) -> T:
        """Return the function's result, or that of an earlier call that has not returned until now.

        Raises:
            TimeoutError: the call has not returned within `timeout_s` seconds.
        """
        if self._task is None:
            self._task = asyncio.create_task(run_in_thread(function))
        await asyncio.wait([self._task], timeout=timeout_s)
        if not self._task.done():
            raise TimeoutError(ETIMEDOUT, f"no answer within {timeout_s:g} s")
        task, self._task = self._task, None
        return cast(T, task.result())

    def close(self) -> None:
        """Stop waiting for a call that hangs."""
        if self._task is not None:
            self._task.cancel()


def call_in_loop(loop: asyncio.AbstractEventLoop, callback: Callable[..., None], *args: object) -> None:
    """Call `callback` in the loop's thread; do nothing if the loop has closed."""
    with suppress(RuntimeError):
        loop.call_soon_threadsafe(callback, *args)


def _perform(function: Callable[[], T], loop: asyncio.AbstractEventLoop, future: "asyncio.Future[T]") -> None:
    try:
        value = function()
    except Exception as error:
        call_in_loop(loop, _end, future, None, error)
    else:
        call_in_loop(loop, _end, future, value, None)
    finally:
        del future  # as in `EngineThread.call`


def _end(future: "asyncio.Future[T]", value: T, error: Exception | None) -> None:
    if future.done():  # the caller has been cancelled
        return
    if error is not None:
        future.set_exception(error)
    else:
        future.set_result(value)
