"""What comes on a connection beside ordinary requests: wishes for other protocols, trailers, garbage; who leaves."""

import asyncio
import json
from pathlib import Path

import pytest

from service.server.request_head import MAX_HEADER_BYTES, head_without_upgrade
from tests.fakes import FakeEngine
from tests.service.harness import error_of, png, read_answer, request_head, running
from tests.service.server.test_protocol import ended

H2C = ("Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAMAAABkAAQCAAAAAAIAAAAA")
WEBSOCKET = ("Connection: upgrade", "UPGRADE: websocket", "Sec-WebSocket-Version: 13")


def label(body: bytes) -> float:
    """What tells the fake engine's images apart."""
    (entry,) = [top for top in json.loads(body)["predictions"][0]["top"] if top["index"] == 0]
    return float(entry["probability"])


def test_only_the_wish_is_left_out_of_a_head() -> None:
    headers = [(b"host", b"test"), (b"upgrade", b"h2c"), (b"connection", b"upgrade"), (b"upgrade", b"websocket")]
    head = head_without_upgrade(b"POST", b"/predict?top_k=1", "1.1", headers)
    assert head == b"POST /predict?top_k=1 HTTP/1.1\r\nhost: test\r\nconnection: upgrade\r\n\r\n"


@pytest.mark.parametrize("wish", [H2C, WEBSOCKET])
@pytest.mark.parametrize("pieces", ["whole", "head and body", "bytes"])
async def test_a_wish_for_another_protocol_is_ignored_and_the_body_read(
    tmp_path: Path, wish: tuple[str, ...], pieces: str
) -> None:
    async with running(tmp_path) as run:
        reader, writer = await run.connect()
        answers = []
        for number, headers in ((1, ()), (2, wish), (1, ())):
            head = request_head(len(png(number)), *headers)
            whole = head + png(number)
            cut = {"whole": [whole], "head and body": [head, png(number)]}
            for piece in cut.get(pieces) or [whole[at : at + 1] for at in range(len(whole))]:
                writer.write(piece)
                await writer.drain()
                await asyncio.sleep(0)
            answers.append(await read_answer(reader))
        assert [status for status, _, _ in answers] == [200, 200, 200]
        assert label(answers[0][2]) == label(answers[2][2]) != label(answers[1][2])


async def test_a_body_behind_a_wish_is_never_taken_for_a_request(tmp_path: Path) -> None:
    async with running(tmp_path, api_keys="secret") as run:
        reader, writer = await run.connect()
        hidden = request_head(len(png(1)), "X-API-Key: secret") + png(1)
        writer.write(request_head(len(hidden), *H2C))
        await writer.drain()
        writer.write(hidden)
        status, _, body = await read_answer(reader)
        assert (status, error_of(body)) == (401, "unauthorized")
        writer.write(request_head(None, target="/health/live", method="GET"))
        assert (await read_answer(reader))[0] == 200  # and nothing before it


async def test_this_is_no_proxy(tmp_path: Path) -> None:
    async with running(tmp_path) as run:
        reader, writer = await run.connect()
        writer.write(b"CONNECT example.org:443 HTTP/1.1\r\nhost: example.org\r\n\r\n")
        status, _, body = await read_answer(reader)
        assert (status, error_of(body)) == (400, "bad_request")
        assert await ended(reader)


async def test_a_trailer_is_no_header(tmp_path: Path) -> None:
    async with running(tmp_path, api_keys="secret") as run:
        reader, writer = await run.connect()
        chunk = b"%x\r\n%b\r\n" % (len(png(1)), png(1))
        writer.write(request_head(None, "Transfer-Encoding: chunked") + chunk + b"0\r\nX-API-Key: secret\r\n\r\n")
        assert (await read_answer(reader))[0] == 401


@pytest.mark.parametrize("trailer", [b"X-A: " + b"b" * 1000 + b"\r\n", b"b" * 1000])
async def test_trailers_are_bounded(tmp_path: Path, trailer: bytes) -> None:
    async with running(tmp_path) as run:
        reader, writer = await run.connect()
        writer.write(request_head(None, "Transfer-Encoding: chunked") + b"1\r\na\r\n0\r\nX-A: b")
        await writer.drain()
        await run.until(lambda: run.in_flight == 1)
        for _ in range(MAX_HEADER_BYTES // len(trailer) + 1):
            writer.write(trailer)
            await writer.drain()
            await asyncio.sleep(0)
        status, _, body = await read_answer(reader)
        assert (status, error_of(body)) == (431, "headers_too_large")
        assert await ended(reader)
        await run.until(lambda: run.in_flight == 0)


async def test_a_body_in_many_small_chunks_is_no_head(tmp_path: Path) -> None:
    async with running(tmp_path) as run:
        reader, writer = await run.connect()
        writer.write(request_head(None, "Transfer-Encoding: chunked"))
        for byte in png(1):
            writer.write(b"1;" + b"x" * 1000 + b"\r\n%c\r\n" % byte)
            await writer.drain()
        writer.write(b"0\r\nX-Checksum: 1\r\n\r\n")
        assert (await read_answer(reader))[0] == 200


async def test_garbage_in_a_body_that_was_answered_gets_no_second_answer(tmp_path: Path) -> None:
    async with running(tmp_path) as run:
        reader, writer = await run.connect()
        writer.write(request_head(None, "Transfer-Encoding: chunked", target="/nothing"))
        assert (await read_answer(reader))[0] == 404
        writer.write(b"this is no chunk\r\n")
        assert await reader.read() == b""


async def test_who_leaves_with_several_requests_waiting_has_none_of_them_run(tmp_path: Path) -> None:
    engine = FakeEngine()
    async with running(tmp_path, engine) as run:
        held = await run.hold_first()
        _, writer = await run.connect()
        chunk = b"%x\r\n%b\r\n" % (len(png(2)), png(2))
        writer.write(request_head(None, "Transfer-Encoding: chunked") + chunk + b"0\r\n\r\n")
        await run.until(lambda: run.service.queue_length == 1)
        writer.write(request_head(len(png(2))) + png(2))
        await asyncio.sleep(0.02)
        writer.close()
        await run.assert_first_alone_ran(held)
        assert await run.metric('perceiver_requests_total{code="499",route="/predict"}') == 1


async def test_who_disconnected_is_not_run_either(tmp_path: Path) -> None:
    engine = FakeEngine()
    async with running(tmp_path, engine) as run:
        held = await run.hold_first()
        _, writer = await run.connect()
        writer.write(2 * (request_head(len(png(2))) + png(2)))
        await run.until(lambda: run.service.queue_length == 1)
        writer.transport.abort()
        await run.assert_first_alone_ran(held)
