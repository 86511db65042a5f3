"""The Open Inference Protocol v2, apart from its own clients: hostile and malformed bodies, limits, keys, metrics."""

import asyncio
import base64
import json
import math
from copy import deepcopy
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.api.v2.tensors import read_body, read_images, read_outputs
from service.errors import ServiceError
from tests.fakes import HEIGHT, WIDTH, FakeEngine, image, tiny_metadata
from tests.service.harness import Running, png, running

INFER = "/v2/models/tiny/infer"
SHAPE = [1, HEIGHT, WIDTH, 3]
PIXELS = image(7).tobytes()
SIZE = len(PIXELS)
Json = dict[str, Any]


def images_input(count: int = 1, **changes: Any) -> Json:
    fields: Json = {"name": "images", "datatype": "UINT8", "shape": [count, HEIGHT, WIDTH, 3]}
    return fields | changes


def in_binary(size: object = SIZE, **changes: Any) -> Json:
    return images_input(parameters={"binary_data_size": size}, **changes)


def files_input(shape: object, size: object, **changes: Any) -> Json:
    parameters = {"binary_data_size": size}
    return {"name": "image_bytes", "datatype": "BYTES", "shape": shape, "parameters": parameters} | changes


def element(data: bytes, length: int | None = None) -> bytes:
    return (len(data) if length is None else length).to_bytes(4, "little") + data


async def post(
    run: Running, content: object, binary: bytes = b"", *, length: object = None, path: str = INFER, **headers: str
) -> httpx.Response:
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    if binary or length is not None:
        headers["inference-header-content-length"] = str(len(text) if length is None else length)
    return await run.client.post(path, content=text + binary, headers=headers)


def sentence(response: httpx.Response, status: int = 400) -> str:
    assert response.status_code == status, response.text
    (name, message), *others = response.json().items()
    assert (name, others) == ("error", [])
    assert isinstance(message, str)
    assert message.endswith(".")
    return message


def outputs_of(response: httpx.Response) -> Json:
    assert response.status_code == 200, response.text
    outputs: Json = {output["name"]: output for output in response.json()["outputs"]}
    return outputs


NUMBER = element(png(7))
HOSTILE: dict[str, tuple[Json, bytes, object]] = {
    "negative size": (in_binary(-1), PIXELS, None),
    "size that is no number": (in_binary("72"), PIXELS, None),
    "size beyond 64 bits": (in_binary(2**70), PIXELS, None),
    "size larger than the body": (in_binary(SIZE + 1), PIXELS, None),
    "size smaller than the body": (in_binary(SIZE - 1), PIXELS, None),
    "size of another shape": (in_binary(2 * SIZE), 2 * PIXELS, None),
    "bytes that no input has": (images_input(data=[0] * SIZE), PIXELS, None),
    "data twice": (in_binary(data=[0] * SIZE), PIXELS, None),
    "no data": (images_input(), b"", None),
    "header longer than the body": (in_binary(), PIXELS, 100_000),
    "negative header": (in_binary(), PIXELS, -1),
    "header that is no number": (in_binary(), PIXELS, "1e3"),
    "header of many digits": (in_binary(), PIXELS, "9" * 5000),
    "header that ends in the JSON": (in_binary(), PIXELS, 20),
    "header over the tensor": (in_binary(), PIXELS, 150),
    "empty JSON": (in_binary(), PIXELS, 0),
    "shape that overflows": (in_binary(shape=[2**32, 2**32, 2**32, 3]), PIXELS, None),
    "shape whose product wraps around to its size": (in_binary(shape=[2**62 + 1, HEIGHT, WIDTH, 3]), PIXELS, None),
    "negative shape": (in_binary(shape=[-1, HEIGHT, WIDTH, 3]), PIXELS, None),
    "negative twice": (in_binary(shape=[1, -HEIGHT, -WIDTH, 3]), PIXELS, None),
    "fractional shape": (in_binary(shape=[1, HEIGHT, WIDTH, 3.5]), PIXELS, None),
    "no shape": (in_binary(shape=[]), PIXELS, None),
    "long shape": (in_binary(shape=[1] * 100_000), PIXELS, None),
    "shape of another size": (in_binary(shape=[1, WIDTH, HEIGHT, 3]), PIXELS, None),
    "no image": (in_binary(0, shape=[0, HEIGHT, WIDTH, 3]), b"", None),
    "element beyond the tensor": (files_input([1], 4 + 9), element(b"x" * 9, 10), None),
    "element of 4 GiB": (files_input([1], 4 + 9), element(b"x" * 9, 2**32 - 1), None),
    "more elements than bytes": (files_input([9], len(NUMBER)), NUMBER, None),
    "fewer elements than bytes": (files_input([1], 2 * len(NUMBER)), 2 * NUMBER, None),
    "half a length": (files_input([1], 3), b"\0\0\0", None),
    "empty file": (files_input([1], 4), element(b""), None),
    "scalar": (files_input([], len(NUMBER)), NUMBER, None),
}


