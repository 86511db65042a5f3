"""Where images are decoded: small ones on the event loop, large ones in a bounded pool of threads.

Handing a small image to a thread costs more CPU than decoding it; decoding a large one on the event loop would make
every other request wait.
"""

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from threading import Event
from typing import Final, TypeVar

import numpy as np
from numpy.typing import NDArray

from imaging import errors as image_errors
from imaging.decoder import decode
from imaging.errors import ImageError
from imaging.fast_jpeg import decode_exact_jpeg
from imaging.formats import is_cheap, read_header
from imaging.structure.header import Header
from service.decoding.upload import Upload, which
from service.engine.cpus import usable_cpus
from service.engine.metadata import ModelMetadata
from service.engine.thread import call_in_loop
from service.errors import (
    DeadlineExceeded,
    ImageTooCostly,
    NotAnImage,
    ServiceError,
    TooManyPixels,
    TruncatedImage,
    UnsupportedFormat,
)
from service.settings import Settings

T = TypeVar("T")

MAX_DECODE_THREADS: Final = 4  # where the settings name no number
SERVICE_ERRORS: Final[dict[type[ImageError], type[ServiceError]]] = {
    image_errors.NotAnImage: NotAnImage,
    image_errors.UnsupportedFormat: UnsupportedFormat,
    image_errors.TruncatedImage: TruncatedImage,
    image_errors.TooManyPixels: TooManyPixels,
    image_errors.ImageTooCostly: ImageTooCostly,
}
Pixels = NDArray[np.uint8]


class Decoder:
    """Decodes for all requests. Belongs to one event loop."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        threads = settings.decode_threads or min(MAX_DECODE_THREADS, usable_cpus())
        self._inline_pixels = min(settings.inline_decode_pixels, settings.max_request_pixels)
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="decode")
        # Waiting is done here and not in the executor's queue: what is cancelled while it waits frees its memory.
        self._free = asyncio.Semaphore(threads)

    def is_small(self, body: bytes) -> bool:
        """Whether a body is parsed on the event loop."""
        return len(body) <= self.settings.inline_decode_bytes

    def decode_inline(self, uploads: Sequence[Upload], metadata: ModelMetadata) -> list[Pixels] | None:
        """Decode every image of a request to uint8 [H, W, 3] at the model's input size.

        Returns:
            None where that would take too long for the event loop: see `decode`.

        Raises:
            ServiceError: what `imaging` raises for the first bad image; of several images it names the one.
        """
        if not self._is_small(uploads):
            return None
        if (quick := self._decode_quickly(uploads, metadata)) is not None:
            return quick
        with suppress(TooManyPixels):  # for the event loop; the thread will see whether for the service too
            headers = Headers(self.settings.max_pixels, self._inline_pixels)
            opened = each(uploads, lambda index: headers.open(uploads[index].data))
            if all(is_cheap(header, max_pixels=self._inline_pixels) for header in opened):
                return each(uploads, lambda index: shaped(opened[index], metadata))
        return None

    async def decode(self, uploads: Sequence[Upload], metadata: ModelMetadata, deadline: float) -> list[Pixels]:
        """Do the same in a thread.

        Raises:
            ServiceError: as `decode_inline`.
            DeadlineExceeded: no thread was free before the deadline, on the clock of `loop.time()`.
        """
        return await self.in_thread(partial(decode_all, uploads, metadata, self.settings), deadline)

    def _is_small(self, uploads: Sequence[Upload]) -> bool:
        """Whether a request may be decoded on the event loop, as far as its files' bytes tell."""
        return sum(len(upload.data) for upload in uploads) <= self.settings.inline_decode_bytes

    def _decode_quickly(self, uploads: Sequence[Upload], metadata: ModelMetadata) -> list[Pixels] | None:
        """Decode a request whose images are all JPEGs of the model's size; None for any other."""
        height, width = size = metadata.input_size
        pixels = height * width
        if pixels > self.settings.max_pixels or pixels * len(uploads) > self._inline_pixels:
            return None
        images = []
        for upload in uploads:
            if (image := decode_exact_jpeg(upload.data, size)) is None:
                return None
            images.append(image)
        return images

    def close(self) -> None:
        """Let the threads end."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def in_thread(self, function: Callable[[Event], T], deadline: float) -> T:
        """Call a function with an event that says when nobody waits for it any more."""
        loop = asyncio.get_running_loop()
        abandoned = Event()
        try:
            async with asyncio.timeout_at(deadline):
                await self._free.acquire()
                work = self._threads.submit(function, abandoned)
                # When the thread is free, not when nobody waits any more: it can't be interrupted.
                work.add_done_callback(lambda _: call_in_loop(loop, self._free.release))
                return await asyncio.wrap_future(work)
        except TimeoutError as error:
            raise DeadlineExceeded("The deadline passed before the image was decoded.") from error
        finally:
            abandoned.set()


class Headers:
    """Reads the headers of one request's images and counts their pixels together: small files can hold very many."""

    def __init__(self, max_pixels: int, max_total: int) -> None:
        self._max_pixels = max_pixels
        self._left = self._max_total = max_total

    def open(self, data: bytes) -> Header:
        """Read an image's header; see `imaging.formats.read_header`."""
        header = read_header(data, max_pixels=self._max_pixels)
        self._left -= header.pixels
        if self._left < 0:
            raise TooManyPixels(f"The images of a request may have {self._max_total} pixels together, and have more.")
        return header


def decode_all(
    uploads: Sequence[Upload], metadata: ModelMetadata, settings: Settings, abandoned: Event
) -> list[Pixels]:
    """Decode one image after the other, so that only one is in memory at its full size."""
    headers = Headers(settings.max_pixels, settings.max_request_pixels)

    def decode_one(index: int) -> Pixels:
        if abandoned.is_set():
            raise DeadlineExceeded
        return shaped(headers.open(uploads[index].data), metadata)

    return each(uploads, decode_one)


def shaped(header: Header, metadata: ModelMetadata) -> Pixels:
    """Decode the image behind a header to what a model takes."""
    return decode(header, size=metadata.input_size, crop=metadata.resize.crop, resample=metadata.resize.filter)


def each(uploads: Sequence[Upload], function: Callable[[int], T]) -> list[T]:
    """Apply a function to the number of each upload; an error of one of several says which it is."""
    results = []
    for index in range(len(uploads)):
        try:
            results.append(function(index))
        except (ServiceError, ImageError) as error:
            kind = SERVICE_ERRORS[type(error)] if isinstance(error, ImageError) else type(error)
            place = which(uploads, index) if len(uploads) > 1 else ""
            raise kind(f"{place}{error.message}") from error
    return results
