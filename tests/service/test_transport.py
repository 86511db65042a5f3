"""Heads and bodies of answers in one write, and nothing ever kept back for good."""

import asyncio
from pathlib import Path

import pytest

from service.transport import JoiningTransport
from tests.service.harness import read_answer, running

HEAD = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n"


class Recorder(asyncio.Transport):
    """Keeps what is written."""

    def __init__(self) -> None:
        super().__init__()
        self.written: list[bytes] = []
        self.closed = False

    def is_closing(self) -> bool:
        return self.closed

    def pause_reading(self) -> None:
        raise NotImplementedError

    def resume_reading(self) -> None:
        raise NotImplementedError

    def write(self, data: bytes) -> None:
        self.written.append(data)

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


@pytest.fixture
def joining(recorder: Recorder) -> JoiningTransport:
    return JoiningTransport(recorder)


def test_a_head_goes_with_its_body(joining: JoiningTransport, recorder: Recorder) -> None:
    joining.write(HEAD)
    assert recorder.written == []
    joining.write(b"ab")
    joining.write(b"more")
    assert recorder.written == [HEAD + b"ab", b"more"]


def test_an_invitation_to_send_is_no_head(joining: JoiningTransport, recorder: Recorder) -> None:
    joining.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    assert recorder.written == [b"HTTP/1.1 100 Continue\r\n\r\n"]


def test_a_head_without_a_body_is_sent_at_the_end(joining: JoiningTransport, recorder: Recorder) -> None:
    joining.write(HEAD)
    joining.flush()
    joining.flush()
    assert recorder.written == [HEAD]
    joining.write(HEAD)
    joining.close()
    assert recorder.written == [HEAD, HEAD]
    assert joining.is_closing()


async def test_head_requests_and_pipelined_ones_are_answered(tmp_path: Path) -> None:
    async with running(tmp_path) as run:
        reader, writer = await run.connect()
        request = b"%s /health/live HTTP/1.1\r\nHost: x\r\n\r\n"
        writer.write(request % b"HEAD" + request % b"GET")
        async with asyncio.timeout(10):
            assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200")
        assert (await read_answer(reader))[2] == b'{"status":"live"}'