@pytest.mark.parametrize("name", HOSTILE)
async def test_hostile_lengths_are_refused(tmp_path: Path, name: str) -> None:
    tensor, binary, length = HOSTILE[name]
    async with running(tmp_path) as run:
        message = sentence(await post(run, {"inputs": [tensor]}, binary, length=length))
        assert len(message) < 400
        assert run.engine.batches == []
        assert run.service.admission.bytes == run.service.admission.images == 0


WRONG: dict[str, tuple[object, str]] = {
    "no JSON": (b"{", "can't be read"),
    "empty": (b"", "can't be read"),
    "list": ([], "can't be read"),
    "deep": (b'{"x":' + b"[" * 100_000, "can't be read"),
    "deep data": (b'{"inputs":[{"name":"images","data":' + b"[" * 100_000, "can't be read"),
    "many strings": ({"inputs": [], "x": ["a"] * 2000}, "more strings"),
    "no inputs": ({}, "inputs"),
    "no input": ({"inputs": []}, "has 0 inputs; send one"),
    "two inputs": ({"inputs": [images_input(), images_input()]}, "has 2 inputs"),
    "unknown input": ({"inputs": [images_input(name="pixels")]}, "no input 'pixels'; send images or image_bytes"),
    "datatype": ({"inputs": [images_input(datatype="FP32")]}, "'FP32', and must have UINT8"),
    "size": ({"inputs": [images_input(shape=[1, 9, 9, 3])]}, f"must have [N, {HEIGHT}, {WIDTH}, 3]; send image_bytes"),
    "too few numbers": ({"inputs": [images_input(data=[1, 2])]}, "are 2 numbers"),
    "256": ({"inputs": [images_input(data=[256] * SIZE)]}, "<= 255"),
    "-1": ({"inputs": [images_input(data=[-1] * SIZE)]}, ">= 0"),
    "text": ({"inputs": [images_input(data=["a"] * SIZE)]}, "can't be read"),
    "ragged": ({"inputs": [images_input(data=[[[[0] * 5, [0] * (SIZE - 5)]]])]}, "not of its shape"),
    "nested twice": ({"inputs": [images_input(data=[[0] * SIZE])]}, "can't be read"),
    "base64": ({"inputs": [files_input([1], None, data=["?"])]}, "image_bytes[0] is not valid base64"),
    "count": ({"inputs": [files_input([2], None, data=["aaaa"])]}, "are 1 strings, and its shape makes 2"),
    "no file": ({"inputs": [files_input([1], None, data=["aaaa"])]}, "not an image"),
    "features": ({"inputs": [images_input()], "outputs": [{"name": "features"}]}, "The model has no output features"),
    "twice": ({"inputs": [images_input()], "outputs": [{"name": "logits"}] * 2}, "asked for twice"),
    "class count": (
        {"inputs": [images_input()], "outputs": [{"name": "logits", "parameters": {"classification": -1}}]},
        ">= 0",
    ),
    "timeout": ({"inputs": [images_input()], "parameters": {"timeout": -1}}, ">= 0"),
}


@pytest.mark.parametrize("name", WRONG)
async def test_what_is_wrong_is_said_in_a_sentence(tmp_path: Path, name: str) -> None:
    content, expected = WRONG[name]
    async with running(tmp_path) as run:
        assert expected in sentence(await post(run, content))
        assert run.engine.batches == []


