"""`POST /predict` over real HTTP: every body, every error, and that no error reaches the queue."""

import asyncio
import base64
import struct
from pathlib import Path

import numpy as np
import pytest

from imaging.fast_jpeg import MAX_SCANS, SCAN
from service.api.prediction_writer import server_timing
from service.api.schemas import PredictResponse
from service.batching.logits import BatchLogits
from service.batching.queue import Prediction
from service.decoding.decoder import Decoder
from service.decoding.upload import Upload
from service.errors import InferenceFailed, TooManyPixels
from service.settings import Settings
from tests.fakes import HEIGHT, WIDTH, FakeEngine, InPlacePool, tiny_metadata
from tests.imaging.files import all_files, encode, pixels, png_announcing
from tests.imaging.hand_made import DATA
from tests.service.harness import Running, error_of, png, running

IMAGE = {"content-type": "image/png"}
SMALL = pixels(HEIGHT, WIDTH)


def base64_of(number: int) -> str:
    return base64.b64encode(png(number)).decode()


def answered(run: Running) -> list[int]:
    """The numbers of all images that were run."""
    return [number for batch in run.engine.batches for number in batch]


# Bodies


async def test_a_raw_body(tmp_path: Path) -> None:
    async with running(tmp_path) as run:
        response = await run.predict(7)
        assert response.status_code == 200
        assert response.headers["content-type"] == "application/json"
        answer = PredictResponse.model_validate_json(response.content)
        assert (answer.model, answer.version) == ("tiny", 1)
        (image,) = answer.predictions
        assert image.filename is None
        assert [entry.label for entry in image.top] == [f"class {index}" for index in range(5)]
        assert image.top[0].probability == pytest.approx(1 / (1 + 4 * np.exp(-7)), abs=1e-6)
        assert answered(run) == [7]


async def test_a_form_with_several_files_keeps_their_order_and_names(tmp_path: Path) -> None:
    async with running(tmp_path) as run:
        files = [("file", (f"{number}.png", png(number))) for number in (1, 2, 3)]
        response = await run.client.post("/predict", files=files)
        answer = PredictResponse.model_validate_json(response.content)
        assert [image.filename for image in answer.predictions] == ["1.png", "2.png", "3.png"]
        probabilities = [image.top[0].probability for image in answer.predictions]
        assert probabilities == pytest.approx([1 / (1 + 4 * np.exp(-number)) for number in (1, 2, 3)], abs=1e-6)


async def test_top_k_may_be_a_field_of_a_form_and_the_query_goes_before_it(tmp_path: Path) -> None:
    async with running(tmp_path) as run:
        for query, fields, expected in (("", {"top_k": "2", "note": "x"}, 2), ("?top_k=3", {"top_k": "2"}, 3)):
            files = [("file", ("a.png", png(1)))]
            response = await run.client.post(f"/predict{query}", files=files, data=fields)
            assert len(response.json()["predictions"][0]["top"]) == expected
        for query, field in (("", "6"), ("", "three"), ("?top_k=3", "three")):
            response = await run.client.post(f"/predict{query}", files=files, data={"top_k": field})
            assert (response.status_code, error_of(response.content)) == (400, "invalid_top_k")
        response = await run.client.post("/explain", files=files, data={"top_k": "three"})
        assert response.status_code == 200  # it has no such field


async def test_json_with_one_and_with_several_images(tmp_path: Path) -> None:
    async with running(tmp_path) as run:
        one = await run.client.post("/predict", json={"image": base64_of(1)})
        two = await run.client.post("/predict", json={"images": [base64_of(1), base64_of(2)]})
        assert [len(response.json()["predictions"]) for response in (one, two)] == [1, 2]
        assert one.json()["predictions"][0] == two.json()["predictions"][0]


@pytest.mark.parametrize("name", all_files(SMALL))
async def test_every_format(tmp_path: Path, name: str) -> None:
    async with running(tmp_path) as run:
        response = await run.client.post("/predict", content=all_files(SMALL)[name], headers=IMAGE)
        assert response.status_code == 200


async def test_a_chunked_body(tmp_path: Path) -> None:
    async def chunks():
        for byte in png(5):
            yield bytes([byte])

    async with running(tmp_path) as run:
        response = await run.client.post("/predict", content=chunks(), headers=IMAGE)
        assert response.status_code == 200
        assert answered(run) == [5]


