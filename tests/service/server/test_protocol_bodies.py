"""Limits of bodies, and answers that come before their end, over raw sockets."""

import asyncio
from pathlib import Path

import pytest

from service.server import connections, timeouts
from service.server.request_head import MAX_HEADER_LINES
from tests.fakes import FakeEngine
from tests.service.harness import ended, error_of, png, read_answer, request_head, running


async def test_a_body_that_trickles_is_disconnected_however_steadily(tmp_path: Path) -> None:
    async with running(tmp_path, body_timeout_s=0.2) as run:
        reader, writer = await run.connect()
        writer.write(request_head(10_000, "X-Request-Id: mine"))

        async def trickle() -> None:
            while True:
                writer.write(b"x")
                await asyncio.sleep(0.01)

        task = asyncio.create_task(trickle())
        status, headers, body = await read_answer(reader)
        task.cancel()
        assert (status, error_of(body), headers["connection"]) == (408, "body_timeout", "close")
        assert headers["x-request-id"] == "mine"
        await run.until(lambda: run.in_flight == 0)
        assert run.service.admission.bytes == 0
        assert run.engine.batches == []
        assert await run.metric('perceiver_requests_total{code="408",route="/predict"}') == 1
        assert await run.metric('perceiver_rejections_total{reason="body_timeout"}') == 1
        assert await run.metric('perceiver_rejections_total{reason="client_disconnected"}') == 0


@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (b"3\r\nabc\r\nzz\r\n", 400, "bad_request"),
        (b"3\r\nabcde\r\n", 400, "bad_request"),
        (b"3\r\nabc\r\n0\r\n" + b"a:\r\n" * (MAX_HEADER_LINES + 9), 431, "headers_too_large"),
    ],
    ids=["no length", "longer than it says", "a trailer without end"],
)
async def test_a_broken_body_is_that_of_its_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, body: bytes, status: int, code: str, at_once: bool
) -> None:
    """It is answered under the request's id, and counted once, as the request that it is."""
    monkeypatch.setattr(timeouts, "LINGER_SECONDS", 0.2)
    async with running(tmp_path) as run:
        reader, writer = await run.connect()
        head = request_head(None, "Transfer-Encoding: chunked", "X-Request-Id: mine")
        if at_once:
            writer.write(head + body)
        else:
            writer.write(head)
            await run.until(lambda: run.in_flight == 1)
            writer.write(body)
        answered, headers, content = await read_answer(reader)
        assert (answered, error_of(content), headers["connection"]) == (status, code, "close")
        assert headers["x-request-id"] == "mine"
        writer.write(HEALTH)  # nobody knows whether this still belongs to the body
        assert await ended(reader)
        await run.until(lambda: run.in_flight == 0)
        assert run.service.admission.bytes == 0
        assert await run.metric(f'perceiver_requests_total{{code="{status}",route="/predict"}}') == 1
        assert await run.metric(f'perceiver_rejections_total{{reason="{code}"}}') == 1
        assert await run.metric('perceiver_rejections_total{reason="client_disconnected"}') == 0
        assert "/health/live" not in (await run.client.get("/metrics")).text


@pytest.mark.parametrize("size", [0, 2000, 2_000_000])
@pytest.mark.parametrize("version", ["1.0", "1.1"])
async def test_a_body_of_which_the_head_says_nothing_gets_a_sentence(tmp_path: Path, size: int, version: str) -> None:
    """As from `curl -H 'Content-Length:'`. The sentence arrives even where much is sent behind the head."""
    async with running(tmp_path) as run:
        reader, writer = await run.connect()
        writer.write(request_head(None).replace(b"HTTP/1.1", f"HTTP/{version}".encode()) + bytes(size))
        status, headers, body = await read_answer(reader)
        assert (status, error_of(body), headers["connection"]) == (411, "length_required", "close")
        assert b"Content-Length" in body
        assert await ended(reader)
        assert await run.metric('perceiver_rejections_total{reason="length_required"}') == 1
        writer.close()
        assert (await run.client.post("/models/reload")).status_code == 403  # which needs no body


@pytest.mark.parametrize("target", ["/explain", "/embed", "/v2/models/tiny/infer"])
async def test_nor_is_it_taken_for_an_empty_image_elsewhere(tmp_path: Path, target: str) -> None:
    async with running(tmp_path) as run:
        reader, writer = await run.connect()
        writer.write(request_head(None, target=target) + bytes(2000))
        status, _, body = await read_answer(reader)
        assert (status, b"Content-Length" in body) == (411, True)
        writer.close()


