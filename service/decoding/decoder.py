"""Where images are decoded: in place what is provably cheap, the rest in processes that can be killed.

Handing a small image to a process costs more CPU than decoding it. Decoding any other in place would make every other
request wait, for as long as the file's author likes.
"""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, asynccontextmanager, contextmanager
from typing import Final, TypeVar

import numpy as np
from numpy.typing import NDArray

from imaging import errors as image_errors
from imaging.errors import ImageError
from imaging.fast_jpeg import decode_exact_jpeg
from imaging.formats import is_cheap
from service.decoding.decode_process import DECODED, ERRORS, Job, Limits
from service.decoding.process_pool import EndReason, ProcessEndedError, ProcessPool
from service.decoding.upload import Upload, which
from service.engine.cpus import usable_cpus
from service.engine.metadata import ModelMetadata
from service.engine.thread import call_in_loop
from service.errors import (
    DeadlineExceeded,
    DecodingFailed,
    ImageTooCostly,
    NotAnImage,
    ServiceError,
    TooManyPixels,
    TruncatedImage,
    Unavailable,
    UnsupportedFormat,
)
from service.settings import Settings

T = TypeVar("T")

MAX_DECODE_PROCESSES: Final = 4  # where the settings name no number
PARSE_THREADS: Final = 2
# What a decoder takes for a pixel at most, and beside its pixels.
BYTES_PER_PIXEL: Final = 16
SPARE_BYTES: Final = 64 * 1024**2
SERVICE_ERRORS: Final[dict[type[ImageError], type[ServiceError]]] = {
    image_errors.NotAnImage: NotAnImage,
    image_errors.UnsupportedFormat: UnsupportedFormat,
    image_errors.TruncatedImage: TruncatedImage,
    image_errors.TooManyPixels: TooManyPixels,
    image_errors.ImageTooCostly: ImageTooCostly,
}
Pixels = NDArray[np.uint8]


