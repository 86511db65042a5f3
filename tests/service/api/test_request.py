"""A request has one life, whether its connection drives it or ASGI. Over bare sockets."""

import asyncio
import json
import re
from pathlib import Path

import numpy as np
import pytest

from service.api.predict import PredictEndpoint
from service.api.request import InferenceRequest
from tests.fakes import FakeEngine
from tests.imaging.files import encode, pixels
from tests.service.harness import Running, error_of, png, read_answer, request_head, running

FORM = b"--x\r\nContent-Disposition: form-data; name=file; filename=a.png\r\n\r\n%b\r\n--x--\r\n"
LARGE = encode(pixels(300, 300), "PNG")  # more bytes than the event loop decodes
MANY = encode(np.zeros((300, 300, 3), np.uint8), "PNG")  # more pixels


def request(body: bytes, *headers: str, kind: str = "image/png", target: str = "/predict") -> bytes:
    return request_head(len(body), *headers, target=target).replace(b"image/png", kind.encode()) + body


@pytest.fixture
def drivers(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Who drives each request to /predict, in the order in which they began."""
    taken: list[str] = []
    direct, call = PredictEndpoint.direct, PredictEndpoint.__call__

    def direct_noted(endpoint: PredictEndpoint, *arguments: object) -> InferenceRequest | None:
        request = direct(endpoint, *arguments)  # type: ignore[arg-type]
        if request is not None:
            taken.append("connection")
        return request

    async def call_noted(endpoint: PredictEndpoint, *arguments: object) -> None:
        taken.append("asgi")
        await call(endpoint, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(PredictEndpoint, "direct", direct_noted)
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
    "from a page": request(png(3), "Origin: https://example.org"),
}


BY_ASGI = ["too large", "large", "escaped path", "absolute target", "fragment", "expected", "from a page"]
COUNTS = re.compile(r"perceiver_(requests_total|rejections_total|\w+_seconds_count|images_total|admitted)")


async def answers_to_all(folder: Path, drivers: list[str]) -> tuple[dict[str, object], dict[str, str], list[str]]:
    """The answers to `REQUESTS`, who drove each, and what was counted."""
    answers: dict[str, object] = {}
    driven: dict[str, str] = {}
    limits = {"max_body_bytes": 8000, "inline_decode_bytes": 5000, "inline_decode_pixels": 10_000}
    async with running(folder, **limits, max_queue_bytes=10_000) as run:
        for name, data in REQUESTS.items():
            drivers.clear()
            answers[name] = comparable(await ask(run, data))
            driven[name] = drivers[0]
        exposition = (await run.client.get("/metrics")).text.splitlines()
    return answers, driven, [line for line in exposition if COUNTS.match(line)]


async def test_both_drivers_give_the_same_answers_and_counts(
    tmp_path: Path, drivers: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    answers, driven, counts = await answers_to_all(tmp_path / "direct", drivers)
    monkeypatch.setattr(PredictEndpoint, "direct", lambda *arguments: None)
    expected, all_asgi, expected_counts = await answers_to_all(tmp_path / "asgi", drivers)
    for name in REQUESTS:
        assert answers[name] == expected[name], name
    assert counts == expected_counts
    assert [name for name in driven if driven[name] == "asgi"] == BY_ASGI
    assert set(all_asgi.values()) == {"asgi"}
    assert {answer[0] for answer in expected.values()} >= {200, 400, 413, 415}  # type: ignore[index]


@pytest.mark.parametrize("first", [10, 80, -10])
async def test_how_a_request_is_split_into_packets_does_not_choose_its_driver(
    tmp_path: Path, drivers: list[str], first: int
) -> None:
    async with running(tmp_path) as run:
        reader, writer = await run.connect()
        whole = request(png(3))
        writer.write(whole[:first])
        await asyncio.sleep(0.02)
        writer.write(whole[first:])
        assert (await read_answer(reader))[0] == 200
        writer.write(whole)
        assert (await read_answer(reader))[0] == 200
        assert drivers == ["connection", "connection"]


@pytest.mark.parametrize("setting", [{"access_log": True}, {"cors_origins": ("https://example.org",)}])
async def test_nor_do_the_access_log_and_cors(
    tmp_path: Path, drivers: list[str], setting: dict[str, object], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "service.access")
    async with running(tmp_path, **setting) as run:
        assert (await ask(run, request(png(1))))[0] == 200
        page = await ask(run, request(png(1), "Origin: https://example.org"))
        assert (page[0], page[1].get("access-control-allow-origin")) == (
            200,
            "https://example.org" if "cors_origins" in setting else None,
        )
        assert drivers == ["connection", "asgi"]
    lines = [record.getMessage() for record in caplog.records if record.name == "service.access"]
    assert lines == (["POST /predict 200"] * 2 if "access_log" in setting else [])


@pytest.mark.parametrize("size", [1000, 1001], ids=["connection", "asgi"])
async def test_an_error_of_the_head_does_not_wait_for_the_body(tmp_path: Path, size: int) -> None:
    async with running(tmp_path, inline_decode_bytes=1000) as run:
        reader, writer = await run.connect()
        writer.write(request_head(size, target="/predict?top_k=0"))
        status, headers, body = await read_answer(reader)
        assert (status, error_of(body), headers.get("connection")) == (400, "invalid_top_k", None)
        writer.write(bytes(size))  # which is dropped
        await asyncio.sleep(0.02)
        writer.write(request(png(1)))
        assert (await read_answer(reader))[0] == 200


async def test_a_large_image_of_a_small_file_is_decoded_elsewhere(tmp_path: Path, drivers: list[str]) -> None:
    async with running(tmp_path, inline_decode_pixels=10_000) as run:
        assert (await ask(run, request(MANY)))[0] == 200
        assert drivers == ["connection"]
        assert run.decoded_elsewhere == 1


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


async def test_who_leaves_is_not_run_and_counted(tmp_path: Path) -> None:
    engine = FakeEngine()
    async with running(tmp_path, engine) as run:
        first = await run.hold_first()
        _, writer = await run.connect()
        writer.write(request(png(2)))
        await run.until(lambda: run.service.queue_length == 1)
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
