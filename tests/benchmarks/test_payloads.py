import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.common import BenchmarkError
from benchmarks.payloads import Form, build_requests, generate_images, natural_image, read_images
from imaging.decoder import decode_image
from service.api.payload import parse_body


def parse(request: bytes) -> tuple[str, dict[str, str], bytes]:
    """Split a request into its first line, headers with lower-case names, and body."""
    head, _, body = request.partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    return first, {k.lower(): v.strip() for k, _, v in (line.partition(":") for line in lines)}, body


@pytest.mark.parametrize(
    ("form", "per_request"), [("raw", 1), ("multipart", 1), ("multipart", 3), ("json", 1), ("json", 3)]
)
def test_the_service_reads_what_is_sent(form: Form, per_request: int) -> None:
    images = generate_images(4, 8, "png")
    requests = build_requests(
        images, form, host="h:1", path="/predict?top_k=1", per_request=per_request, headers={"X-Api-Key": "k"}
    )
    read = []
    for request in requests:
        first, headers, body = parse(request)
        assert first == "POST /predict?top_k=1 HTTP/1.1"
        assert (headers["host"], headers["x-api-key"]) == ("h:1", "k")
        assert int(headers["content-length"]) == len(body)
        read += [upload.data for upload in parse_body(headers["content-type"], body, max_images=3).uploads]
    assert len(requests) == -(-4 // per_request)
    assert read == [images[index % 4].data for index in range(len(requests) * per_request)]


def test_several_images_do_not_fit_a_raw_body() -> None:
    with pytest.raises(BenchmarkError, match="send several as multipart or json"):
        build_requests(generate_images(2, 8, "png"), "raw", host="h", per_request=2)


def test_made_images_are_different_repeatable_and_of_the_size() -> None:
    images = generate_images(3, 20, "jpeg", seed=5)
    assert images == generate_images(3, 20, "jpeg", seed=5)
    assert len({image.data for image in images}) == 3
    assert decode_image(images[0].data, size=(20, 20), max_pixels=400).std() > 20


def test_made_images_are_smooth_like_photographs() -> None:
    image = natural_image(np.random.default_rng(0), 64, 64).astype(float)
    neighbours = np.corrcoef(image[:, 1:, 0].ravel(), image[:, :-1, 0].ravel())[0, 1]
    channels = np.corrcoef(image[..., 0].ravel(), image[..., 1].ravel())[0, 1]
    assert neighbours > 0.5
    assert channels > 0.5


def test_images_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    Image.new("RGB", (2, 2)).save(tmp_path / "a" / "x.PNG")
    Image.new("RGB", (2, 2)).save(tmp_path / "b.jpg")
    (tmp_path / "notes.txt").write_text(json.dumps({}))
    found = read_images(tmp_path, limit=10)
    assert [(image.name, image.media_type) for image in found] == [
        ("x.PNG", "image/png"),
        ("b.jpg", "image/jpeg"),
    ]
    assert found[0].data == (tmp_path / "a" / "x.PNG").read_bytes()
    assert len(read_images(tmp_path, limit=1)) == 1


def test_a_folder_without_images(tmp_path: Path) -> None:
    with pytest.raises(BenchmarkError, match="there is no image in it"):
        read_images(tmp_path, limit=1)
