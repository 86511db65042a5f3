"""Images to send and the requests that carry them, made before the load begins so that sending costs nothing more."""

import base64
import json
import mimetypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from benchmarks.common import BenchmarkError

Form = Literal["raw", "multipart", "json"]
SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
BOUNDARY = b"benchmark-7d1c5f0a9e"
JPEG_QUALITY = 90


@dataclass(frozen=True)
class ImageFile:
    """An image file: name, bytes, media type."""

    name: str
    data: bytes
    media_type: str


def natural_image(rng: np.random.Generator, height: int, width: int) -> NDArray[np.uint8]:
    """Make noise with the 1/f spectrum and the correlated channels of photographs, so that it compresses like one.

    Returns:
        uint8 [height, width, 3].
    """
    rows, columns = np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)[None, :]
    frequency = np.maximum(np.hypot(rows, columns), 1 / max(height, width))
    planes = [np.fft.ifft2(np.fft.fft2(rng.normal(size=(height, width))) / frequency).real for _ in range(4)]
    channels = np.stack([planes[0] + 0.3 * plane for plane in planes[1:]], axis=-1)
    standard = (channels - channels.mean()) / max(channels.std(), 1e-9)
    image: NDArray[np.uint8] = (128 + 55 * standard).clip(0, 255).astype(np.uint8)
    return image


def encode(pixels: NDArray[np.uint8], kind: Literal["jpeg", "png"], name: str = "image") -> ImageFile:
    """Encode uint8 [H, W, 3] as a file."""
    buffer = BytesIO()
    Image.fromarray(pixels).save(buffer, kind.upper(), **({"quality": JPEG_QUALITY} if kind == "jpeg" else {}))
    return ImageFile(f"{name}.{kind}", buffer.getvalue(), f"image/{kind}")


def generate_images(count: int, size: int, kind: Literal["jpeg", "png"], seed: int = 0) -> list[ImageFile]:
    """Make `count` different images of `size` x `size` pixels."""
    rng = np.random.default_rng(seed)
    return [encode(natural_image(rng, size, size), kind, str(number)) for number in range(count)]


def read_images(folder: Path, limit: int) -> list[ImageFile]:
    """Read at most `limit` image files below `folder`, in the order of their paths.

    Raises:
        BenchmarkError: there is none.
    """
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)[:limit]
    if not paths:
        raise BenchmarkError(f"{folder}: there is no image in it, no file with {', '.join(sorted(SUFFIXES))}")
    return [ImageFile(path.name, path.read_bytes(), mimetypes.guess_type(path)[0] or "image/*") for path in paths]


def build_requests(
    images: Sequence[ImageFile],
    form: Form,
    *,
    host: str,
    path: str = "/predict",
    per_request: int = 1,
    headers: Mapping[str, str] | None = None,
) -> list[bytes]:
    """Build whole HTTP/1.1 requests, head and body, each of as many images; the first ones fill up the last request.

    Args:
        images: what to send, in this order.
        form: raw body, multipart form, or JSON with base64.
        host: value of the Host header.
        path: with the query, if any.
        per_request: images in one request; 1 for a raw body.
        headers: further ones.

    Raises:
        BenchmarkError: several images in a raw body.
    """
    if form == "raw" and per_request != 1:
        raise BenchmarkError("a raw body holds one image; send several as multipart or json")
    requests = []
    for start in range(0, len(images), per_request):
        group = [images[index % len(images)] for index in range(start, start + per_request)]
        media_type, body = build_body(group, form)
        head = {"Host": host, "Content-Type": media_type, "Content-Length": str(len(body)), **(headers or {})}
        lines = "".join(f"{name}: {value}\r\n" for name, value in head.items())
        requests.append(f"POST {path} HTTP/1.1\r\n{lines}\r\n".encode() + body)
    return requests


def build_body(images: Sequence[ImageFile], form: Form) -> tuple[str, bytes]:
    """Return media type and body."""
    if form == "raw":
        return images[0].media_type, images[0].data
    if form == "json":
        images = [base64.b64encode(image.data).decode() for image in images]
        return "application/json", json.dumps({"images": images}).encode()
    parts = [
        b'--%b\r\nContent-Disposition: form-data; name="file"; filename="%b"\r\nContent-Type: %b\r\n\r\n%b\r\n'
        % (BOUNDARY, image.name.encode(), image.media_type.encode(), image.data)
        for image in images
    ]
    return f"multipart/form-data; boundary={BOUNDARY.decode()}", b"".join(parts) + b"--%b--\r\n" % BOUNDARY
