"""Real files and bodies to mutate, and what the decoder and the parser owe to whatever becomes of them."""

import json
from collections.abc import Callable
from functools import partial
from typing import TypeVar

import numpy as np
from PIL import Image

from imaging.decoder import decode as decode_header
from imaging.errors import ImageError
from imaging.fast_jpeg import decode_exact_jpeg
from imaging.formats import read_header
from imaging.resize import Crop, Filter
from imaging.structure.header import Header
from service.api.options import positive
from service.api.payload import Upload, parse_body
from service.api.v2.tensors import read_body, read_images, read_outputs
from service.decoding.decoder import SERVICE_ERRORS
from service.errors import InvalidTopK, ServiceError
from tests.fakes import tiny_metadata
from tests.imaging.files import all_files, encode, pixels

T = TypeVar("T")
Edit = tuple[str, int, bytes]
MAX_PIXELS = 100_000
MAX_IMAGES = 3
SIZE = (8, 6)
POLICIES: list[tuple[Crop, Filter]] = [("center", "bicubic"), ("none", "box")]

FORM = (
    b'--b\r\nContent-Disposition: form-data; name="top_k"\r\n\r\n3\r\n'
    b"--b\r\nContent-Disposition: form-data; name=f; filename=x\r\nContent-Type: image/png\r\n\r\ndata\r\n"
    b'--b\r\nContent-Disposition: form-data; name="g";\r\n filename="y"\r\n'
    b"Content-Transfer-Encoding: base64\r\n\r\nbW9yZQ\r\n--b--\r\n"
)
BODIES: dict[str, tuple[str, bytes]] = {
    "form": ("multipart/form-data; boundary=b", FORM),
    "JSON, images": (
        "application/json",
        json.dumps({"images": ["aGVsbG8=", "data:image/png;base64,aGVsbG8="]}).encode(),
    ),
    "JSON, image": ("application/json", b'{"image": "aGVsbG8="}'),
    "raw": ("image/png", b"data"),
}


V2_JSON = json.dumps(
    {
        "id": "a",
        "inputs": [{"name": "images", "datatype": "UINT8", "shape": [1, *SIZE, 3],
                    "parameters": {"binary_data_size": SIZE[0] * SIZE[1] * 3}}],
        "outputs": [{"name": "logits", "parameters": {"classification": 2, "binary_data": True}}],
        "parameters": {"timeout": 1000, "binary_data_output": True},
    }
).encode()  # fmt: skip
V2_FILES = V2_JSON.replace(b"images", b"image_bytes").replace(b"UINT8", b"BYTES").replace(b"[1, 8, 6, 3]", b"[2]")
# By kind: bytes of JSON, and the whole body of a request of the protocol v2.
V2_BODIES: dict[str, tuple[int, bytes]] = {
    "images": (len(V2_JSON), V2_JSON + bytes(SIZE[0] * SIZE[1] * 3)),
    "image_bytes": (len(V2_FILES), V2_FILES + 2 * (b"\x44\0\0\0" + bytes(68))),
}


def variants() -> dict[str, bytes]:
    """Small files of each format and pixel format, with metadata."""
    array = pixels(9, 13)
    image = Image.fromarray(array)
    exif = Image.Exif()
    exif[0x0112] = 6
    rgba = image.copy()
    rgba.putalpha(128)
    grey16 = Image.fromarray(np.arange(100, dtype=np.uint16).reshape(10, 10))
    return all_files(array) | {
        "JPEG exif": encode(image, "JPEG", exif=exif),
        "PNG exif": encode(image, "PNG", exif=exif),
        "WEBP exif": encode(image, "WEBP", exif=exif),
        "TIFF exif": encode(image, "TIFF", exif=exif),
        "PNG alpha": encode(rgba, "PNG"),
        "WEBP alpha": encode(rgba, "WEBP"),
        "PNG 16 bits": encode(grey16, "PNG"),
        "TIFF 16 bits": encode(grey16, "TIFF"),
        "JPEG CMYK": encode(image.convert("CMYK"), "JPEG"),
        "TIFF group 4": encode(image.convert("1"), "TIFF", compression="group4"),
        "PNG palette": encode(image.quantize(8), "PNG"),
        "GIF frames": encode(image.quantize(8), "GIF", save_all=True, append_images=[image.quantize(4)]),
    }


def mutate(data: bytes, edits: list[Edit]) -> bytes:
    """Apply edits one after another; a position beyond the end begins anew."""
    for kind, position, content in edits:
        at = position % (len(data) + 1)
        match kind:
            case "replace":
                data = data[:at] + content + data[at + len(content) :]
            case "insert":
                data = data[:at] + content + data[at:]
            case "delete":
                data = data[:at] + data[at + len(content) :]
            case "cut":
                data = data[:at]
    return data


def outcome(function: Callable[[], T]) -> T | ServiceError:
    """What a function returns, or the error of the hierarchy that it raises; any other one is a failure."""
    try:
        return function()
    except ServiceError as error:
        return error
    except ImageError as error:
        return SERVICE_ERRORS[type(error)](error.message)


def decode(data: bytes) -> str:
    """Decode as the service does: an array of the right shape ("image") or an error with a 4xx (its code).

    The fast path of JPEGs, tried on every input at the size that it announces, must not raise, and must give the
    pixels of the other way where that gives any.
    """
    result = outcome(partial(read_header, data, max_pixels=MAX_PIXELS))
    if isinstance(result, Header):
        size = (result.height, result.width)
        quick = decode_exact_jpeg(data, size)
        whole = outcome(partial(decode_header, result, size=size))
        if quick is not None and not isinstance(whole, ServiceError):
            np.testing.assert_array_equal(quick, whole)
    else:
        decode_exact_jpeg(data, SIZE)
    for crop, resample in POLICIES:
        result = outcome(partial(read_header, data, max_pixels=MAX_PIXELS))
        if isinstance(result, Header):
            assert result.width * result.height <= MAX_PIXELS
            result = outcome(partial(decode_header, result, size=SIZE, crop=crop, resample=resample))
        if isinstance(result, ServiceError):
            return refused(result)
        assert (result.shape, result.dtype) == ((*SIZE, 3), np.uint8)
    return "image"


def parse(content_type: bytes, body: bytes) -> str:
    """Parse as the service does: one to three uploads with data ("uploads") or an error with a 4xx (its code)."""
    result = outcome(lambda: parse_body(content_type.decode("latin-1"), body, max_images=MAX_IMAGES))
    if isinstance(result, ServiceError):
        return refused(result)
    assert 1 <= len(result.uploads) <= MAX_IMAGES
    assert all(isinstance(upload, Upload) and upload.data for upload in result.uploads)
    top_k = result.options.get("top_k")
    if top_k is not None and isinstance(wrong := outcome(lambda: positive(top_k, InvalidTopK())), ServiceError):
        return refused(wrong)
    return "uploads"


def parse_v2(length: int, body: bytes) -> str:
    """Parse as the protocol v2 does: one to three images ("images") or an error with a 4xx (its code)."""

    def read() -> int:
        content, binary = read_body(body, length, MAX_IMAGES)
        read_outputs(content, tiny_metadata(input_size=SIZE), max_classes=100)
        return len(read_images(content, binary, tiny_metadata(input_size=SIZE), MAX_IMAGES))

    result = outcome(read)
    if isinstance(result, ServiceError):
        return refused(result)
    assert 1 <= result <= MAX_IMAGES
    return "images"


def refused(error: ServiceError) -> str:
    assert 400 <= error.status < 500
    assert error.message.isprintable()
    return error.code