@pytest.mark.parametrize("inline", [0, 1_000_000])
async def test_large_and_small_images_give_the_same_answer(tmp_path: Path, inline: int) -> None:
    body = encode(pixels(200, 300), "JPEG")
    async with running(tmp_path, inline_decode_bytes=inline, inline_decode_pixels=inline) as run:
        form = await run.client.post("/predict", files=[("a", ("a.jpg", body)), ("b", ("b.jpg", body))])
        raw = await run.client.post("/predict", content=body, headers=IMAGE)
        text = await run.client.post("/predict", json={"image": base64.b64encode(body).decode()})
        tops = [response.json()["predictions"][-1]["top"] for response in (form, raw, text)]
        assert tops[0] == tops[1] == tops[2]
        assert len(set(answered(run))) == 1


async def test_small_images_with_many_pixels_leave_the_event_loop(tmp_path: Path) -> None:
    async with running(tmp_path, inline_decode_pixels=100) as run:
        response = await run.client.post(
            "/predict", content=encode(np.zeros((50, 50, 3), np.uint8), "PNG"), headers=IMAGE
        )
        assert response.status_code == 200
        assert run.decoded_elsewhere == 1


async def test_a_small_jpeg_of_many_scans_leaves_the_event_loop() -> None:
    decoder = Decoder(Settings(inline_decode_pixels=MAX_SCANS * HEIGHT * WIDTH, decode_processes=1))
    jpeg = encode(SMALL, "JPEG", progressive=True)
    many = [Upload(jpeg + SCAN * (MAX_SCANS + more - jpeg.count(SCAN))) for more in (0, 1)]
    assert decoder.decode_inline(many[:1], tiny_metadata()) is not None
    assert decoder.decode_inline(many[1:], tiny_metadata()) is None
    decoder.close()


async def test_many_small_jpegs_leave_the_event_loop() -> None:
    decoder = Decoder(Settings(inline_decode_pixels=2 * HEIGHT * WIDTH, decode_processes=1))
    jpegs = [Upload(encode(SMALL, "JPEG"))] * 3
    images = decoder.decode_inline(jpegs[:2], tiny_metadata())
    assert images is not None
    assert [image.shape for image in images] == [(HEIGHT, WIDTH, 3)] * 2
    assert decoder.decode_inline(jpegs, tiny_metadata()) is None
    decoder.close()


# Options


@pytest.mark.parametrize("inside_form", [True, False])
async def test_top_k_is_bounded_by_a_setting(tmp_path: Path, *, inside_form: bool) -> None:
    async with running(tmp_path, max_top_k=3) as run:
        for top_k, expected in ((None, 200), (3, 200), (4, 400)):
            given = {} if top_k is None else {"top_k": str(top_k)}
            options = {"data": given} if inside_form else {"params": given}
            response = await run.client.post("/predict", files={"file": png(1)}, **options)
            assert response.status_code == expected
            if expected == 200:
                assert len(response.json()["predictions"][0]["top"]) == 3
            else:
                assert response.json()["error"]["message"] == "top_k is 4, and this service allows at most 3."
        document = (await run.client.get("/openapi.json")).json()
        schema = document["paths"]["/predict"]["post"]["parameters"][0]["schema"]
        assert (schema["maximum"], schema["default"]) == (3, 3)


@pytest.mark.parametrize(("query", "expected"), [("", 5), ("?top_k=1", 1), ("?top_k=5", 5), ("?top_k=05", 5)])
async def test_top_k(tmp_path: Path, query: str, expected: int) -> None:
    async with running(tmp_path) as run:
        response = await run.client.post(f"/predict{query}", content=png(1), headers=IMAGE)
        assert len(response.json()["predictions"][0]["top"]) == expected


async def test_server_timing_splits_the_time(tmp_path: Path) -> None:
    async with running(tmp_path, FakeEngine(delay=0.02)) as run:
        timing = (await run.predict()).headers["server-timing"]
        durations = {name: float(value) for name, value in (part.split(";dur=") for part in timing.split(", "))}
        assert list(durations) == ["decode", "queue", "inference", "total"]
        assert durations["total"] >= durations["inference"] >= 15
        assert durations["total"] >= durations["decode"] > 0


