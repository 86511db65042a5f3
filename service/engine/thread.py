"""One thread that belongs to one engine."""

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
    """Runs jobs one after another in a thread of its own.

    A captured CUDA graph belongs to the thread that captured it, so warm-up and all runs of an engine come here. The
    thread is a daemon, unlike those of concurrent.futures: one that hangs in a driver must not keep the
    process from ending.
    """

    def __init__(self, name: str) -> None:
        self._jobs: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        threading.Thread(target=self._work, name=name, daemon=True).start()

    def post(self, job: Callable[[], None]) -> None:
        """Run `job` after those before it; it must not raise."""
        self._jobs.put(job)

    async def call(self, function: Callable[[], T]) -> T:
        """Run `function` in the thread and return or raise what it does."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()
        self.post(partial(_perform, function, loop, future))
        try:
            return await future
        finally:
            del future  # it holds the error, whose traceback holds this frame: a cycle, and a session with it

    def abandon(self, last: Callable[[], None]) -> None:
        """End the thread after the jobs that wait and this one; nobody learns whether it fails."""

        def job() -> None:
            with suppress(Exception):
                last()

        self.post(job)
        self.stop()

    def stop(self) -> None:
        """End the thread after the jobs that wait."""
        self._jobs.put(None)

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()
            del job  # or the last batch would stay in memory until the next comes


async def beside(function: Callable[[], T]) -> T:
    """Call a function in a thread that nobody has to wait for: a disk far away may hang, and so may a driver."""
    thread = EngineThread("beside")
    try:
        return await thread.call(function)
    finally:
        thread.stop()


class Looking:
    """Calls a function beside the loop, and waits no longer than it may: what hangs goes on, and is not called again.

    So a disk that does not answer takes one thread, however often somebody looks.
    """

    def __init__(self) -> None:
        self._task: asyncio.Task[object] | None = None

    async def at_most(self, seconds: float, function: Callable[[], T]) -> T:
        """Return what the function does, or one that was called before and has not returned until now.

        Raises:
            TimeoutError: it has not returned within the time.
        """
        if self._task is None:
            self._task = asyncio.create_task(beside(function))
        await asyncio.wait([self._task], timeout=seconds)
        if not self._task.done():
            raise TimeoutError(ETIMEDOUT, f"no answer within {seconds:g} s")
        task, self._task = self._task, None
        return cast(T, task.result())

    def close(self) -> None:
        """Wait for nothing any more."""
        if self._task is not None:
            self._task.cancel()


def report(loop: asyncio.AbstractEventLoop, callback: Callable[..., None], *args: object) -> None:
    """Call back in the loop's thread; a loop that has closed meanwhile wants to know nothing any more."""
    with suppress(RuntimeError):
        loop.call_soon_threadsafe(callback, *args)


def _perform(function: Callable[[], T], loop: asyncio.AbstractEventLoop, future: "asyncio.Future[T]") -> None:
    try:
        value = function()
    except Exception as error:
        report(loop, _end, future, None, error)
    else:
        report(loop, _end, future, value, None)
    finally:
        del future  # as in `EngineThread.call`


def _end(future: "asyncio.Future[T]", value: T, error: Exception | None) -> None:
    if future.done():  # whoever called has been cancelled
        return
    if error is not None:
        future.set_exception(error)
    else:
        future.set_result(value)
