"""What HTTP wants of the heads of requests, over bare sockets."""

from pathlib import Path

import pytest

from service.server.request_head import MAX_HEADER_LINES
from tests.service.harness import ended, error_of, png, read_answer, request_head, running

ORDINARY = request_head(len(png(1))) + png(1)
CHUNKED = request_head(None, "Transfer-Encoding: chunked")
TOO_LARGE = (431, "headers_too_large")
OLD = ORDINARY.replace(b"HTTP/1.1", b"HTTP/1.0")


def with_hosts(request: bytes, *hosts: bytes) -> bytes:
    """A request with other headers Host than its own."""
    return request.replace(b"Host: test\r\n", b"".join(b"Host: %b\r\n" % host for host in hosts))


async def assert_refused(folder: Path, whole: bytes, *, expected: tuple[int, str] = (400, "bad_request")) -> None:
    """Whether it comes at once, or in pieces."""
    async with running(folder) as run:
        for pieces in ([whole], [whole[:20], whole[20:]]):
            reader, writer = await run.connect()
            for piece in pieces:
                writer.write(piece)
                await writer.drain()
            status, headers, body = await read_answer(reader)
            assert (status, error_of(body), headers["connection"]) == (*expected, "close")
            assert await ended(reader)
        assert run.engine.batches == []
        assert await run.metric(f'perceiver_rejections_total{{reason="{expected[1]}"}}') == 2


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


async def test_a_request_of_more_lines_than_any_sensible_client_sends(tmp_path: Path) -> None:
    first, rest = ORDINARY.split(b"\r\n", 1)
    lines = rest.partition(b"\r\n\r\n")[0].count(b"\r\n") + 1
    most = first + b"\r\n" + b"a:\r\n" * (MAX_HEADER_LINES - lines) + rest
    async with running(tmp_path) as run:
        reader, writer = await run.connect()
        writer.write(most)
        assert (await read_answer(reader))[0] == 200
    await assert_refused(tmp_path / "more", most.replace(b"a:\r\n", b"a:\r\na:\r\n", 1), expected=TOO_LARGE)


@pytest.mark.parametrize("before", [ORDINARY[:24], CHUNKED + b"1\r\na\r\n0\r\n"], ids=["head", "trailer"])
async def test_lines_are_counted_before_their_end(tmp_path: Path, before: bytes) -> None:
    """Each takes many times its bytes in memory, and who sends slowly would keep that."""
    async with running(tmp_path) as run:
        reader, writer = await run.connect()
        writer.write(before)
        await writer.drain()
        writer.write(b"a:\r\n" * (MAX_HEADER_LINES + 2))
        status, _, body = await read_answer(reader)
        assert (status, error_of(body)) == TOO_LARGE
        assert await ended(reader)


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


@pytest.mark.parametrize("version", [b"2.0", b"0.9"])
async def test_versions_that_are_not_spoken(tmp_path: Path, version: bytes) -> None:
    await assert_refused(tmp_path, ORDINARY.replace(b"HTTP/1.1", b"HTTP/" + version))


@pytest.mark.parametrize("lines", [b"gzip, chunked", b"gzip\r\nTransfer-Encoding: chunked"])
async def test_transfer_codings_beside_chunked_are_unknown(tmp_path: Path, lines: bytes) -> None:
    whole = request_head(None).removesuffix(b"\r\n") + b"Transfer-Encoding: " + lines + b"\r\n\r\n0\r\n\r\n"
    await assert_refused(tmp_path, whole, expected=(501, "unsupported_transfer_coding"))


@pytest.mark.parametrize("target", ["http://test", "http://test?x=1"])
async def test_a_target_without_a_path_is_the_root(tmp_path: Path, target: str) -> None:
    async with running(tmp_path) as run:
        reader, writer = await run.connect()
        writer.write(request_head(None, target=target, method="GET"))
        status, _, body = await read_answer(reader)
        assert status == 200
        assert b"<!doctype html>" in body.lower()  # the page
        writer.write(ORDINARY)
        assert (await read_answer(reader))[0] == 200


async def test_answers_that_no_application_gives_have_a_date(tmp_path: Path) -> None:
    async with running(tmp_path) as run:
        run.server.server_state.default_headers = [(b"date", b"now")]
        reader, writer = await run.connect()
        writer.write(b"this is no HTTP\r\n\r\n")
        assert (await read_answer(reader))[1]["date"] == "now"


@pytest.mark.parametrize("late", [0, 10], ids=["in one read", "in two"])
@pytest.mark.parametrize(
    ("codings", "status"),
    [
        (("identity",), 200),
        (("gzip", "identity"), 415),
        (("identity", "gzip"), 415),
        (("Identity", "identity"), 200),
        (("",), 200),
        (("identity, Identity ,",), 200),
        (("identity, gzip",), 415),
    ],
)
async def test_each_content_encoding_counts(tmp_path: Path, codings: tuple[str, ...], status: int, late: int) -> None:
    request = request_head(len(png(1)), *[f"Content-Encoding: {coding}" for coding in codings]) + png(1)
    async with running(tmp_path) as run:
        reader, writer = await run.connect()
        writer.write(request[: len(request) - late])
        if late:
            await run.until(lambda: run.in_flight == 1 or status == 415)
        writer.write(request[len(request) - late :])
        assert (await read_answer(reader))[0] == status


@pytest.mark.parametrize("late", [0, 10], ids=["in one read", "in two"])
async def test_a_length_may_begin_with_zeros(tmp_path: Path, late: int) -> None:
    """However many: a number of more than 4,300 digits is an error of Python's, and was one of this service's."""
    request = request_head(None, f"Content-Length: {'0' * 5000}{len(png(1))}") + png(1)
    async with running(tmp_path) as run:
        reader, writer = await run.connect()
        writer.write(request[: len(request) - late])
        if late:
            await run.until(lambda: run.in_flight == 1)
        writer.write(request[len(request) - late :])
        assert (await read_answer(reader))[0] == 200


@pytest.mark.parametrize("blanks", [" ", "\t", " \t "])
async def test_blanks_behind_a_value_are_none_of_it(tmp_path: Path, blanks: str) -> None:
    lines = (f"X-API-Key: a-key{blanks}", f"X-Request-Id: an-id{blanks}", f"X-Request-Timeout-Ms: 9000{blanks}")
    request = with_hosts(request_head(len(png(1)), *lines), b"a" + blanks.encode()) + png(1)
    async with running(tmp_path, api_keys="a-key") as run:
        reader, writer = await run.connect()
        writer.write(request)
        status, headers, _ = await read_answer(reader)
        assert (status, headers["x-request-id"]) == (200, "an-id")
