"""A few processes that decode images, each of which may be killed at any time.

Each has a socket of its own, so that one that dies takes nobody else's image along. pebble and concurrent.futures share
one pipe and its locks between their processes: there, one that is killed while it is idle breaks the pool. Replies are
plain bytes, and never unpickled: who takes over a decoder has not taken over the service.
"""

import asyncio
import json
import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Final, Literal, Self, cast

from service.decoding.decode_process import ERRORS, REPLY, Job, Limits

logger = logging.getLogger(__name__)

EndReason = Literal["cpu_limit", "time_limit", "abandoned", "died"]
MODULE: Final = "service.decoding.decode_process"
START_TIMEOUT_S: Final = 60.0
RESTART_DELAY_S: Final = 1.0  # where a process can't be started
# For an image that nobody waits for any more: a new process costs as much as decoding most images to their end.
ABANDONED_TIMEOUT_S: Final = 1.0
REAP_INTERVAL_S: Final = 0.005
REAP_TIMEOUT_S: Final = 1.0
MAX_MESSAGE_BYTES: Final = 1000
END_REASONS: Final[dict[int, EndReason]] = {}
if sys.platform != "win32":
    END_REASONS.update({-signal.SIGPROF: "cpu_limit", -signal.SIGALRM: "time_limit"})


class ProcessEndedError(Exception):
    """The process ended before its reply.

    Attributes:
        reason: why.
    """

    def __init__(self, reason: EndReason) -> None:
        self.reason: EndReason = reason
        super().__init__(f"the decode process ended: {reason}")


@dataclass(frozen=True, slots=True)
class Reply:
    """What came of an image: its bytes, or the error.

    Attributes:
        kind: DECODED, or 1 + the index of the error in ERRORS.
        pixels: of the image in the file; 0 where they are not known.
        payload: uint8 [H, W, 3], or the error's sentence.
    """

    kind: int
    pixels: int
    payload: bytes

    @classmethod
    def unpack(cls, received: bytes | bytearray) -> Self:
        """Read a whole reply."""
        kind, pixels, _ = REPLY.unpack_from(received)
        return cls(kind, pixels, bytes(received[REPLY.size :]))


class DecodeProcess(asyncio.Protocol):
    """One process and its socket. It has one job at a time.

    Args:
        limits: for each image.
        on_idle: called when it can take a job.
        on_end: called once, with the reason, when it has ended after it was ready.

    Attributes:
        is_alive: whether it is ready, and has not ended.
    """

    def __init__(
        self,
        limits: Limits,
        on_idle: "Callable[[DecodeProcess], None]",
        on_end: "Callable[[DecodeProcess, EndReason], None]",
    ) -> None:
        self.is_alive = False
        self._limits = limits
        self._on_idle = on_idle
        self._on_end = on_end
        self._received = bytearray()
        self._reply: asyncio.Future[Reply] | None = None
        self._max_payload = 0
        self._popen: subprocess.Popen[bytes] | None = None
        self._transport: asyncio.Transport | None = None
        self._ending: asyncio.Task[None] | None = None
        self._is_abandoned = False

    @property
    def pid(self) -> int:
        """Number of the process."""
        assert self._popen is not None
        return self._popen.pid

    async def start(self) -> bool:
        """Start the process, and return when it is ready: whether its memory is limited.

        Raises:
            OSError: it can't be started, or ends at once.
        """
        ours, theirs = socket.socketpair()
        ready = self._expect(0)
        try:
            with theirs:
                self._popen = launch(theirs.fileno(), self._limits)
            await asyncio.get_running_loop().create_unix_connection(lambda: self, sock=ours)
            async with asyncio.timeout(START_TIMEOUT_S):
                return (await ready).pixels == 1
        except ProcessEndedError as error:
            raise OSError("a decode process ended while it started") from error
        except BaseException:
            ours.close()
            self.close()
            raise

    def send(self, job: Job, data: bytes) -> "asyncio.Future[Reply]":
        """Give it a file; the future gets the reply, or ProcessEndedError."""
        assert self._transport is not None
        height, width = job.size
        reply = self._expect(max(3 * height * width, MAX_MESSAGE_BYTES))
        self._transport.write(job.pack(data))
        self._transport.write(data)
        return reply

    def abandon(self, reply: "asyncio.Future[Reply]") -> None:
        """Kill it if it does not reply soon: nobody waits for it any more."""

        def kill() -> None:
            if self._reply is reply:
                self._is_abandoned = True
                self.kill()

        asyncio.get_running_loop().call_later(ABANDONED_TIMEOUT_S, kill)

    def kill(self) -> None:
        """End it at once."""
        if self._popen is not None:
            self._popen.kill()

    def close(self) -> None:
        """End it, and wait until it has."""
        self.is_alive = False
        if self._ending is not None:
            self._ending.cancel()
        if self._transport is not None:
            self._transport.abort()
        self.kill()
        if self._popen is not None:
            with suppress(subprocess.TimeoutExpired):
                self._popen.wait(REAP_TIMEOUT_S)

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is no subclass

    def data_received(self, data: bytes) -> None:
        """Collect a reply."""
        if self._is_abandoned:
            return  # killed while the reply was on its way: it takes no other image
        self._received += data
        if len(self._received) < REPLY.size:
            return
        kind, _, length = REPLY.unpack_from(self._received)
        if self._reply is None or kind > len(ERRORS) or length > self._max_payload:
            self.kill()  # it does what it was not made for
            return
        if len(self._received) < REPLY.size + length:
            return
        reply, self._reply = self._reply, None
        received, self._received = self._received, bytearray()
        self.is_alive = True
        if not reply.done():
            reply.set_result(Reply.unpack(received))
        self._on_idle(self)

    def connection_lost(self, error: Exception | None) -> None:
        """See how it ended."""
        self._ending = asyncio.get_running_loop().create_task(self._end())

    async def _end(self) -> None:
        """Fail what waits for a reply, and report the end."""
        was_alive, self.is_alive = self.is_alive, False
        status = await self._status()
        reason: EndReason = "abandoned" if self._is_abandoned else END_REASONS.get(status or 0, "died")
        reply, self._reply = self._reply, None
        if reply is not None and not reply.done():
            reply.set_exception(ProcessEndedError(reason))
        if was_alive:
            self._on_end(self, reason)

    def _expect(self, max_payload: int) -> "asyncio.Future[Reply]":
        assert self._reply is None
        self._max_payload = max_payload
        self._reply = asyncio.get_running_loop().create_future()
        return self._reply

    async def _status(self) -> int | None:
        """Wait for its exit status; None where it does not end, though its socket is closed."""
        assert self._popen is not None
        for _ in range(int(REAP_TIMEOUT_S / REAP_INTERVAL_S)):
            if (status := self._popen.poll()) is not None:
                return status
            await asyncio.sleep(REAP_INTERVAL_S)
        self._popen.kill()
        return None