class Decoder:
    """Decodes for all requests. Belongs to one event loop.

    Args:
        settings: of the service.
        on_process_end: called with the reason whenever a decode process has ended by itself.
    """

    def __init__(self, settings: Settings, on_process_end: Callable[[EndReason], None] = lambda reason: None) -> None:
        self.settings = settings
        self._limits = limits_of(settings)
        self._inline_pixels = min(settings.inline_decode_pixels, settings.max_request_pixels)
        self.processes = ProcessPool(process_count(settings), self._limits, on_process_end)
        self._threads = ThreadPoolExecutor(PARSE_THREADS, thread_name_prefix="parse")
        # Waiting is done here and not in the executor's queue: what is cancelled while it waits frees its memory.
        self._free = asyncio.Semaphore(PARSE_THREADS)
        self._free_for_background = asyncio.Semaphore(PARSE_THREADS - 1)

    async def start(self) -> None:
        """Start the threads and the decode processes, and return when these are ready.

        Raises:
            OSError: one can't be started.
        """
        self._start_threads()
        await self.processes.start()

    def _start_threads(self) -> None:
        """Start all threads while the system lets us: an executor that can't keeps what it was given in its queue."""
        everyone = threading.Barrier(PARSE_THREADS)
        try:
            for _ in range(PARSE_THREADS):
                self._threads.submit(everyone.wait)
        except RuntimeError as error:
            everyone.abort()
            raise OSError("the system starts no more threads") from error

    def is_small(self, body: bytes) -> bool:
        """Whether a body is parsed on the event loop."""
        return len(body) <= self.settings.inline_decode_bytes

    def decode_inline(self, uploads: Sequence[Upload], metadata: ModelMetadata) -> list[Pixels] | None:
        """Decode every image of a request to uint8 [H, W, 3] at the model's input size.

        Returns:
            None where that could take too long for the event loop: see `decode`.

        Raises:
            ServiceError: what `imaging` raises for the first bad image; of several images it names the one.
        """
        if sum([len(upload.data) for upload in uploads]) > self.settings.inline_decode_bytes:
            return None
        if (quick := self._decode_quickly(uploads, metadata)) is not None:
            return quick
        job = self._job(metadata, self.settings.max_request_pixels)
        headers = []
        for index, upload in enumerate(uploads):
            with naming(uploads, index):
                try:
                    header = job.read_header(upload.data)
                except image_errors.TooManyPixels:
                    return None  # who counts the pixels of all has the sentence
            headers.append(header)
            if not is_cheap(header, max_pixels=self._inline_pixels):
                return None
        if sum(header.pixels for header in headers) > self._inline_pixels:
            return None
        images = []
        for index, header in enumerate(headers):
            with naming(uploads, index):
                images.append(as_array(job.decode(header), metadata))
        return images

    async def decode(self, uploads: Sequence[Upload], metadata: ModelMetadata, deadline: float) -> list[Pixels]:
        """Do the same in a decode process, one image after the other.

        Raises:
            ServiceError: as `decode_inline`.
            DeadlineExceeded: the images were not decoded before the deadline, on the clock of `loop.time()`.
            ImageTooCostly: an image took more memory or time than one may.
            DecodingFailed: the process was killed, or crashed.
        """
        images = []
        pixels_left = self.settings.max_request_pixels
        async with self._before(deadline):
            for index, upload in enumerate(uploads):
                with naming(uploads, index):
                    pixels, image = await self._decode_one(upload.data, self._job(metadata, pixels_left))
                    pixels_left -= pixels
                    images.append(as_array(image, metadata))
        return images

    async def _decode_one(self, data: bytes, job: Job) -> tuple[int, bytes]:
        try:
            reply = await self.processes.run(job, data)
        except ProcessEndedError as error:
            raise self._error_of(error.reason) from error
        if reply.kind != DECODED:
            raise ERRORS[reply.kind - 1](reply.payload.decode("utf-8", "replace"))
        return reply.pixels, reply.payload

    def _error_of(self, reason: EndReason) -> ServiceError:
        match reason:
            case "cpu_limit":
                limit = f"{self._limits.cpu_s:g} s of CPU time"
            case "time_limit":
                limit = f"{self._limits.wall_s:g} s"
            case _:
                return DecodingFailed()
        return ImageTooCostly(f"Decoding the image takes more than the {limit} that are allowed; make it smaller.")

    def _job(self, metadata: ModelMetadata, pixels_left: int) -> Job:
        settings, resize = self.settings, metadata.resize
        return Job(
            size=metadata.input_size,
            crop=resize.crop,
            resample=resize.filter,
            formats=settings.image_formats,
            max_pixels=settings.max_pixels,
            pixels_left=pixels_left,
            max_request_pixels=settings.max_request_pixels,
        )

    def _decode_quickly(self, uploads: Sequence[Upload], metadata: ModelMetadata) -> list[Pixels] | None:
        """Decode a request whose images are all JPEGs of the model's size; None for any other."""
        height, width = size = metadata.input_size
        pixels = height * width
        if pixels > self.settings.max_pixels or pixels * len(uploads) > self._inline_pixels:
            return None
        if "JPEG" not in self.settings.image_formats:
            return None
        images = []
        for upload in uploads:
            if (image := decode_exact_jpeg(upload.data, size)) is None:
                return None
            images.append(image)
        return images

    def close(self) -> None:
        """End the processes, and let the threads end."""
        self.processes.close()
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def in_thread(self, function: Callable[[], T], deadline: float, *, is_background: bool = False) -> T:
        """Call a function that would hold up the event loop, in one of few threads that are there from the start.

        Args:
            function: what to call.
            deadline: loop time.
            is_background: leave one of the threads to others.

        Raises:
            DeadlineExceeded: it did not return before the deadline.
            Unavailable: the system starts no thread.
        """
        loop = asyncio.get_running_loop()
        async with self._before(deadline):
            with ExitStack() as taken:
                for place in (self._free_for_background, self._free) if is_background else (self._free,):
                    await place.acquire()
                    taken.callback(place.release)
                try:
                    work = self._threads.submit(function)
                except RuntimeError as error:
                    raise Unavailable("The system starts no more threads; try again later.") from error
                places = taken.pop_all()
            # When the thread is free, not when nobody waits any more: it can't be interrupted.
            work.add_done_callback(lambda _: call_in_loop(loop, places.close))
            try:
                return await asyncio.wrap_future(work)
            finally:
                del work  # its error's traceback holds this frame: a cycle that keeps the whole body

    @asynccontextmanager
    async def _before(self, deadline: float) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout_at(deadline):
                yield
        except TimeoutError as error:
            raise DeadlineExceeded("The deadline passed before the image was decoded.") from error


def process_count(settings: Settings) -> int:
    """Return how many decode processes a worker has: the workers share the CPUs."""
    return settings.decode_processes or max(1, min(MAX_DECODE_PROCESSES, usable_cpus() // max(settings.workers, 1)))


def limits_of(settings: Settings) -> Limits:
    """Return what one image may take."""
    enough = BYTES_PER_PIXEL * settings.max_pixels + 2 * settings.max_body_bytes + SPARE_BYTES
    return Limits(settings.decode_memory_bytes or enough, settings.decode_cpu_s, settings.decode_timeout_s)


def as_array(pixels: bytes, metadata: ModelMetadata) -> Pixels:
    """Return the bytes of an image of the model's size as uint8 [H, W, 3]."""
    return np.frombuffer(pixels, np.uint8).reshape(*metadata.input_size, 3)


@contextmanager
def naming(uploads: Sequence[Upload], index: int) -> Iterator[None]:
    """Turn an error of `imaging` into the service's; that of one of several images says which it is."""
    try:
        yield
    except (ServiceError, ImageError) as error:
        kind = SERVICE_ERRORS[type(error)] if isinstance(error, ImageError) else type(error)
        raise kind(f"{which(uploads, index)}{error.message}") from error