VALID: list[Json] = [
    {"inputs": [images_input(data=[1] * SIZE)], "id": "a", "outputs": [{"name": "probabilities"}]},
    {"inputs": [in_binary()], "parameters": {"binary_data_output": True}},
    {"inputs": [files_input([1], len(NUMBER))], "outputs": [{"name": "logits", "parameters": {"classification": 2}}]},
]
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 2**70),
    st.floats(),
    st.text(max_size=9),
    st.sampled_from(["[]", "{}", "[1]"]).map(json.loads),
)


@st.composite
def malformed(draw: st.DrawFn) -> tuple[bytes, int | None]:
    """A valid body with some of its values replaced and some of its bytes changed."""
    content: Any = json.loads(json.dumps(draw(st.sampled_from(VALID))))
    for _ in range(draw(st.integers(0, 3))):
        node: Any = content
        while isinstance(node, dict | list) and node:
            key = draw(st.sampled_from(sorted(node) if isinstance(node, dict) else range(min(len(node), 9))))
            if draw(st.booleans()) or not isinstance(node[key], dict | list):
                node[key] = deepcopy(draw(SCALARS))  # a later round may change it
                break
            node = node[key]
    text = json.dumps(content).encode()
    length = draw(st.one_of(st.none(), st.just(len(text)), st.integers(0, len(text) + 200)))
    body = bytearray(text + draw(st.sampled_from([b"", PIXELS, NUMBER, PIXELS[:-1], NUMBER[:9]])))
    for _ in range(draw(st.integers(0, 4))):
        body[draw(st.integers(0, len(body) - 1))] = draw(st.integers(0, 255))
    return bytes(body), length


@settings(max_examples=500)
@given(malformed())
def test_a_malformed_body_is_refused_or_read_and_nothing_else(case: tuple[bytes, int | None]) -> None:
    body, length = case
    try:
        content, binary = read_body(body, length, 64)
        read_outputs(content, tiny_metadata(), max_classes=100)
        images = read_images(content, binary, tiny_metadata(), 64)
    except ServiceError as error:
        assert 400 <= error.status < 500  # noqa: PT017 - what was raised is the answer
    else:
        assert 1 <= len(images) <= 64


