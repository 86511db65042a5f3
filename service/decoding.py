"""Where bodies are parsed and pictures decoded: small ones on the event loop, large ones in a bounded pool of threads.

Handing a small picture to a thread costs more CPU than decoding it; decoding a large one on the event loop would make
every other request wait.
"""

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from service.artifact import ModelMetadata
from service.bodies import Upload, parse_body
from service.errors import DeadlineExceeded, ServiceError
from service.images import open_picture, to_array
from service.settings import Settings
from service.worker import report

T = TypeVar("T")


class Decoder:
    """Parses and decodes for all requests. Belongs to one event loop."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._threads = ThreadPoolExecutor(settings.decode_threads, thread_name_prefix="decode")
        # Waiting is done here and not in the executor's queue: what is cancelled while it waits frees its memory.
        self._free = asyncio.Semaphore(settings.decode_threads)

    async def parse(self, content_type: str, body: bytes, deadline: float) -> list[Upload]:
        """Take the picture files out of a body; see `bodies.parse_body`. DeadlineExceeded where it waits too long."""
        most = self.settings.max_pictures
        if len(body) <= self.settings.inline_decode_bytes or content_type.startswith("image/"):
            return parse_body(content_type, body, max_pictures=most)
        return await self._in_thread(partial(parse_body, content_type, body, max_pictures=most), deadline)

    async def decode(
        self, uploads: Sequence[Upload], metadata: ModelMetadata, deadline: float
    ) -> list[NDArray[np.uint8]]:
        """Decode every picture of a request to uint8 [H, W, 3] at the model's input size.

        Raises:
            ServiceError: as `images` raises it for the first bad picture; of several pictures it names the one.
            DeadlineExceeded: no thread was free before the deadline, on the clock of `loop.time()`.
        """
        settings = self.settings

        def opened(index: int) -> Image.Image:
            return open_picture(uploads[index].data, max_pixels=settings.max_pixels)

        def shaped(index: int) -> NDArray[np.uint8]:
            return to_array(images[index] or opened(index), size=metadata.input_size, resize=metadata.resize)

        images: Sequence[Image.Image | None] = [None] * len(uploads)
        if sum([len(upload.data) for upload in uploads]) <= settings.inline_decode_bytes:
            images = headers = each(uploads, opened)
            if sum([image.width * image.height for image in headers]) <= settings.inline_decode_pixels:
                return each(uploads, shaped)
        return await self._in_thread(lambda: each(uploads, shaped), deadline)

    def close(self) -> None:
        """Let the threads end."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _in_thread(self, function: Callable[[], T], deadline: float) -> T:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout_at(deadline):
                await self._free.acquire()
                work = self._threads.submit(function)
                # When the thread is free, not when nobody waits any more: it can't be interrupted.
                work.add_done_callback(lambda _: report(loop, self._free.release))
                return await asyncio.wrap_future(work)
        except TimeoutError as error:
            raise DeadlineExceeded("The deadline passed before the picture was decoded.") from error


def each(uploads: Sequence[Upload], function: Callable[[int], T]) -> list[T]:
    """Apply a function to the number of each upload; an error of one of several says which it is."""
    results = []
    for index, upload in enumerate(uploads):
        try:
            results.append(function(index))
        except ServiceError as error:
            if len(uploads) == 1:
                raise
            name = f" ({upload.filename[:80]!r})" if upload.filename else ""
            raise type(error)(f"Picture {index + 1} of {len(uploads)}{name}: {error.message}") from error
    return results
