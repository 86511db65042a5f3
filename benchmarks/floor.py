"""The least that an image can cost behind uvicorn: a raw ASGI app without limits, metrics, ids, deadlines or errors.

`benchmarks.request_path` starts it (`python -m benchmarks.floor`) to measure the machine in the same run: what
the service needs beyond it is the price of its promises. Only for JPEG bodies of the model's own size.
"""

import asyncio
import json
import os
import sys
from collections import deque
from collections.abc import Awaitable, Callable, MutableMapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import uvicorn
from numpy.typing import NDArray
from simplejpeg import decode_jpeg

from service.engine.metadata import MODEL_FILE
from service.engine.onnx_engine import OnnxEngine

MAX_BATCH_SIZE = 32
HEADERS = [(b"content-type", b"application/json")]
Message = MutableMapping[str, Any]
Waiting = tuple[NDArray[np.uint8], "asyncio.Future[NDArray[np.float32]]"]


class Floor:
    """Decode on the event loop, queue in a deque, pop when the engine is free, answer with the label."""

    def __init__(self, model: Path) -> None:
        self._engine = OnnxEngine(model, provider="cpu", max_batch_size=MAX_BATCH_SIZE, intra_op_threads=1)
        self._queue: deque[Waiting] = deque()
        self._wake = asyncio.Event()
        self._thread = ThreadPoolExecutor(1)

    async def __call__(
        self,
        scope: Message,
        receive: Callable[[], Awaitable[Message]],
        send: Callable[[Message], Awaitable[None]],
    ) -> None:
        """Answer one request; anything but /predict is the health check."""
        answer = b"{}"
        if scope["path"] == "/predict":
            body = b""
            more = True
            while more:
                message = await receive()
                body += message["body"]
                more = message["more_body"]
            answer = await self._classify(body)
        headers = [*HEADERS, (b"content-length", b"%d" % len(answer))]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": answer})

    async def _classify(self, body: bytes) -> bytes:
        pixels = decode_jpeg(body)
        future: asyncio.Future[NDArray[np.float32]] = asyncio.get_running_loop().create_future()
        self._queue.append((pixels, future))
        self._wake.set()
        logits = await future
        return json.dumps({"index": int(logits.argmax())}).encode()

    async def batches(self) -> None:
        """Run batches for ever."""
        loop = asyncio.get_running_loop()
        while True:
            await self._wake.wait()
            batch = [self._queue.popleft() for _ in range(min(MAX_BATCH_SIZE, len(self._queue)))]
            if not self._queue:
                self._wake.clear()
            logits = await loop.run_in_executor(
                self._thread, self._engine.run, np.stack([pixels for pixels, _ in batch])
            )
            for (_, future), row in zip(batch, logits, strict=True):
                if not future.done():
                    future.set_result(row)


async def serve(model: Path, host: str, port: int) -> None:
    """Serve until SIGTERM."""
    app = Floor(model)
    config = uvicorn.Config(app, host=host, port=port, access_log=False, log_level="warning", lifespan="off")
    batches = asyncio.create_task(app.batches())
    await uvicorn.Server(config).serve()
    batches.cancel()


def main() -> int:
    """Take folder, version, address and port from the variables that the service reads too."""
    folder, version = os.environ["PERCEIVER_MODEL_DIR"], os.environ["PERCEIVER_MODEL_VERSION"]
    model = Path(folder) / version / MODEL_FILE
    uvloop_factory = uvicorn.Config(app="", loop="uvloop").get_loop_factory()
    with asyncio.Runner(loop_factory=uvloop_factory) as runner:
        runner.run(serve(model, os.environ["PERCEIVER_HOST"], int(os.environ["PERCEIVER_PORT"])))
    return 0


if __name__ == "__main__":
    sys.exit(main())