async def test_the_pixels_of_a_request_are_bounded_wherever_it_is_decoded() -> None:
    pixels = HEIGHT * WIDTH
    decoder = Decoder(Settings(max_pixels=pixels, max_request_pixels=2 * pixels, decode_processes=1))
    pngs = [Upload(encode(SMALL, "PNG"))] * 3
    assert decoder.decode_inline(pngs[:2], tiny_metadata()) is not None
    assert decoder.decode_inline(pngs, tiny_metadata()) is None
    decoder.processes = InPlacePool(decoder.processes)
    with pytest.raises(TooManyPixels, match="Image 3 of 3: The images of a request may have"):
        await decoder.decode(pngs, tiny_metadata(), asyncio.get_running_loop().time() + 60)
    decoder.close()


def test_of_several_images_server_timing_tells_the_longest_wait_and_the_longest_run() -> None:
    outputs = BatchLogits(np.zeros((1, 2), np.float32))
    times = [(0.003, 0.02), (0.25, 0.01), (0.1, 0.015)]
    predictions = [Prediction(outputs, 0, queued, inference, 1) for queued, inference in times]
    expected = b"decode;dur=1.000, queue;dur=250.000, inference;dur=20.000, total;dur=300.000"
    assert server_timing(predictions, 0.001, 0.3) == expected


# Errors: (query, headers, body) -> status, code

# 1,100,000 x 1 pixels in run lengths, of which none is there.
COSTLY_BMP = (
    b"BM" + struct.pack("<IHHI", 0, 0, 0, 1078) + struct.pack("<IiiHHII16x", 40, 1_100_000, 1, 1, 8, 1, 0) + bytes(1024)
)

RAW_ERRORS = [
    ("?top_k=0", IMAGE, png(1), 400, "invalid_top_k"),
    ("?top_k=6", IMAGE, png(1), 400, "invalid_top_k"),
    ("?top_k=-1", IMAGE, png(1), 400, "invalid_top_k"),
    ("?top_k=two", IMAGE, png(1), 400, "invalid_top_k"),
    ("?top_k=", IMAGE, png(1), 400, "invalid_top_k"),
    ("?top_k=1&top_k=2", IMAGE, png(1), 400, "invalid_top_k"),
    ("?top_k=" + "9" * 5000, IMAGE, png(1), 400, "invalid_top_k"),
    ("?topk=2", IMAGE, png(1), 400, "bad_request"),
    ("?top_k=%FF", IMAGE, png(1), 400, "invalid_top_k"),
    ("?top_k=%C2%B2", IMAGE, png(1), 400, "invalid_top_k"),
    ("?%00=%F0%9F%99%82", IMAGE, png(1), 400, "bad_request"),
    ("?", IMAGE | {"content-length": "0"}, b"", 400, "no_image"),
    ("", IMAGE | {"x-request-timeout-ms": "soon"}, png(1), 400, "invalid_timeout"),
    ("", IMAGE | {"x-request-timeout-ms": "0"}, png(1), 400, "invalid_timeout"),
    ("", IMAGE | {"x-request-timeout-ms": "1e3"}, png(1), 400, "invalid_timeout"),
    ("", IMAGE | {"x-request-timeout-ms": str(2**63 - 1)}, png(1), 400, "invalid_timeout"),
    ("", IMAGE, b"I am no image", 400, "not_an_image"),
    ("", IMAGE, b"", 400, "no_image"),
    ("", IMAGE, encode(pixels(99, 99), "PNG")[:-400], 400, "truncated_image"),
    ("", IMAGE, encode(pixels(300, 300), "BMP")[:-4000], 400, "truncated_image"),
    ("", IMAGE, b"%PDF-1.7", 415, "unsupported_format"),
    ("", IMAGE, (DATA / "bmp_masks_rgb.bmp").read_bytes(), 415, "unsupported_format"),
    ("", IMAGE, (DATA / "tiff_la_assoc.tif").read_bytes(), 415, "unsupported_format"),
    ("", IMAGE, COSTLY_BMP, 413, "image_too_costly"),
    ("", {"content-type": "text/plain"}, png(1), 415, "unsupported_media_type"),
    ("", IMAGE | {"content-encoding": "gzip"}, png(1), 415, "unsupported_encoding"),
    ("", IMAGE, png_announcing(1001, 1000), 413, "too_many_pixels"),
    ("", IMAGE, bytes(600_000), 413, "body_too_large"),
    ("", {"content-type": "application/json"}, b"{", 400, "invalid_json"),
    ("", {"content-type": "application/json"}, b'{"image": "?"}', 400, "invalid_base64"),
    ("", {"content-type": "application/json"}, b'{"images": ["", "", "", ""]}', 413, "too_many_images"),
    ("", {"content-type": "application/json"}, b'{"images": []}', 400, "no_image"),
    ("", {"content-type": "multipart/form-data"}, png(1), 400, "invalid_form"),
]


