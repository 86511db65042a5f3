"""The short way of an ordinary request, held against the long one. Whole requests in one write, over bare sockets."""

import asyncio
import json
import re
from pathlib import Path

import numpy as np
import pytest

from service.api.predict import PredictEndpoint
from service.api.quick import QuickAnswer
from tests.fakes import FakeEngine
from tests.imaging.files import encode, pixels
from tests.service import harness
from tests.service.harness import Running, error_of, png, read_answer, request_head, running

FORM = b"--x\r\nContent-Disposition: form-data; name=file; filename=a.png\r\n\r\n%b\r\n--x--\r\n"
LARGE = encode(pixels(300, 300), "PNG")  # more pixels than the event loop decodes


def request(body: bytes, *headers: str, kind: str = "image/png", target: str = "/predict") -> bytes:
    return request_head(len(body), *headers, target=target).replace(b"image/png", kind.encode()) + body


@pytest.fixture
def ways(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which way each request to /predict went, in the order in which they began."""
    taken: list[str] = []
    begin, call = QuickAnswer.begin, PredictEndpoint.__call__

    def begin_noted(answer: QuickAnswer, *arguments: object) -> bool:
        taken.append("short")
        if not begin(answer, *arguments):  # type: ignore[arg-type]
            taken.pop()
            return False
        return True

    async def call_noted(endpoint: PredictEndpoint, *arguments: object) -> None:
        taken.append("long")
        await call(endpoint, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(QuickAnswer, "begin", begin_noted)
    monkeypatch.setattr(PredictEndpoint, "__call__", call_noted)
    return taken


async def ask(run: Running, data: bytes) -> tuple[int, dict[str, str], bytes]:
    """Send what is one request on a connection of its own."""
    reader, writer = await run.connect()
    writer.write(data)
    answer = await read_answer(reader)
    if answer[0] == 100:  # who left now might be counted, or not yet
        answer = await read_answer(reader)
    writer.close()
    return answer


def comparable(answer: tuple[int, dict[str, str], bytes]) -> tuple[int, dict[str, str], str]:
    """An answer without what differs from one request to the next."""
    status, headers, body = answer
    headers = {name: re.sub(r"^[0-9a-f]{12}-|[\d.]+", "#", value) for name, value in headers.items()}
    return status, headers, re.sub(r'"request_id": "[^"]*"', "", body.decode())


REQUESTS = {
    "raw": request(png(3)),
    "no type": request(png(3)).replace(b"Content-Type: image/png\r\n", b""),
    "form": request(FORM % png(3), kind="multipart/form-data; boundary=x"),
    "json": request(json.dumps({"images": ["aGk="]}).encode(), kind="application/json"),
    "top 2": request(png(3), target="/predict?top_k=2"),
    "an id": request(png(3), "X-Request-Id: mine-1"),
    "too many classes": request(png(3), target="/predict?top_k=6"),
    "no number": request(png(3), target="/predict?top_k=x"),
    "unknown parameter": request(png(3), target="/predict?k=1"),
    "no timeout": request(png(3), "X-Request-Timeout-Ms: 0"),
    "junk": request(b"junk"),
    "nothing": request(b""),
    "truncated": request(png(3)[:45]),
    "unknown type": request(b"junk", kind="text/plain"),
    "too large": request(bytes(9000)),
    "large": request(LARGE),
    "escaped path": request(png(3), target="/%70redict"),
    "absolute target": request(png(3), target="http://test/predict"),
    "fragment": request(png(3), target="/predict?top_k=2#x"),
    "to be closed": request(png(3), "Connection: close"),
    "old": request(png(3)).replace(b"HTTP/1.1", b"HTTP/1.0"),
    "expected": request(png(3), "Expect: 100-continue"),
}


ORDINARY = ["raw", "no type", "form", "json", "top 2", "an id", "too many classes", "junk", "nothing", "truncated"]
ORDINARY += ["unknown type"]
COUNTS = re.compile(r"perceiver_(requests_total|rejections_total|\w+_seconds_count|images_total|admitted)")


async def answers_to_all(folder: Path, ways: list[str]) -> tuple[dict[str, object], dict[str, str], list[str]]:
    """The answers to `REQUESTS`, which way each went, and what was counted."""
    answers: dict[str, object] = {}
    went: dict[str, str] = {}
    async with running(folder, max_body_bytes=8000, inline_decode_pixels=10_000, max_queue_bytes=10_000) as run:
        for name, data in REQUESTS.items():
            ways.clear()
            answers[name] = comparable(await ask(run, data))
            went[name] = ways[0]
        exposition = (await run.client.get("/metrics")).text.splitlines()
    return answers, went, [line for line in exposition if COUNTS.match(line)]


async def test_both_ways_give_the_same_answers_and_counts(
    tmp_path: Path, ways: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    answers, went, counts = await answers_to_all(tmp_path / "short", ways)
    monkeypatch.setattr(harness, "QUICK", False)
    expected, long, expected_counts = await answers_to_all(tmp_path / "long", ways)
    for name in REQUESTS:
        assert answers[name] == expected[name], name
    assert counts == expected_counts
    assert [name for name in went if went[name] == "short"] == ORDINARY
    assert set(long.values()) == {"long"}
    assert {answer[0] for answer in expected.values()} >= {200, 400, 413, 415}  # type: ignore[index]


async def test_a_request_in_two_writes_goes_the_long_way(tmp_path: Path, ways: list[str]) -> None:
    async with running(tmp_path) as run:
        reader, writer = await run.connect()
        writer.write(request(png(3))[:-10])
        await run.until(lambda: run.in_flight == 1)
        writer.write(png(3)[-10:])
        assert (await read_answer(reader))[0] == 200
        writer.write(request(png(3)))
        assert (await read_answer(reader))[0] == 200
        assert ways == ["long", "short"]


async def test_who_does_not_read_goes_the_long_way_which_waits_for_him(tmp_path: Path, ways: list[str]) -> None:
    async with running(tmp_path) as run:
        reader, writer = await run.connect()
        writer.write(request(png(3)))
        assert (await read_answer(reader))[0] == 200
        (connection,) = run.server.server_state.connections
        connection.pause_writing()  # as when more of its answers lie here than should
        writer.write(request(png(3)))
        await run.until(lambda: ways == ["short", "long"])
        connection.resume_writing()
        assert (await read_answer(reader))[0] == 200


async def test_requests_behind_one_that_went_the_short_way_wait_for_it(tmp_path: Path, ways: list[str]) -> None:
    engine = FakeEngine()
    async with running(tmp_path, engine) as run:
        engine.hold()
        reader, writer = await run.connect()
        writer.write(b"".join(request(png(number)) for number in (1, 2, 3)))
        await run.until(lambda: engine.batches == [[1]])
        await asyncio.sleep(0.02)
        assert run.in_flight == 1
        engine.let_go()
        assert [(await read_answer(reader))[0] for _ in range(3)] == [200] * 3
        assert engine.batches == [[1], [2], [3]]
        assert ways == ["short", "long", "long"]


async def test_an_error_of_the_first_does_not_take_the_place_of_those_behind(tmp_path: Path) -> None:
    engine = FakeEngine()
    async with running(tmp_path, engine) as run:
        engine.fail = lambda numbers: RuntimeError("no") if 1 in numbers else None
        engine.hold()
        reader, writer = await run.connect()
        writer.write(request(png(1), "X-Request-Id: first") + request(png(2), "X-Request-Id: second"))
        await run.until(lambda: engine.batches == [[1]])
        engine.let_go()
        first, second = await read_answer(reader), await read_answer(reader)
        assert (first[0], first[1]["x-request-id"], error_of(first[2])) == (500, "first", "inference_failed")
        assert (second[0], second[1]["x-request-id"]) == (200, "second")
        assert await run.metric('perceiver_requests_total{code="500",route="/predict"}') == 1
        assert await run.metric("perceiver_request_seconds_count") == 2


async def test_an_answer_that_is_no_number_is_an_error(tmp_path: Path) -> None:
    engine = FakeEngine()
    async with running(tmp_path, engine) as run:
        good = engine.run
        engine.run = lambda images: np.full_like(good(images), np.nan)  # type: ignore[method-assign]
        status, _, body = await ask(run, request(png(1)))
        assert (status, error_of(body)) == (500, "inference_failed")
        engine.run = good  # type: ignore[method-assign]
        assert (await ask(run, request(png(1))))[0] == 200
        assert (run.in_flight, run.service.admission.images) == (0, 0)


async def test_who_leaves_is_not_run_and_counted(tmp_path: Path, ways: list[str]) -> None:
    engine = FakeEngine()
    async with running(tmp_path, engine) as run:
        first = await run.hold_first()
        _, writer = await run.connect()
        writer.write(request(png(2)))
        await run.until(lambda: run.service.queue_length == 1)
        assert ways[-1] == "short"
        writer.close()
        await run.until(lambda: run.service.admission.images == 1)
        assert run.in_flight == 1
        engine.let_go()
        assert (await first).status_code == 200
        await run.until(lambda: run.service.queue_length == 0)
        assert engine.batches == [[1]]
        assert await run.metric("perceiver_cancellations_total") == 1
        assert await run.metric('perceiver_requests_total{code="499",route="/predict"}') == 1
        assert await run.metric('perceiver_rejections_total{reason="client_disconnected"}') == 1


async def test_who_leaves_while_it_runs_harms_nobody(tmp_path: Path) -> None:
    engine = FakeEngine()
    async with running(tmp_path, engine) as run:
        engine.hold()
        _, writer = await run.connect()
        writer.write(request(png(1)))
        await run.until(lambda: engine.batches == [[1]])
        writer.transport.abort()
        await run.until(lambda: run.in_flight == 0)
        engine.let_go()
        assert (await ask(run, request(png(2))))[0] == 200
        live = run.service.store.live
        assert live is not None
        assert live._leases == 0


async def test_the_last_answer_of_a_drain_closes_the_connection(tmp_path: Path) -> None:
    engine = FakeEngine()
    async with running(tmp_path, engine) as run:
        engine.hold()
        reader, writer = await run.connect()
        writer.write(request(png(1)))
        await run.until(lambda: engine.batches == [[1]])
        run.service.draining = True
        engine.let_go()
        status, headers, _ = await read_answer(reader)
        assert (status, headers["connection"]) == (200, "close")
        assert await reader.read() == b""
        run.service.draining = False


async def test_a_connection_that_is_told_to_end_ends_with_its_answer(tmp_path: Path) -> None:
    engine = FakeEngine()
    async with running(tmp_path, engine) as run:
        engine.hold()
        reader, writer = await run.connect()
        writer.write(request(png(1)))
        await run.until(lambda: engine.batches == [[1]])
        assert run.server is not None
        (connection,) = [each for each in run.server.server_state.connections if each.cycle is not None]
        connection.shutdown()
        engine.let_go()
        status, headers, _ = await read_answer(reader)
        assert (status, headers["connection"]) == (200, "close")
        assert await reader.read() == b""


@pytest.mark.parametrize("setting", [{"access_log": True}, {"cors_origins": ("https://example.org",)}])
async def test_what_looks_at_every_request_sees_all_of_them(
    tmp_path: Path, ways: list[str], setting: dict[str, object]
) -> None:
    async with running(tmp_path, **setting) as run:
        assert (await ask(run, request(png(1))))[0] == 200
        assert ways == ["long"]
