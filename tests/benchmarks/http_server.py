"""A small HTTP server that does what a test wants, one request at a time on each connection."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

OK = b"HTTP/1.1 200 OK\r\nServer-Timing: decode;dur=0.5, queue;dur=1.5\r\nContent-Length: 2\r\n\r\n{}"
Reply = Callable[[bytes], Awaitable[bytes]]


@dataclass
class Log:
    """What the server saw."""

    port: int = 0
    connections: int = 0
    bodies: list[bytes] = field(default_factory=list)
    at_once: int = 0
    most_at_once: int = 0


async def always_ok(body: bytes) -> bytes:
    return OK


@asynccontextmanager
async def http_server(reply: Reply = always_ok) -> AsyncIterator[Log]:
    """Serve on a free port. `reply` maps a request's body to the bytes to send; b"" closes the connection."""
    log = Log()
    tasks: set[asyncio.Task[None] | None] = set()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        log.connections += 1
        tasks.add(asyncio.current_task())
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = next(line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
                body = await reader.readexactly(int(length.partition(b":")[2]))
                log.bodies.append(body)
                log.at_once += 1
                log.most_at_once = max(log.most_at_once, log.at_once)
                answer = await reply(body)
                log.at_once -= 1
                if not answer:
                    break
                writer.write(answer)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass  # cancelled only below, where nobody waits for the handler's end but the server itself
        finally:
            writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    log.port = server.sockets[0].getsockname()[1]
    try:
        yield log
    finally:
        server.close()
        for task in filter(None, tasks):
            task.cancel()
        await asyncio.gather(*filter(None, tasks))
        await server.wait_closed()


def request(body: bytes) -> bytes:
    """Build a whole request."""
    return b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