async def test_a_broken_body_that_nobody_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timeouts, "LINGER_SECONDS", 0.2)
    async with running(tmp_path) as run:
        reader, writer = await run.connect()
        writer.write(request_head(None, "Transfer-Encoding: chunked", target="/health/live", method="GET") + b"zz\r\n")
        status, headers, _ = await read_answer(reader)
        assert (status, headers["connection"]) == (200, "close")
        assert await ended(reader)


async def test_the_timeouts_do_not_limit_the_answer(tmp_path: Path) -> None:
    engine = FakeEngine()
    async with running(tmp_path, engine, body_timeout_s=0.5, header_timeout_s=0.5) as run:
        engine.hold()
        reader, writer = await run.connect()
        body = png(1)
        writer.write(request_head(len(body)) + body[:10])
        await run.until(lambda: run.in_flight == 1)
        writer.write(body[10:])
        await run.until(lambda: engine.batches == [[1]])
        await asyncio.sleep(0.6)
        engine.release()
        assert (await read_answer(reader))[0] == 200


async def test_an_announced_body_that_is_too_large_is_refused_unread(tmp_path: Path) -> None:
    async with running(tmp_path, max_body_bytes=2000) as run:
        reader, writer = await run.connect()
        writer.write(request_head(2001, "Expect: 100-continue"))
        status, _, body = await read_answer(reader)
        assert (status, error_of(body)) == (413, "body_too_large")


async def test_a_chunked_body_that_is_too_large_is_refused_while_reading(tmp_path: Path) -> None:
    async with running(tmp_path, max_body_bytes=2000) as run:
        reader, writer = await run.connect()
        writer.write(request_head(None, "Transfer-Encoding: chunked"))
        chunk = b"%x\r\n%s\r\n" % (1500, bytes(1500))
        writer.write(chunk)
        await run.until(lambda: run.service.admission.bytes == 1500)
        writer.write(chunk)
        status, _, body = await read_answer(reader)
        assert (status, error_of(body)) == (413, "body_too_large")


async def test_the_client_can_read_an_early_answer_while_it_still_sends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timeouts, "LINGER_SECONDS", 0.3)
    async with running(tmp_path, max_body_bytes=2000) as run:
        reader, writer = await run.connect()
        writer.write(request_head(10**12))

        async def send() -> None:
            while True:
                writer.write(bytes(100_000))
                await writer.drain()

        sending = asyncio.create_task(send())
        status, _, body = await read_answer(reader)
        assert (status, error_of(body)) == (413, "body_too_large")
        with pytest.raises(ConnectionError):
            await asyncio.wait_for(sending, 20)


@pytest.mark.parametrize("reason", ["HTTP/1.0", "Connection: close", "drain"])
async def test_an_early_answer_that_closes_waits_for_the_body(tmp_path: Path, reason: str) -> None:
    """Closed at once, with something unread, the connection would be reset, and the answer might be lost."""
    async with running(tmp_path, max_body_bytes=2000) as run:
        reader, writer = await run.connect()
        head = request_head(5000, *(["Connection: close"] if reason == "Connection: close" else []))
        if reason == "HTTP/1.0":
            head = head.replace(b"HTTP/1.1", b"HTTP/1.0")
        run.service.draining = reason == "drain"
        writer.write(head + bytes(4000))
        status, headers, _ = await read_answer(reader)
        assert (status, headers["connection"]) == (503 if reason == "drain" else 413, "close")
        await asyncio.sleep(0.05)
        assert not reader.at_eof()
        writer.write(bytes(1000) + request_head(len(png(1))) + png(1))  # the latter comes too late
        async with asyncio.timeout(timeouts.LINGER_SECONDS / 2):
            assert await ended(reader)
        run.service.draining = False


async def test_a_body_that_ends_after_an_early_answer_leaves_the_connection_usable(tmp_path: Path) -> None:
    async with running(tmp_path, max_body_bytes=2000) as run:
        reader, writer = await run.connect()
        writer.write(request_head(5000) + bytes(4000))
        assert (await read_answer(reader))[0] == 413
        writer.write(bytes(1000) + request_head(len(png(1))) + png(1))
        assert (await read_answer(reader))[0] == 200


