"""A client that behaves as badly as clients do, and knows which answer each misdeed deserves."""

import asyncio
import base64
import json
import random
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field

from tests.fakes import HEIGHT, WIDTH
from tests.imaging.files import encode, pixels, png_announcing
from tests.service.harness import read_answer

IMAGES = {
    kind: encode(pixels(48, 64, seed=number), kind)
    for number, kind in enumerate(("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF"))
}
PIXELS = HEIGHT * WIDTH * 3
LARGE = encode(pixels(900, 1200), "JPEG", quality=90)
GONE = 0  # no answer, because one of the two has hung up


class Wire:
    """One connection for one request."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def post(
        self, body: bytes, content_type: str, *headers: str, query: str = "", path: str = "/predict"
    ) -> None:
        head = [f"POST {path}{query} HTTP/1.1", "Host: chaos", f"Content-Type: {content_type}", *headers]
        await self.send("\r\n".join([*head, f"Content-Length: {len(body)}", "", ""]).encode() + body)

    async def infer(self, tensor: dict[str, object], binary: bytes, length: int | None = None) -> None:
        """Post an input of the protocol v2; `length` in place of the one of its JSON."""
        text = json.dumps({"inputs": [tensor]}).encode()
        header = f"Inference-Header-Content-Length: {len(text) if length is None else length}"
        await self.post(text + binary, "application/octet-stream", header, path="/v2/models/tiny/infer")

    async def status(self) -> int:
        try:
            return (await read_answer(self.reader))[0]
        except (ConnectionError, asyncio.IncompleteReadError):
            return GONE


Misdeed = Callable[[Wire, random.Random], Awaitable[int]]
MISDEEDS: dict[str, tuple[Misdeed, set[int]]] = {}


def deserves(*statuses: int) -> Callable[[Misdeed], Misdeed]:
    """Register a kind of request and the statuses it may get; 503 always may, since the queue can be full."""

    def register(misdeed: Misdeed) -> Misdeed:
        MISDEEDS[misdeed.__name__] = (misdeed, {*statuses, 503})
        return misdeed

    return register


def any_image(rng: random.Random) -> bytes:
    return rng.choice(list(IMAGES.values()))


@deserves(200)
async def good_raw(wire: Wire, rng: random.Random) -> int:
    await wire.post(any_image(rng), "image/*", query=f"?top_k={rng.randint(1, 5)}")
    return await wire.status()


@deserves(200)
async def good_form(wire: Wire, rng: random.Random) -> int:
    part = b'--b\r\nContent-Disposition: form-data; name="f"; filename="x"\r\n\r\n%s\r\n'
    parts = b"".join(part % any_image(rng) for _ in range(rng.randint(1, 8)))
    await wire.post(parts + b"--b--\r\n", "multipart/form-data; boundary=b")
    return await wire.status()


@deserves(200)
async def good_json(wire: Wire, rng: random.Random) -> int:
    images = [base64.b64encode(any_image(rng)).decode() for _ in range(rng.randint(1, 4))]
    await wire.post(json.dumps({"images": images}).encode(), "application/json")
    return await wire.status()


@deserves(200)
async def good_and_large(wire: Wire, rng: random.Random) -> int:
    await wire.post(LARGE, "image/jpeg")
    return await wire.status()


def v2_pixels(count: int, size: int) -> dict[str, object]:
    """An input of the protocol v2 with `size` bytes behind the JSON."""
    shape, parameters = [count, HEIGHT, WIDTH, 3], {"binary_data_size": size}
    return {"name": "images", "datatype": "UINT8", "shape": shape, "parameters": parameters}


@deserves(200)
async def good_tensor(wire: Wire, rng: random.Random) -> int:
    pixels = rng.randbytes(rng.randint(1, 8) * PIXELS)
    await wire.infer(v2_pixels(len(pixels) // PIXELS, len(pixels)), pixels)
    return await wire.status()


@deserves(200)
async def good_tensor_of_files(wire: Wire, rng: random.Random) -> int:
    files = [any_image(rng) for _ in range(rng.randint(1, 8))]
    binary = b"".join(len(file).to_bytes(4, "little") + file for file in files)
    parameters = {"binary_data_size": len(binary)}
    await wire.infer(
        {"name": "image_bytes", "datatype": "BYTES", "shape": [len(files)], "parameters": parameters}, binary
    )
    return await wire.status()


@deserves(400)
async def tensor_of_false_lengths(wire: Wire, rng: random.Random) -> int:
    pixels = rng.randbytes(PIXELS)
    wrong = rng.choice([-1, 0, PIXELS - 1, PIXELS + 1, 2**31, 2**63, 10**400])
    count, size = rng.choice([(1, wrong), (2, PIXELS), (2**61, PIXELS), (0, PIXELS)])
    await wire.infer(v2_pixels(count, size), pixels, rng.choice([None, None, 0, 50, 100_000]))
    return await wire.status()


@deserves(200, 504)
async def in_a_hurry(wire: Wire, rng: random.Random) -> int:
    await wire.post(any_image(rng), "image/png", f"X-Request-Timeout-Ms: {rng.randint(1, 20)}")
    return await wire.status()


@deserves(400, 200)  # some formats can lose their last bytes without losing a pixel
async def truncated(wire: Wire, rng: random.Random) -> int:
    image = any_image(rng)
    await wire.post(image[: rng.randrange(1, len(image))], "image/png")
    return await wire.status()


@deserves(400, 200, 413, 415)
async def mutated(wire: Wire, rng: random.Random) -> int:
    image = bytearray(any_image(rng))
    for _ in range(rng.randint(1, 20)):
        image[rng.randrange(len(image))] = rng.randrange(256)
    await wire.post(bytes(image), "image/png")
    return await wire.status()


@deserves(400)
async def junk(wire: Wire, rng: random.Random) -> int:
    await wire.post(b"junk" + rng.randbytes(rng.randrange(4000)), "application/octet-stream")
    return await wire.status()


@deserves(400)
async def empty(wire: Wire, rng: random.Random) -> int:
    await wire.post(b"", rng.choice(["image/png", "application/json", "multipart/form-data; boundary=b"]))
    return await wire.status()


@deserves(413)
async def bomb(wire: Wire, rng: random.Random) -> int:
    await wire.post(png_announcing(rng.randint(20_000, 2**31 - 1), 20_000), "image/png")
    return await wire.status()


@deserves(415)
async def wrong_content_type(wire: Wire, rng: random.Random) -> int:
    await wire.post(any_image(rng), rng.choice(["text/html", "video/mp4", "application/x-www-form-urlencoded", "?"]))
    return await wire.status()


@deserves(200)
async def wish_for_another_protocol(wire: Wire, rng: random.Random) -> int:
    await wire.post(any_image(rng), "image/png", "Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c")
    return await wire.status()


@deserves(413)
async def jpeg_of_many_scans(wire: Wire, rng: random.Random) -> int:
    data = encode(pixels(48, 64), "JPEG", progressive=True)
    scan = data[data.rindex(b"\xff\xda") : -2]
    await wire.post(data[:-2] + scan * rng.randint(101, 5000) + data[-2:], "image/jpeg")
    return await wire.status()


@deserves(400, 413)
async def wide_json(wire: Wire, rng: random.Random) -> int:
    item = rng.choice([b"[],", b"{},", b"1,", b'"",'])
    await wire.post(b'{"images":[' + item * rng.randint(1000, 1_000_000) + b"0]}", "application/json")
    return await wire.status()


@deserves(400)
async def deep_json(wire: Wire, rng: random.Random) -> int:
    await wire.post(rng.choice([b"[", b'{"a":']) * rng.randint(1000, 50_000), "application/json")
    return await wire.status()


@deserves(400)
async def broken_form(wire: Wire, rng: random.Random) -> int:
    await wire.post(b"--b\r\n" + rng.randbytes(200), "multipart/form-data; boundary=b")
    return await wire.status()


@deserves(413)
async def many_images(wire: Wire, rng: random.Random) -> int:
    await wire.post(json.dumps({"images": ["aaaa"] * 5000}).encode(), "application/json")
    return await wire.status()


@deserves(413)
async def gigantic_and_announced(wire: Wire, rng: random.Random) -> int:
    await wire.send(b"POST /predict HTTP/1.1\r\nHost: chaos\r\nContent-Length: 99999999999\r\n\r\n" + bytes(9000))
    return await wire.status()


@deserves(413, 408, GONE)
async def gigantic_in_chunks(wire: Wire, rng: random.Random) -> int:
    await wire.send(b"POST /predict HTTP/1.1\r\nHost: chaos\r\nTransfer-Encoding: chunked\r\n\r\n")
    chunk = b"%x\r\n%s\r\n" % (1 << 16, bytes(1 << 16))
    with suppress(ConnectionError):
        for _ in range(40):
            await wire.send(chunk)
    return await wire.status()


@deserves(GONE)
async def leaves_while_sending(wire: Wire, rng: random.Random) -> int:
    image = any_image(rng)
    head = f"POST /predict HTTP/1.1\r\nHost: chaos\r\nContent-Length: {len(image)}\r\n\r\n".encode()
    await wire.send((head + image)[: rng.randrange(len(head) + len(image))])
    return GONE


@deserves(GONE)
async def leaves_without_its_answer(wire: Wire, rng: random.Random) -> int:
    await wire.post(rng.choice([any_image(rng), LARGE]), "image/png")
    await asyncio.sleep(rng.random() * 0.02)
    return GONE


@deserves(GONE)
async def resets(wire: Wire, rng: random.Random) -> int:
    await wire.post(any_image(rng), "image/png")
    wire.writer.transport.abort()
    return GONE


@deserves(200, 408, GONE)  # cut off in the middle of its sending, it may find the connection reset before it reads 408
async def slow_to_send(wire: Wire, rng: random.Random) -> int:
    image = IMAGES["GIF"]
    await wire.send(f"POST /predict HTTP/1.1\r\nHost: chaos\r\nContent-Length: {len(image)}\r\n\r\n".encode())
    step = len(image) // 10 + 1
    with suppress(ConnectionError):
        for start in range(0, len(image), step):
            await wire.send(image[start : start + step])
            await asyncio.sleep(rng.random() * 0.2)
    return await wire.status()


@deserves(408)
async def never_ends_its_headers(wire: Wire, rng: random.Random) -> int:
    await wire.send(b"POST /predict HTTP/1.1\r\nHost: ch")
    return await wire.status()


@deserves(400, 408, 431, GONE)  # random bytes may look like the beginning of a request
async def no_http(wire: Wire, rng: random.Random) -> int:
    await wire.send(rng.randbytes(rng.randint(1, 2000)) + b"\r\n\r\n")
    return await wire.status()


@deserves(431, GONE)
async def endless_headers(wire: Wire, rng: random.Random) -> int:
    with suppress(ConnectionError):
        await wire.send(b"POST /predict HTTP/1.1\r\n" + b"X: y\r\n" * 20_000)
    return await wire.status()


@deserves(400)
async def bad_top_k(wire: Wire, rng: random.Random) -> int:
    await wire.post(any_image(rng), "image/png", query=rng.choice(["?top_k=0", "?top_k=%FF", "?%E2%82%AC=1"]))
    return await wire.status()


@deserves(404, 405)
async def lost(wire: Wire, rng: random.Random) -> int:
    request = rng.choice([b"GET /predict", b"PUT /predict", b"POST /", b"GET /%00", b"DELETE /models", b"GET /../etc"])
    await wire.send(request + b" HTTP/1.1\r\nHost: chaos\r\n\r\n")
    return await wire.status()


@dataclass
class Report:
    """What was sent and what came back."""

    answers: Counter[tuple[str, int]] = field(default_factory=Counter)
    surprises: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        rows = [f"{kind:28} {status or 'gone':>5} {count:>7}" for (kind, status), count in sorted(self.answers.items())]
        return "\n".join([*rows, *self.surprises])


async def rampage(host: str, port: int, *, requests: int, concurrency: int, seed: int) -> Report:
    """Send random misdeeds; the same seed sends the same, though not in the same order of arrival."""
    rng = random.Random(seed)
    report = Report()
    todo = iter([(rng.choice(list(MISDEEDS)), rng.randrange(2**32)) for _ in range(requests)])

    async def misbehave() -> None:
        for kind, own_seed in todo:
            misdeed, deserved = MISDEEDS[kind]
            status = await commit(misdeed, host, port, random.Random(own_seed))
            report.answers[kind, status] += 1
            if status not in deserved:
                report.surprises.append(
                    f"{kind} (seed {own_seed}) got {status}, and deserves one of {sorted(deserved)}"
                )

    await asyncio.gather(*(misbehave() for _ in range(concurrency)))
    return report


async def commit(misdeed: Misdeed, host: str, port: int, rng: random.Random) -> int:
    """Send one request over a connection of its own."""
    reader, writer = await asyncio.open_connection(host, port)
    try:
        return await misdeed(Wire(reader, writer), rng)
    except ConnectionError:
        return GONE
    finally:
        writer.close()
