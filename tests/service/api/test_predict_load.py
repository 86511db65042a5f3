"""`POST /predict` when admission is full, when time is up, and when clients leave."""

import asyncio
import base64
import os
import signal
from pathlib import Path

import pytest
from PIL import Image

from service.decoding import process_pool
from service.lifecycle import Service
from service.settings import Settings
from tests.fakes import FakeEngine, image
from tests.imaging.files import encode
from tests.service.harness import Running, error_of, listening, png, read_answer, request_head, running

IMAGE = {"content-type": "image/png"}


def answered(run: Running) -> list[int]:
    """The numbers of all images that were run."""
    return [number for batch in run.engine.batches for number in batch]


async def test_a_full_house_is_503_with_retry_after(tmp_path: Path) -> None:
    engine = FakeEngine(max_batch_size=1)
    async with running(tmp_path, engine, max_queue_size=2, max_images=2) as run:
        held = [await run.hold_first()]  # of two connections either may be read first
        held.append(asyncio.create_task(run.predict(2)))
        await run.until(lambda: run.service.admission.images == 2)
        response = await run.predict(3)
        assert (response.status_code, error_of(response.content)) == (503, "overloaded")
        assert int(response.headers["retry-after"]) >= 1
        engine.release(2)
        assert [answer.status_code for answer in await asyncio.gather(*held)] == [200, 200]
        assert answered(run) == [1, 2]


async def test_images_of_one_body_are_counted_before_they_are_decoded(tmp_path: Path) -> None:
    engine = FakeEngine(max_batch_size=1)
    async with running(tmp_path, engine, max_queue_size=2, max_images=2) as run:
        engine.hold()
        held = asyncio.create_task(run.predict(1))
        await run.until(lambda: run.service.admission.images == 1)
        junk = base64.b64encode(b"junk").decode()  # would be 400 if it were decoded first
        response = await run.client.post("/predict", json={"images": [junk, junk]})
        assert error_of(response.content) == "overloaded"
        engine.release()
        assert (await held).status_code == 200


async def test_bytes_in_the_house_are_bounded(tmp_path: Path) -> None:
    async with running(tmp_path, max_queue_bytes=10_000, max_body_bytes=10_000) as run:
        _, writer = await run.connect()
        writer.write(request_head(8_001) + bytes(8_000))
        await run.until(lambda: run.service.admission.bytes == 8_000)
        response = await run.client.post("/predict", content=bytes(3_000), headers=IMAGE)
        assert error_of(response.content) == "overloaded"
        reader, other = await run.connect()
        other.write(request_head(None, "Transfer-Encoding: chunked") + b"bb8\r\n" + bytes(3000))
        assert error_of((await read_answer(reader))[2]) == "overloaded"
        writer.close()
        await run.until(lambda: run.service.admission.bytes == 0)
        assert (await run.predict()).status_code == 200


async def test_a_body_that_finds_no_room_is_refused_before_it_is_sent(tmp_path: Path) -> None:
    async with running(tmp_path, max_queue_bytes=10_000, max_body_bytes=10_000) as run:
        _, writer = await run.connect()
        writer.write(request_head(8_001) + bytes(8_000))
        await run.until(lambda: run.service.admission.bytes == 8_000)
        for announced, sent, expected in ((2_001, 0, "overloaded"), (2_000, 2_000, "not_an_image")):
            reader, other = await run.connect()
            other.write(request_head(announced) + bytes(sent))
            _, _, body = await read_answer(reader)
            assert error_of(body) == expected


async def test_slow_senders_do_not_keep_others_out(tmp_path: Path) -> None:
    async with running(tmp_path, max_queue_size=1, max_images=1) as run:
        reader, writer = await run.connect()
        body = png(1)
        writer.write(request_head(len(body)) + body[:20])
        await run.until(lambda: run.in_flight == 1)
        assert (await run.predict(2)).status_code == 200
        writer.write(body[20:])
        assert (await read_answer(reader))[0] == 200


