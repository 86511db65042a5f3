"""Mutated real files of every format: an array of the right shape or an error with a 4xx, and nothing else.

FUZZ_EXAMPLES sets how many; the few of CI find what breaks with every other file, 100,000 what is rare. Files that once
broke something are kept in `corpus/` and tried each time.
"""

import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from service.artifact import ResizePolicy
from service.bodies import Upload, parse_body
from service.errors import ServiceError
from service.images import open_picture, to_array
from tests.service.pictures import all_files, encode, pixels

T = TypeVar("T")
EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "300"))
CORPUS = sorted((Path(__file__).parent / "corpus").iterdir())
POLICIES = [ResizePolicy(crop="center", filter="bicubic"), ResizePolicy(crop="none", filter="box")]

# Pillow warns of odd metadata; the service logs that, and here warnings would be errors of its parsers.
pytestmark = pytest.mark.filterwarnings("ignore")
fuzz = settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def variants() -> list[bytes]:
    """Small files of each format and pixel format, with metadata."""
    array = pixels(9, 13)
    image = Image.fromarray(array)
    exif = Image.Exif()
    exif[0x0112] = 6
    rgba = image.copy()
    rgba.putalpha(128)
    grey16 = Image.fromarray(np.arange(100, dtype=np.uint16).reshape(10, 10))
    return [
        *all_files(array).values(),
        encode(image, "JPEG", exif=exif),
        encode(image, "PNG", exif=exif),
        encode(image, "WEBP", exif=exif),
        encode(image, "TIFF", exif=exif),
        encode(rgba, "PNG"),
        encode(rgba, "WEBP"),
        encode(grey16, "PNG"),
        encode(grey16, "TIFF"),
        encode(image.convert("CMYK"), "JPEG"),
        encode(image.convert("1"), "TIFF", compression="group4"),
        encode(image.quantize(8), "PNG"),
        encode(image.quantize(8), "GIF", save_all=True, append_images=[image.quantize(4)]),
    ]


EDITS = st.lists(
    st.tuples(st.sampled_from(["replace", "insert", "delete", "cut"]), st.integers(0, 2000), st.binary(max_size=8)),
    max_size=6,
)


def mutate(data: bytes, edits: list[tuple[str, int, bytes]]) -> bytes:
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


def decode(data: bytes) -> None:
    for policy in POLICIES:
        result = outcome(partial(open_picture, data, max_pixels=100_000))
        if isinstance(result, Image.Image):
            assert result.width * result.height <= 100_000
            result = outcome(partial(to_array, result, size=(8, 6), resize=policy))
        if isinstance(result, ServiceError):
            assert 400 <= result.status < 500
            assert result.message.isprintable()
        else:
            assert (result.shape, result.dtype) == ((8, 6, 3), np.uint8)


@fuzz
@given(st.sampled_from(variants()), EDITS)
def test_the_decoder(data: bytes, edits: list[tuple[str, int, bytes]]) -> None:
    decode(mutate(data, edits))


@pytest.mark.parametrize("path", CORPUS, ids=[path.name for path in CORPUS])
def test_the_decoder_on_files_that_once_broke_something(path: Path) -> None:
    decode(path.read_bytes())


FORM = (
    b"--b\r\nContent-Disposition: form-data; name=f; filename=x\r\nContent-Type: image/png\r\n\r\ndata\r\n"
    b'--b\r\nContent-Disposition: form-data; name="g"; filename="y"\r\n\r\nmore\r\n--b--\r\n'
)
BODIES = [
    ("multipart/form-data; boundary=b", FORM),
    ("application/json", json.dumps({"images": ["aGVsbG8=", "data:image/png;base64,aGVsbG8="]}).encode()),
    ("application/json", b'{"image": "aGVsbG8="}'),
    ("image/png", b"data"),
]


@fuzz
@given(st.sampled_from(BODIES), EDITS, EDITS)
@example(("multipart/form-data; boundary=b", b"--b--\r\n"), [], [])
def test_bodies(
    body: tuple[str, bytes], of_type: list[tuple[str, int, bytes]], of_body: list[tuple[str, int, bytes]]
) -> None:
    content_type = mutate(body[0].encode(), of_type[:1]).decode("latin-1")
    result = outcome(lambda: parse_body(content_type, mutate(body[1], of_body), max_pictures=3))
    if isinstance(result, ServiceError):
        assert 400 <= result.status < 500
    else:
        assert 1 <= len(result) <= 3
        assert all(isinstance(upload, Upload) and upload.data for upload in result)
