"""No request leaves a cycle of objects behind.

Reference counts free what has none. Cycles wait for a collection, which stops every request while it looks at them:
under overload at five times the model's rate that took 80 ms at a time.
"""

import asyncio
import gc
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, TracebackType

import pytest
from PIL import Image

from service.engine.session import EngineError
from tests.fakes import FakeEngine
from tests.imaging.files import encode, pixels
from tests.service.harness import Running, png, read_answer, request_head, running

FORM = "multipart/form-data; boundary=x"
BOUNDARY = b"--x\r\nContent-Disposition: form-data; name=file; filename=a.png\r\n\r\n%b\r\n--x--\r\n"


@contextmanager
def collected() -> Iterator[list[str]]:
    """What a collection after the block finds of this service: types, and functions whose frames stayed."""
    found: list[str] = []
    gc.collect()
    gc.disable()
    try:
        yield found
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        found += [name for name in map(name_of, gc.garbage) if "service" in name or "uvicorn" in name]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()


def name_of(thing: object) -> str:
    """Say what an object is, and where its code stands."""
    frame = thing.tb_frame if isinstance(thing, TracebackType) else thing
    if isinstance(frame, FrameType):
        return f"{type(thing).__name__} of {frame.f_code.co_filename} {frame.f_code.co_name}"
    return f"{type(thing).__module__}.{type(thing).__qualname__}"


async def ask(run: Running, body: bytes, *headers: str, head_of: str = "image/png") -> int:
    """Send one request on a connection of its own, as no client library's garbage may be counted; its status."""
    reader, writer = await asyncio.open_connection("127.0.0.1", run.port)
    writer.write(request_head(len(body), *headers).replace(b"image/png", head_of.encode()) + body)
    status, _, _ = await read_answer(reader)
    writer.close()
    await writer.wait_closed()
    return status


async def settle() -> None:
    """Let the tasks of the last requests end."""
    for _ in range(5):
        await asyncio.sleep(0.002)


@pytest.mark.parametrize(
    ("body", "kind", "status"),
    [
        (png(1), "image/png", 200),
        (BOUNDARY % png(1), FORM, 200),
        (json.dumps({"images": ["aGk="]}).encode(), "application/json", 400),
        (b"{", "application/json", 400),
        (png(1)[:45], "image/png", 400),
        (b"junk", "image/png", 400),
        (b"junk", "text/plain", 415),
        (bytes(20_000), "image/png", 413),
    ],
    ids=["raw", "form", "no image", "no JSON", "truncated", "junk", "unknown type", "too large"],
)
async def test_an_answer_at_once_leaves_nothing(tmp_path: Path, body: bytes, kind: str, status: int) -> None:
    async with running(tmp_path, max_body_bytes=10_000) as run:
        assert await ask(run, body, head_of=kind) == status  # what is made once, is made
        with collected() as found:
            for _ in range(3):
                assert await ask(run, body, head_of=kind) == status
            await settle()
        assert found == []


@pytest.mark.parametrize(
    ("body", "kind", "status"),
    [
        (encode(pixels(400, 500), "PNG"), "image/png", 200),
        (encode(pixels(400, 500), "PNG")[:-2000], "image/png", 400),
        (encode(Image.new("RGB", (5000, 5000)), "PNG"), "image/png", 413),
        (encode(Image.new("RGB", (5000, 5001)), "PNG"), "image/png", 413),
        (b'--x\r\nContent-Disposition: form-data; name="f"; filename=""\r\n\r\n\r\n' * 2000, FORM, 400),
        (b'{"images": [%b]}' % b",".join([b'"aGk="'] * 15_000), "application/json", 413),
    ],
    ids=["decoded", "truncated", "too much work", "too many pixels", "form of empty files", "JSON of many images"],
)
async def test_a_body_that_a_thread_or_a_process_reads_leaves_nothing(
    tmp_path: Path, body: bytes, kind: str, status: int
) -> None:
    async with running(
        tmp_path, real_processes=True, max_pixels=25_000_000, inline_decode_bytes=10_000, decode_cpu_s=0.1
    ) as run:
        assert await ask(run, body, head_of=kind) == status
        with collected() as found:
            for _ in range(3):
                assert await ask(run, body, head_of=kind) == status
            await settle()
        assert found == []


async def test_nor_does_a_request_that_waited_for_the_model(tmp_path: Path) -> None:
    engine = FakeEngine()
    async with running(tmp_path, engine) as run:
        engine.hold()
        with collected() as found:
            waiting = [asyncio.create_task(ask(run, png(number))) for number in (1, 2, 3)]
            await run.until(lambda: run.service.admission.images == 3)
            await asyncio.sleep(0.1)
            engine.release(3)
            assert await asyncio.gather(*waiting) == [200, 200, 200]
            del waiting
            await settle()
        assert found == []


async def test_nor_does_one_whose_time_is_up_or_who_is_turned_away(tmp_path: Path) -> None:
    engine = FakeEngine(max_batch_size=1)
    async with running(tmp_path, engine, max_queue_size=2, max_images=2) as run:
        engine.hold()
        with collected() as found:
            held = asyncio.create_task(ask(run, png(1)))
            await run.until(lambda: engine.batches == [[1]])
            for _ in range(3):
                assert await ask(run, png(2), "X-Request-Timeout-Ms: 100") == 504
            queued = asyncio.create_task(ask(run, png(3)))
            await run.until(lambda: run.service.admission.images == 2)
            assert [await ask(run, png(4)) for _ in range(3)] == [503, 503, 503]
            engine.release(2)
            assert (await held, await queued) == (200, 200)
            del held, queued
            await settle()
        assert found == []


async def test_nor_does_one_whose_batch_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # pytest's handlers would keep the records, and with them the error and its frames: no cycle were garbage.
    monkeypatch.setattr(logging.getLogger("service.batching.batcher"), "propagate", False)
    engine = FakeEngine()
    async with running(tmp_path, engine) as run:
        engine.fail = lambda numbers: EngineError("the device says no")
        with collected() as found:
            assert [await ask(run, png(1)) for _ in range(3)] == [500, 500, 500]
            await settle()
        assert found == []


async def test_nor_does_a_client_who_left(tmp_path: Path) -> None:
    engine = FakeEngine()
    async with running(tmp_path, engine) as run:
        engine.hold()
        with collected() as found:
            for number in (1, 2):
                _, writer = await asyncio.open_connection("127.0.0.1", run.port)
                body = png(number)
                writer.write(request_head(len(body)) + body)
                await run.until(lambda: run.service.admission.images == 1)
                writer.close()
                await writer.wait_closed()
                await run.until(lambda: run.service.admission.images == 0)
            engine.release(5)
            await settle()
        assert found == []
