import asyncio

import pytest

from benchmarks.client import Client, DisconnectedError
from tests.benchmarks.http_server import OK, http_server, request


async def test_one_connection_carries_many_requests() -> None:
    async with http_server() as log:
        client = Client("127.0.0.1", log.port)
        answers = [await client.send(request(b"%d" % number), 5) for number in range(3)]
        client.close()
    assert [(a.status, a.server_timing, a.body) for a in answers] == [
        (200, b"decode;dur=0.5, queue;dur=1.5", b"{}")
    ] * 3
    assert log.bodies == [b"0", b"1", b"2"]
    assert log.connections == 1


async def test_answers_of_one_request_do_not_leak_into_the_next() -> None:
    answers = [OK, b"HTTP/1.1 404 Not Found\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n"]

    async def reply(body: bytes) -> bytes:
        return answers[int(body)]

    async with http_server(reply) as log:
        client = Client("127.0.0.1", log.port)
        assert (await client.send(request(b"0"), 5)).server_timing != b""
        second = await client.send(request(b"1"), 5)
        client.close()
    assert (second.status, second.server_timing, second.body) == (404, b"", b"abcde")


async def test_connection_close_opens_another() -> None:
    async def reply(body: bytes) -> bytes:
        return OK.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n", 1)

    async with http_server(reply) as log:
        client = Client("127.0.0.1", log.port)
        assert [(await client.send(request(b"x"), 5)).status for _ in range(2)] == [200, 200]
        client.close()
    assert log.connections == 2


@pytest.mark.parametrize("answer", [b"", b"this is no HTTP\r\n\r\n"])
async def test_no_answer_is_an_error_and_the_next_request_works(answer: bytes) -> None:
    async def reply(body: bytes) -> bytes:
        return answer if body == b"bad" else OK

    async with http_server(reply) as log:
        client = Client("127.0.0.1", log.port)
        with pytest.raises(DisconnectedError):
            await client.send(request(b"bad"), 5)
        assert (await client.send(request(b"good"), 5)).status == 200
        client.close()


async def test_a_late_answer_is_not_taken_for_the_next_one() -> None:
    release = asyncio.Event()

    async def reply(body: bytes) -> bytes:
        if body == b"slow":
            await release.wait()
            return OK.replace(b"{}", b"no")
        return OK

    async with http_server(reply) as log:
        client = Client("127.0.0.1", log.port)
        with pytest.raises(TimeoutError):
            await client.send(request(b"slow"), 0.05)
        release.set()
        assert (await client.send(request(b"next"), 5)).body == b"{}"
        client.close()


async def test_nobody_listens() -> None:
    async with http_server() as log:
        port = log.port
    with pytest.raises(DisconnectedError, match=f"no connection to 127.0.0.1:{port}"):
        await Client("127.0.0.1", port).send(request(b""), 5)
