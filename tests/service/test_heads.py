"""What HTTP wants of the heads of requests, over bare sockets."""

from pathlib import Path

import pytest

from tests.service.harness import ended, error_of, png, read_answer, request_head, running

ORDINARY = request_head(len(png(1))) + png(1)
OLD = ORDINARY.replace(b"HTTP/1.1", b"HTTP/1.0")


def with_hosts(request: bytes, *hosts: bytes) -> bytes:
    """A request with other headers Host than its own."""
    return request.replace(b"Host: test\r\n", b"".join(b"Host: %b\r\n" % host for host in hosts))


async def assert_refused(folder: Path, whole: bytes) -> None:
    """Whether it comes at once, and could go the short way, or in pieces."""
    async with running(folder) as run:
        for pieces in ([whole], [whole[:20], whole[20:]]):
            reader, writer = await run.connect()
            for piece in pieces:
                writer.write(piece)
                await writer.drain()
            status, headers, body = await read_answer(reader)
            assert (status, error_of(body), headers["connection"]) == (400, "bad_request", "close")
            assert await ended(reader)
        assert run.engine.batches == []
        assert await run.metric('perceiver_rejections_total{reason="bad_request"}') == 2


@pytest.mark.parametrize(
    "hosts",
    [
        [],
        [b"a", b"b"],
        [b"a", b"a"],
        [b"a b"],
        [b"a/b"],
        [b"u@a"],
        [b"a?"],
        [b"a:b"],
        [b"::1"],
        [b"[::1"],
        [b"[]"],
        [b"a%2"],
        [b"\xff"],
    ],
)
async def test_a_request_names_one_host(tmp_path: Path, hosts: list[bytes]) -> None:
    await assert_refused(tmp_path, with_hosts(ORDINARY, *hosts))


async def test_an_old_request_that_names_two_hosts(tmp_path: Path) -> None:
    await assert_refused(tmp_path, with_hosts(OLD, b"a", b"b"))


async def test_hosts_that_are_allowed(tmp_path: Path) -> None:
    hosts = [b"a", b"", b"a.example:8000", b"a:", b"127.0.0.1:1", b"[::1]:8000", b"[fe80::1%25eth0]", b"a_b", b"a%20b"]
    requests = [with_hosts(ORDINARY, host) for host in hosts] + [with_hosts(OLD)]
    async with running(tmp_path) as run:
        for request in requests:
            reader, writer = await run.connect()
            writer.write(request)
            assert (await read_answer(reader))[0] == 200, request