async def test_bodies_that_are_announced_and_do_not_come_keep_nobody_out(tmp_path: Path) -> None:
    async with running(tmp_path, max_queue_bytes=10_000, max_body_bytes=10_000) as run:
        for _ in range(8):
            _, writer = await run.connect()
            writer.write(request_head(9_000) + b"a")
        await run.until(lambda: run.service.admission.bytes == 8)
        assert (await run.predict()).status_code == 200


# Deadlines


async def test_a_request_that_could_not_run_in_time_is_refused_at_once(tmp_path: Path) -> None:
    engine = FakeEngine(max_batch_size=1)
    async with running(tmp_path, engine, request_timeout_ms=5000) as run:
        assert run.service.store.live is not None
        assert run.service.store.live.expected_rate > 0
        run.service.store.live.expected_rate = 0.5
        first = await run.hold_first()
        second = asyncio.create_task(run.predict(2))
        await run.until(lambda: run.service.admission.images == 2)
        headers = IMAGE | {"x-request-timeout-ms": "1000"}
        response = await run.client.post("/predict", content=png(3), headers=headers)
        assert (response.status_code, error_of(response.content)) == (503, "overloaded")
        assert "about 4 s, and the deadline is in 1 s" in response.text
        assert response.headers["retry-after"] == "3"
        files = [("a", ("a.png", png(3))), ("b", ("b.png", png(3)))]  # the last of which would wait for 6 s
        response = await run.client.post("/predict", files=files)
        assert (response.status_code, response.headers["retry-after"]) == (503, "1")
        engine.release(2)
        assert [(await task).status_code for task in (first, second)] == [200, 200]
        assert answered(run) == [1, 2]


async def test_a_image_whose_deadline_passes_in_the_queue_is_not_run(tmp_path: Path) -> None:
    engine = FakeEngine(max_batch_size=1)
    async with running(tmp_path, engine) as run:
        first = await run.hold_first()
        response = await run.client.post("/predict", content=png(2), headers=IMAGE | {"x-request-timeout-ms": "30"})
        assert (response.status_code, error_of(response.content)) == (504, "deadline_exceeded")
        assert not first.done()
        engine.release()
        assert (await first).status_code == 200
        assert answered(run) == [1]
        assert await run.metric("perceiver_deadline_misses_total") == 1


async def test_the_setting_bounds_what_a_client_asks_for(tmp_path: Path) -> None:
    engine = FakeEngine(max_batch_size=1)
    async with running(tmp_path, engine, request_timeout_ms=500) as run:
        first = await run.hold_first()
        headers = IMAGE | {"x-request-timeout-ms": "9999999999"}
        assert (await run.client.post("/predict", content=png(2), headers=headers)).status_code == 504
        engine.release()
        assert (await first).status_code == 200


# Decode processes


async def test_an_image_that_takes_too_much_is_413_and_others_go_on(tmp_path: Path) -> None:
    large = encode(Image.new("RGB", (4000, 4000)), "PNG")
    async with running(tmp_path, real_processes=True, decode_processes=2, decode_cpu_s=0.02) as run:
        posts = [asyncio.create_task(run.client.post("/predict", content=large, headers=IMAGE)) for _ in range(3)]
        while not all(post.done() for post in posts):
            assert (await run.predict()).status_code == 200
            assert (await run.client.get("/health/ready")).status_code == 200
        for response in await asyncio.gather(*posts):
            assert (response.status_code, error_of(response.content)) == (413, "image_too_costly")
            assert "0.02 s of CPU time" in response.json()["error"]["message"]
        assert await run.metric('perceiver_decode_process_ends_total{reason="cpu_limit"}') == 3
        small = encode(image(5), "BMP")
        assert (await run.client.post("/predict", content=small, headers=IMAGE)).status_code == 200