async def test_a_body_that_ends_after_an_early_answer_leaves_the_connection_idle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A balancer that keeps the connection must not find it closed when the next request comes."""
    monkeypatch.setattr(timeouts, "LINGER_SECONDS", 0.05)
    monkeypatch.setattr(connections, "POLL_SECONDS", 0.01)
    async with running(tmp_path, max_body_bytes=2000, header_timeout_s=0.1, keep_alive_s=60) as run:
        reader, writer = await run.connect()
        writer.write(request_head(5000) + bytes(4000))
        assert (await read_answer(reader))[0] == 413
        writer.write(bytes(1000))
        await asyncio.sleep(0.3)
        writer.write(request_head(len(png(1))) + png(1))
        assert (await read_answer(reader))[0] == 200


@pytest.mark.parametrize(
    ("target", "content_type", "code"),
    [
        ("/predict", "text/plain", "unsupported_media_type"),
        ("/predict", "multipart/form-data", "invalid_form"),
        ("/predict?top_k=0", "image/png", "invalid_top_k"),
        ("/predict?top_k=99", "image/png", "invalid_top_k"),
    ],
)
async def test_what_the_head_condemns_is_answered_before_the_body(
    tmp_path: Path, target: str, content_type: str, code: str
) -> None:
    async with running(tmp_path) as run:
        reader, writer = await run.connect()
        headers = (f"Content-Type: {content_type}", "Expect: 100-continue")
        writer.write(request_head(1_000_000, *headers, target=target))
        status, _, body = await read_answer(reader)  # and no 100, which would ask for the body
        assert (status // 100, error_of(body)) == (4, code)


async def test_100_continue_is_sent_for_a_body_that_is_wanted(tmp_path: Path) -> None:
    async with running(tmp_path) as run:
        reader, writer = await run.connect()
        writer.write(request_head(len(png(1)), "Expect: 100-continue"))
        async with asyncio.timeout(10):
            assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        writer.write(png(1))
        assert (await read_answer(reader))[0] == 200


HEALTH = request_head(None, target="/health/live", method="GET")


@pytest.mark.parametrize("reason", ["media type", "size", "key", "path"])
async def test_who_was_not_asked_for_the_body_is_told_that_the_connection_ends(tmp_path: Path, reason: str) -> None:
    """A client that waits for 100 leaves the body out at any other answer: what comes next is a request."""
    keys = {"api_keys": "secret"} if reason == "key" else {}
    async with running(tmp_path, max_body_bytes=2000, **keys) as run:
        reader, writer = await run.connect()
        headers = ["Expect: 100-continue"] + ["Content-Type: text/plain"] * (reason == "media type")
        target = "/nothing" if reason == "path" else "/predict"
        writer.write(request_head(3000 if reason == "size" else 40, *headers, target=target))
        status, answered, _ = await read_answer(reader)
        statuses = {"media type": 415, "size": 413, "key": 401, "path": 404}
        assert (status, answered["connection"]) == (statuses[reason], "close")
        writer.write(HEALTH)  # from a client that did not listen
        assert await ended(reader)


async def test_who_sends_the_body_without_being_asked_keeps_the_connection(tmp_path: Path) -> None:
    async with running(tmp_path) as run:
        reader, writer = await run.connect()
        writer.write(request_head(4, "Expect: 100-continue", target="/nothing") + b"body")
        status, headers, _ = await read_answer(reader)
        assert (status, headers.get("connection")) == (404, None)
        writer.write(HEALTH)
        assert (await read_answer(reader))[0] == 200


async def test_a_client_of_http_1_0_is_not_told_to_continue(tmp_path: Path) -> None:
    async with running(tmp_path) as run:
        reader, writer = await run.connect()
        writer.write(request_head(len(png(1)), "Expect: 100-continue").replace(b"HTTP/1.1", b"HTTP/1.0"))
        await run.until(lambda: run.in_flight == 1)
        writer.write(png(1))
        assert (await read_answer(reader))[0] == 200


async def test_nothing_is_done_for_what_comes_behind_the_last_answer(tmp_path: Path) -> None:
    async with running(tmp_path, admin_key="root") as run:
        reader, writer = await run.connect()
        writer.write(request_head(10, "Expect: 100-continue", target="/nothing"))
        assert (await read_answer(reader))[1]["connection"] == "close"
        writer.write(bytes(10) + request_head(0, "X-API-Key: root", target="/models/reload"))
        assert await ended(reader)
        assert "/models/reload" not in (await run.client.get("/metrics")).text