class ProcessPool:
    """A fixed number of processes; one that ends is replaced. Belongs to one event loop.

    Args:
        count: of the processes.
        limits: for each image.
        on_end: called with the reason whenever a process has ended by itself.
    """

    def __init__(self, count: int, limits: Limits, on_end: Callable[[EndReason], None]) -> None:
        self.processes: set[DecodeProcess] = set()
        self._count = count
        self._limits = limits
        self._on_end = on_end
        self._idle: asyncio.Queue[DecodeProcess] = asyncio.Queue()
        self._starting: set[asyncio.Task[None]] = set()
        self._is_closed = False

    async def start(self) -> None:
        """Start all, and return when they are ready.

        Raises:
            OSError: one can't be started.
        """
        starts = await asyncio.gather(*(self._start_one() for _ in range(self._count)), return_exceptions=True)
        for outcome in starts:
            if isinstance(outcome, BaseException):
                self.close()
                raise outcome
        if not all(starts):
            logger.warning("this system does not limit a process's memory: decode_memory_bytes has no effect")

    async def run(self, job: Job, data: bytes) -> Reply:
        """Decode one file in the next process that is free.

        Raises:
            ProcessEndedError: the process ended over it.
        """
        while not (process := await self._idle.get()).is_alive:
            pass  # it ended while it was idle, and another one is there, or being started
        reply = process.send(job, data)
        try:
            return await reply
        except asyncio.CancelledError:
            process.abandon(reply)
            raise
        finally:
            del reply  # its error's traceback holds this frame: a cycle that keeps the file

    def close(self) -> None:
        """End all processes."""
        self._is_closed = True
        for task in self._starting:
            task.cancel()
        for process in self.processes:
            process.close()

    async def _start_one(self) -> bool:
        process = DecodeProcess(self._limits, self._idle.put_nowait, self._replace)
        self.processes.add(process)
        try:
            return await process.start()
        except BaseException:
            self.processes.discard(process)
            raise

    def _replace(self, process: DecodeProcess, reason: EndReason) -> None:
        self.processes.discard(process)
        if self._is_closed:
            return
        # What clients bring about is counted, not logged: else they could fill the disk.
        level = logging.WARNING if reason == "died" else logging.DEBUG
        logger.log(level, "decode process %d has ended (%s) and is replaced", process.pid, reason)
        self._on_end(reason)
        task = asyncio.get_running_loop().create_task(self._start_another())
        self._starting.add(task)
        task.add_done_callback(self._starting.discard)

    async def _start_another(self) -> None:
        """Start a process in place of one that has ended, as soon as the system lets us."""
        while True:
            try:
                await self._start_one()
                return
            except (OSError, TimeoutError) as error:
                logger.error("a decode process can't be started: %s; trying again", error)
                await asyncio.sleep(RESTART_DELAY_S)


def launch(descriptor: int, limits: Limits) -> subprocess.Popen[bytes]:
    """Start a process on one end of a socket. Another interpreter, not a copy of this one with its threads and GPU."""
    return subprocess.Popen(  # noqa: S603 - this interpreter and our own module
        [sys.executable, "-P", "-m", MODULE, str(descriptor), json.dumps(asdict(limits))],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        pass_fds=[descriptor],
        env=environment(),
        process_group=0,  # what is typed on the terminal does not reach it
    )


def environment() -> dict[str, str]:
    """Return the variables for a process: without settings, among which are keys, and with where modules are found."""
    kept = {name: value for name, value in os.environ.items() if not name.upper().startswith("PERCEIVER_")}
    # It has no use for NumPy's threads, whose stacks would count against its memory.
    return kept | {"PYTHONPATH": os.pathsep.join(path or "." for path in sys.path), "OPENBLAS_NUM_THREADS": "1"}