@pytest.mark.parametrize(
    ("query", "headers", "body", "status", "code"),
    RAW_ERRORS,
    ids=[f"{number}-{case[-1]}" for number, case in enumerate(RAW_ERRORS)],
)
@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
async def test_what_is_wrong_is_said_and_never_queued(
    tmp_path: Path, query: str, headers: dict[str, str], body: bytes, status: int, code: str
) -> None:
    limits = {"max_pixels": 1_000_000, "max_body_bytes": 500_000, "max_images": 3}
    async with running(tmp_path, **limits) as run:
        response = await run.client.post(f"/predict{query}", content=body, headers=headers)
        assert (response.status_code, error_of(response.content)) == (status, code)
        error = response.json()["error"]
        assert set(error) == {"code", "message", "request_id"}
        assert error["request_id"] == response.headers["x-request-id"]
        assert answered(run) == []
        assert (run.service.admission.images, run.service.admission.bytes) == (0, 0)
        assert await run.metric(f'perceiver_rejections_total{{reason="{code}"}}') == 1
        assert (await run.predict(3)).status_code == 200


async def test_of_several_images_the_bad_one_is_named(tmp_path: Path) -> None:
    async with running(tmp_path) as run:
        files = [("f", ("good.png", png(1))), ("f", ("bad.png", b"nothing"))]
        response = await run.client.post("/predict", files=files)
        assert error_of(response.content) == "not_an_image"
        assert "Image 2 of 2 ('bad.png')" in response.json()["error"]["message"]
        assert answered(run) == []


@pytest.mark.parametrize("inline", [0, 100_000])
async def test_the_pixels_of_all_images_of_a_request_are_bounded(tmp_path: Path, inline: int) -> None:
    flat = base64.b64encode(encode(np.zeros((300, 300, 3), np.uint8), "WEBP", lossless=True)).decode()
    limits = {"max_pixels": 100_000, "max_request_pixels": 300_000, "inline_decode_bytes": inline}
    async with running(tmp_path, FakeEngine(), **limits) as run:
        assert (await run.client.post("/predict", json={"images": [flat] * 3})).status_code == 200
        response = await run.client.post("/predict", json={"images": [flat] * 4})
        assert (response.status_code, error_of(response.content)) == (413, "too_many_pixels")
        assert "Image 4 of 4" in response.json()["error"]["message"]
        assert "300000 pixels together" in response.json()["error"]["message"]


async def test_a_failing_batch_is_a_500_and_the_next_one_is_served(tmp_path: Path) -> None:
    engine = FakeEngine()
    async with running(tmp_path, engine) as run:
        engine.fail = lambda numbers: RuntimeError("secret detail") if 13 in numbers else None
        response = await run.predict(13)
        assert (response.status_code, error_of(response.content)) == (500, "inference_failed")
        assert "secret" not in response.text
        assert (await run.predict(14)).status_code == 200


async def test_what_the_service_is_to_blame_for_is_logged_with_the_id_of_the_request(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    engine = FakeEngine()
    async with running(tmp_path, engine) as run:
        engine.fail = lambda numbers: RuntimeError("no")
        failed = await run.client.post("/predict", content=png(1), headers=IMAGE | {"x-request-id": "mine-1"})
        refused = await run.client.post("/predict", content=b"junk", headers=IMAGE | {"x-request-id": "mine-2"})
    assert (failed.status_code, refused.status_code) == (500, 400)
    told = [record for record in caplog.records if getattr(record, "request_id", None)]
    assert [record.getMessage() for record in told] == [f"request mine-1: {InferenceFailed.default}"]
    assert told[0].request_id == "mine-1"  # type: ignore[attr-defined]