async def test_malformed_bodies_over_http_get_no_500(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    async with running(tmp_path) as run:
        for number in range(200):
            text = json.dumps(VALID[number % 3]).encode()
            body = bytearray(text + (b"", PIXELS, NUMBER)[number % 3])
            body[rng.integers(len(body))] = rng.integers(256)
            length = len(text) if number % 3 else None
            response = await post(run, bytes(body), length=length)
            assert response.status_code < 500, (bytes(body), response.text)
        assert (await post(run, VALID[0])).status_code == 200


# What is answered


async def test_one_image_has_one_label_whichever_way_it_comes(tmp_path: Path) -> None:
    top: Json = {"outputs": [{"name": "probabilities", "parameters": {"classification": 1}}]}
    file = png(7)
    ways: list[tuple[Json, bytes]] = [
        (images_input(data=image(7).ravel().tolist()), b""),
        (images_input(data=[image(7).tolist()]), b""),
        (in_binary(), PIXELS),
        (files_input([1], len(element(file))), element(file)),
        (files_input([1], None, data=[base64.b64encode(file).decode()]), b""),
    ]
    async with running(tmp_path) as run:
        best = (await run.predict(7)).json()["predictions"][0]["top"][0]
        for tensor, binary in ways:
            output = outputs_of(await post(run, {"inputs": [tensor]} | top, binary))["probabilities"]
            expected = [f"{best['probability']:.6f}:{best['index']}:{best['label']}"]
            assert output == {"name": "probabilities", "datatype": "BYTES", "shape": [1, 1], "data": expected}
        assert run.engine.batches == [[7]] * 6


async def test_many_images_in_json_are_parsed_in_a_thread(tmp_path: Path) -> None:
    numbers = [*range(64)]
    data = np.stack([image(number) for number in numbers]).ravel().tolist()
    async with running(tmp_path, inline_decode_bytes=100) as run:
        response = await post(run, {"inputs": [images_input(64, data=data)]})
        logits = np.array(outputs_of(response)["logits"]["data"]).reshape(outputs_of(response)["logits"]["shape"])
        assert logits[:, 0].tolist() == numbers
        answer = response.json()
        assert (answer["model_name"], answer["model_version"], "id" in answer) == ("tiny", "1", False)


async def test_more_classes_than_there_are_mean_all(tmp_path: Path) -> None:
    async with running(tmp_path) as run:
        outputs = [{"name": "logits", "parameters": {"classification": 99}}]
        output = outputs_of(await post(run, {"inputs": [in_binary()], "outputs": outputs}, PIXELS))["logits"]
        assert output["shape"] == [1, 5]
        assert output["data"][0] == "7.000000:0:class 0"


async def test_a_logit_that_is_no_number_is_an_error(tmp_path: Path) -> None:
    engine = FakeEngine()
    async with running(tmp_path, engine) as run:
        engine.tag = math.nan
        assert "not a number" in sentence(await post(run, {"inputs": [in_binary()]}, PIXELS), 500)


async def test_the_limits_are_those_of_predict(tmp_path: Path) -> None:
    limits = {"max_images": 2, "max_queue_size": 4, "max_body_bytes": 4096}
    async with running(tmp_path, **limits) as run:
        three = images_input(3, parameters={"binary_data_size": 3 * SIZE})
        assert "more than the 2 images" in sentence(await post(run, {"inputs": [three]}, 3 * PIXELS), 413)
        assert "larger than the 4096 bytes" in sentence(await post(run, {"x": "y" * 5000}), 413)
        held = await run.hold_first()
        again = [asyncio.create_task(run.predict(number)) for number in range(2, 5)]
        await run.until(lambda: run.service.admission.images == 4)
        refused = await post(run, {"inputs": [in_binary()]}, PIXELS)
        assert sentence(refused, 503) == "The queue is full; try again later."
        assert int(refused.headers["retry-after"]) >= 1
        run.engine.let_go()
        assert {answer.status_code for answer in await asyncio.gather(held, *again)} == {200}


async def test_classes_are_bounded_as_top_k_is(tmp_path: Path) -> None:
    async with running(tmp_path, max_top_k=2) as run:
        for classes, status in ((2, 200), (3, 400)):
            outputs = [{"name": "logits", "parameters": {"classification": classes}}]
            answer = await post(run, {"inputs": [in_binary()], "outputs": outputs}, PIXELS)
            assert answer.status_code == status
        assert sentence(answer) == "The output logits is asked for 3 classes; this service allows 2."


async def test_the_parameter_timeout_is_a_deadline(tmp_path: Path) -> None:
    async with running(tmp_path) as run:
        assert run.service.store.live is not None
        run.service.store.live.expected_rate = 1e9
        held = await run.hold_first()
        late = await post(run, {"inputs": [in_binary()], "parameters": {"timeout": 1000}}, PIXELS)
        assert "deadline" in sentence(late, 504)
        await run.assert_first_alone_ran(held)


async def test_what_could_not_run_within_the_parameter_timeout_is_refused_at_once(tmp_path: Path) -> None:
    async with running(tmp_path) as run:
        assert run.service.store.live is not None
        run.service.store.live.expected_rate = 0.5
        held = await run.hold_first()
        refused = await post(run, {"inputs": [in_binary()], "parameters": {"timeout": 1_000_000}}, PIXELS)
        assert "about 2 s, and the deadline is in 1 s" in sentence(refused, 503)
        await run.assert_first_alone_ran(held)


async def test_keys(tmp_path: Path) -> None:
    paths = ("/v2/models/tiny", "/v2/models/tiny/config", "/v2/models/tiny/versions/1/stats", "/v2/models/stats")
    free = ("/v2", "/v2/health/live", "/v2/health/ready", "/v2/models/tiny/ready")
    async with running(tmp_path, api_keys="a") as run:
        for path in paths:
            assert "key" in sentence(await run.client.get(path), 401)
            assert (await run.client.get(path, headers={"x-api-key": "a"})).status_code == 200
            assert (await run.client.head(path, headers={"x-api-key": "a"})).status_code == 200
        for path in free:
            assert (await run.client.get(path)).status_code == 200
        assert "key" in sentence(await run.client.post("/v2/repository/index"), 401)
        assert "key" in sentence(await post(run, {"inputs": [in_binary()]}, PIXELS), 401)
        assert (await post(run, {"inputs": [in_binary()]}, PIXELS, authorization="Bearer a")).status_code == 200


async def test_a_model_named_as_a_probe_needs_a_key(tmp_path: Path) -> None:
    engine = FakeEngine()
    engine.metadata = tiny_metadata(name="ready")
    async with running(tmp_path, engine, api_keys="a") as run:
        for path in ("/v2/models/ready", "/v2/models/ready/versions/ready", "/v2/models/ready/config"):
            assert "key" in sentence(await run.client.get(path), 401)
        assert (await run.client.get("/v2/models/ready/ready")).status_code == 200
        assert (await run.client.get("/v2/models/ready", headers={"x-api-key": "a"})).json()["name"] == "ready"


async def test_errors_of_the_router_have_the_protocols_shape(tmp_path: Path) -> None:
    async with running(tmp_path) as run:
        assert "nothing at this path" in sentence(await run.client.get("/v2/logging"), 404)
        assert "method" in sentence(await run.client.get(INFER), 405)
        assert "compressed" in sentence(await post(run, {}, **{"content-encoding": "gzip"}), 415)
        for path in ("/v2/models/other", "/v2/models/other/config", "/v2/models/tiny/versions/2", "/v2/models/x/ready"):
            assert "tiny" in sentence(await run.client.get(path), 404)
        run.service.leaving = True
        for path in ("/v2/health/ready", "/v2/models/tiny/ready", "/v2/models/tiny/versions/1/ready"):
            assert "shutting down" in sentence(await run.client.get(path), 503)
        assert (await run.client.get("/v2/models/tiny")).status_code == 200
        assert (await run.client.get("/v2/health/live")).json() == {"live": True}


async def test_it_is_counted_with_the_requests_for_inference(tmp_path: Path) -> None:
    async with running(tmp_path) as run:
        for path in (INFER, "/v2/models/tiny/versions/1/infer", "/v2/models/tiny/versions/9/infer"):
            await post(run, {"inputs": [in_binary()]}, PIXELS, path=path)
        await run.client.get("/v2/models/tiny/ready")
        route = "/v2/models/{name}"
        assert await run.metric(f'perceiver_requests_total{{code="200",route="{route}/infer"}}') == 2
        assert await run.metric(f'perceiver_requests_total{{code="404",route="{route}/infer"}}') == 1
        assert await run.metric(f'perceiver_requests_total{{code="200",route="{route}/ready"}}') == 1
        assert await run.metric("perceiver_request_seconds_count") == 3
        assert await run.metric('perceiver_rejections_total{reason="not_found"}') == 1
        (stats,) = (await run.client.get("/v2/models/stats")).json()["model_stats"]
        steps = stats["inference_stats"]
        done = {"success", "fail", "queue", "compute_input", "compute_infer"}
        assert steps.keys() == done | {"compute_output", "cache_hit", "cache_miss"}
        assert (steps["success"]["count"], steps["fail"]["count"]) == (2, 1)
        assert all(step.keys() == {"count", "ns"} for step in steps.values())


async def test_features_are_an_output_where_the_model_has_them(tmp_path: Path) -> None:
    async with running(tmp_path, FakeEngine(feature_dim=3)) as run:
        content = {"inputs": [images_input(data=list(PIXELS))], "outputs": [{"name": "features"}, {"name": "logits"}]}
        answer = (await post(run, content)).json()
        assert [output["name"] for output in answer["outputs"]] == ["features", "logits"]
        assert answer["outputs"][0]["shape"] == [1, 3]
        assert answer["outputs"][0]["data"] == [7, 8, 9]
        assert run.engine.features_runs == [1]
        described = (await run.client.get("/v2/models/tiny")).json()["outputs"]
        assert {"name": "features", "datatype": "FP32", "shape": [-1, 3]} in described
        as_classes = {"name": "features", "parameters": {"classification": 2}}
        refused = await post(run, content | {"outputs": [as_classes]})
        assert "features has no classes" in sentence(refused)
