"""Limits of connections and headers, over raw sockets."""

import asyncio
import json
from pathlib import Path

import pytest

from service.server import connections, timeouts
from tests.service.harness import Running, ended, error_of, png, read_answer, request_head, running


async def test_a_client_that_says_nothing_is_disconnected(tmp_path: Path) -> None:
    async with running(tmp_path, header_timeout_s=0.1) as run:
        reader, _ = await run.connect()
        assert await ended(reader)


async def test_headers_that_trickle_are_disconnected(tmp_path: Path) -> None:
    async with running(tmp_path, header_timeout_s=0.15) as run:
        reader, writer = await run.connect()

        async def trickle() -> None:
            for byte in request_head(10) * 100:
                writer.write(bytes([byte]))
                await asyncio.sleep(0.01)

        task = asyncio.create_task(trickle())
        status, headers, body = await read_answer(reader)
        assert (status, error_of(body), headers["connection"]) == (408, "headers_timeout", "close")
        assert await ended(reader)
        task.cancel()
        assert await run.metric('perceiver_rejections_total{reason="headers_timeout"}') == 1


async def test_headers_of_a_second_request_have_their_time_too(tmp_path: Path) -> None:
    async with running(tmp_path, header_timeout_s=0.15) as run:
        reader, writer = await run.connect()
        writer.write(request_head(len(png(1))) + png(1))
        assert (await read_answer(reader))[0] == 200
        writer.write(b"POST /predict HT")
        assert (await read_answer(reader))[0] == 408
        assert await ended(reader)


async def test_line_ends_between_requests_do_not_hold_a_connection(tmp_path: Path) -> None:
    async with running(tmp_path, header_timeout_s=0.15) as run:
        reader, writer = await run.connect()
        writer.write(request_head(len(png(1))) + png(1))
        assert (await read_answer(reader))[0] == 200
        writer.write(b"\r\n")
        assert await ended(reader)


async def test_an_idle_connection_outlives_the_header_timeout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "POLL_SECONDS", 0.01)
    async with running(tmp_path, header_timeout_s=0.1, keep_alive_s=60) as run:
        reader, writer = await run.connect()
        for _ in range(2):
            writer.write(request_head(len(png(1))) + png(1))
            assert (await read_answer(reader))[0] == 200
            await asyncio.sleep(0.15)


async def test_headers_that_are_too_large(tmp_path: Path) -> None:
    async with running(tmp_path) as run:
        reader, writer = await run.connect()
        writer.write(b"POST /predict HTTP/1.1\r\n")
        for _ in range(70):
            writer.write(b"X-Filler: " + b"x" * 1024 + b"\r\n")
        status, _, body = await read_answer(reader)
        assert (status, error_of(body)) == (431, "headers_too_large")