async def test_a_decode_process_that_is_killed_fails_its_image_alone(tmp_path: Path) -> None:
    body = encode(image(5), "BMP")
    async with running(tmp_path, real_processes=True, decode_processes=1) as run:
        (process,) = run.service.decoder.processes.processes
        os.kill(process.pid, signal.SIGSTOP)
        posts = []
        for admitted in (1, 2, 3):
            posts.append(asyncio.create_task(run.client.post("/predict", content=body, headers=IMAGE)))
            await run.until(lambda admitted=admitted: run.service.admission.images == admitted)
        os.kill(process.pid, signal.SIGKILL)
        statuses = [(await post).status_code for post in posts]
        assert statuses == [500, 200, 200]
        assert error_of((await posts[0]).content) == "decoding_failed"
        assert (await run.client.get("/health/ready")).status_code == 200


async def test_what_waits_for_a_decode_process_counts_and_has_its_deadline(tmp_path: Path) -> None:
    body = encode(image(5), "BMP")
    async with running(tmp_path, real_processes=True, decode_processes=1, max_queue_size=2, max_images=2) as run:
        (process,) = run.service.decoder.processes.processes
        os.kill(process.pid, signal.SIGSTOP)
        first = asyncio.create_task(run.client.post("/predict", content=body, headers=IMAGE))
        await run.until(lambda: run.service.admission.images == 1)
        headers = IMAGE | {"x-request-timeout-ms": "300"}
        second = asyncio.create_task(run.client.post("/predict", content=body, headers=headers))
        await run.until(lambda: run.service.admission.images == 2)
        assert error_of((await run.predict()).content) == "overloaded"
        assert error_of((await second).content) == "deadline_exceeded"
        _, writer = await run.connect()
        writer.write(request_head(len(body)) + body)
        await run.until(lambda: run.service.admission.images == 2)
        writer.close()  # a client that leaves while it waits
        await run.until(lambda: run.service.admission.images == 1)
        os.kill(process.pid, signal.SIGCONT)
        assert (await first).status_code == 200
        assert answered(run) == [5]


async def test_where_no_decode_process_can_be_started_the_service_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process_pool, "MODULE", "service.decoding.no_such_module")
    service = Service(Settings(model_dir=tmp_path, port=0, decode_processes=1))
    async with listening(service, FakeEngine()) as run:
        await run.until(lambda: service.status == "failed")
        assert "The decode processes can't be started" in service.failure


# Clients that leave


async def test_a_client_that_leaves_takes_its_queued_image_along(tmp_path: Path) -> None:
    engine = FakeEngine(max_batch_size=1)
    async with running(tmp_path, engine) as run:
        first = await run.hold_first()
        _, writer = await run.connect()
        writer.write(request_head(len(png(2))) + png(2))
        await run.until(lambda: run.service.queue_length == 1)
        writer.close()
        await run.until(lambda: run.in_flight == 1)
        engine.release(2)
        assert (await first).status_code == 200
        assert (await run.predict(3)).status_code == 200
        assert answered(run) == [1, 3]
        assert await run.metric("perceiver_cancellations_total") == 1
        assert await run.metric('perceiver_requests_total{code="499",route="/predict"}') == 1


async def test_a_client_that_leaves_while_its_image_runs_harms_nobody(tmp_path: Path) -> None:
    engine = FakeEngine(max_batch_size=2)
    async with running(tmp_path, engine) as run:
        engine.hold()
        _, writer = await run.connect()
        writer.write(request_head(len(png(1))) + png(1))
        await run.until(lambda: engine.batches == [[1]])
        writer.close()
        await run.until(lambda: run.in_flight == 0)
        engine.release(2)
        assert (await run.predict(2)).status_code == 200


async def test_a_client_that_leaves_while_it_sends(tmp_path: Path) -> None:
    async with running(tmp_path) as run:
        _, writer = await run.connect()
        writer.write(request_head(1000) + b"abc")
        await run.until(lambda: run.in_flight == 1)
        writer.close()
        await run.until(lambda: run.in_flight == 0)
        assert run.service.admission.bytes == 0
        assert answered(run) == []