@pytest.mark.parametrize("pieces", [1, 2])
async def test_headers_that_are_too_large_are_so_however_they_come(tmp_path: Path, pieces: int) -> None:
    """In one read with their end, too, where nothing is left to be bounded."""
    head = b"GET /health/live HTTP/1.1\r\n" + b"".join(b"X-%d: %b\r\n" % (n, b"x" * 1024) for n in range(90)) + b"\r\n"
    async with running(tmp_path) as run:
        reader, writer = await run.connect()
        writer.write(head[: len(head) // pieces])
        if pieces == 2:
            await asyncio.sleep(0.05)
            writer.write(head[len(head) // 2 :])
        status, _, body = await read_answer(reader)
        assert (status, error_of(body)) == (431, "headers_too_large")


@pytest.mark.parametrize("body", [b"", png(1)])
async def test_a_url_of_any_length_is_a_clients_error(
    tmp_path: Path, body: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    """Longer than the parser of URLs takes, shorter than what is refused as a head; with its body and without."""
    head = request_head(len(png(1)), target="/predict?top_k=1" + "&" * 65_300)
    async with running(tmp_path) as run:
        for target in ("/predict?top_k=1" + "&" * 2000, "/predict?top_k=1" + "&" * 65_300):
            head = request_head(len(png(1)), target=target)
            reader, writer = await run.connect()
            writer.write(head[:60_000])
            await asyncio.sleep(0.02)
            writer.write(head[60_000:] + body)
            status, _, answer = await read_answer(reader)
            assert (status, error_of(answer)) == (400, "invalid_top_k")
        await run.until(lambda: run.in_flight == 0)
    assert not caplog.records


async def test_a_url_that_the_parser_refuses_is_answered(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    head = b"POST /predict?top_k=5%b HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n" % (b"&" * 65_530)
    async with running(tmp_path) as run:
        for rest in (b"", b"0123456789"):
            reader, writer = await run.connect()
            writer.write(head[:60_000])
            await asyncio.sleep(0.02)
            writer.write(head[60_000:] + rest)
            status, _, _ = await read_answer(reader)
            assert status in (400, 431)
            assert await ended(reader)
    assert not caplog.records


async def test_what_is_no_http_gets_the_shape_of_all_errors(tmp_path: Path) -> None:
    async with running(tmp_path) as run:
        reader, writer = await run.connect()
        writer.write(b"\x16\x03\x01 I speak TLS\r\n\r\n")
        status, headers, body = await read_answer(reader)
        assert (status, error_of(body), headers["connection"]) == (400, "bad_request", "close")
        assert json.loads(body)["error"]["request_id"] == headers["x-request-id"]
        assert await ended(reader)


async def test_one_connection_too_many_is_told_so(tmp_path: Path) -> None:
    async with running(tmp_path, max_connections=3) as run:
        await run.predict()  # the client keeps one open
        kept = [await run.connect() for _ in range(2)]
        await run.until(lambda: run.connections == 3)
        reader, writer = await run.connect()
        writer.write(request_head(len(png(1))) + png(1))
        status, headers, body = await read_answer(reader)
        assert (status, error_of(body), headers["retry-after"]) == (503, "unavailable", "1")
        assert await ended(reader)
        kept[0][1].close()
        await run.until(lambda: run.connections == 2)
        reader, writer = await run.connect()
        writer.write(request_head(len(png(1))) + png(1))
        assert (await read_answer(reader))[0] == 200


async def test_http_1_0_is_answered_and_closed(tmp_path: Path) -> None:
    async with running(tmp_path) as run:
        reader, writer = await run.connect()
        writer.write(request_head(len(png(1))).replace(b"HTTP/1.1", b"HTTP/1.0") + png(1))
        status, headers, _ = await read_answer(reader)
        assert (status, headers["connection"]) == (200, "close")
        assert await ended(reader)


@pytest.mark.parametrize("query", [b"?top_k=\xff", b"?\xff=1", b"?top_k=1;2", b"?&&&=", b"?top_k=%"])
async def test_a_query_of_any_bytes_is_no_server_error(tmp_path: Path, query: bytes) -> None:
    async with running(tmp_path) as run:
        reader, writer = await run.connect()
        writer.write(request_head(len(png(1))).replace(b"/predict", b"/predict" + query) + png(1))
        assert (await read_answer(reader))[0] == 400


# What came to light in a review: clients that do not read, that pipeline, that take their time on a second head


async def test_a_client_that_does_not_read_is_disconnected(tmp_path: Path) -> None:
    async with running(tmp_path, write_timeout_s=0.3, keep_alive_s=60) as run:
        _, writer = await run.connect()
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        request = request_head(None, target="/openapi.json", method="GET")
        # More answers than the buffers of both sockets hold, each asked for when the last was written.
        state = run.server.server_state
        (connection,) = state.connections
        while not connection.flow.write_paused:
            answered = state.total_requests
            writer.write(request)
            await run.until(lambda before=answered: state.total_requests > before or connection.flow.write_paused)
        await run.until(lambda: not state.connections)
        assert run.in_flight == 0
        assert (await run.predict()).status_code == 200


async def test_who_is_refused_and_does_not_read_it_is_disconnected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timeouts, "LINGER_SECONDS", 0.3)
    async with running(tmp_path, write_timeout_s=600, header_timeout_s=600, keep_alive_s=600) as run:
        _, writer = await run.connect()
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        state = run.server.server_state
        await fill(run, writer)
        writer.write(b"this is no HTTP\r\n\r\n")
        await run.until(lambda: not state.connections)


@pytest.mark.parametrize("behind", [b"", b"this is no HTTP\r\n\r\n"])
async def test_who_does_not_read_the_last_answer_of_a_connection_is_disconnected(tmp_path: Path, behind: bytes) -> None:
    async with running(tmp_path, write_timeout_s=1, header_timeout_s=600, keep_alive_s=600) as run:
        _, writer = await run.connect()
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        state = run.server.server_state
        (connection,) = state.connections
        await fill(run, writer)
        writer.write(request_head(4, "Connection: close") + b"junk" + behind)
        await run.until(lambda: not state.connections)
        assert connection.transport.is_closing()


async def fill(run: Running, writer: asyncio.StreamWriter) -> None:
    """Ask for more than the buffers of both sockets hold, and for less than the service waits for its client for."""
    state = run.server.server_state
    (connection,) = state.connections
    while not connection.transport.get_write_buffer_size():
        answered = state.total_requests
        writer.write(request_head(None, target="/page/page.js", method="GET"))
        await run.until(lambda answered=answered: state.total_requests > answered)
    assert not connection.flow.write_paused


async def test_an_idle_connection_is_closed_in_its_time(tmp_path: Path) -> None:
    async with running(tmp_path, keep_alive_s=1, header_timeout_s=60) as run:
        reader, writer = await run.connect()
        writer.write(request_head(len(png(1))) + png(1))
        assert (await read_answer(reader))[0] == 200
        begun = asyncio.get_running_loop().time()
        assert await ended(reader)
        assert asyncio.get_running_loop().time() - begun > 0.8
        await run.until(lambda: len(run.server.config.clock._connections) == 0)
