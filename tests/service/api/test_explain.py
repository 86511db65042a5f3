"""`POST /explain` over HTTP: the shapes of its answers, its bounds, and that it stands behind /predict."""

import asyncio
import io
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from service.api.schemas import ExplainResponse
from service.explanation import masks
from service.explanation.masks import grid_of
from tests.fakes import HEIGHT, WIDTH, FakeEngine
from tests.imaging.files import encode, pixels
from tests.service.harness import error_of, png, running

RUNS = 1 + masks.RUNS
PNG = {"content-type": "image/png"}


async def test_each_image_has_the_map_of_its_first_label(tmp_path: Path) -> None:
    async with running(tmp_path) as run:
        files = [("file", ("a.png", png(1))), ("file", ("b.png", png(2)))]
        answer = await run.client.post("/explain", files=files)
        assert answer.status_code == 200
        content = ExplainResponse.model_validate(answer.json())
        assert content.model_runs == 2 * RUNS == sum(map(len, run.engine.batches))
        assert [each.filename for each in content.explanations] == ["a.png", "b.png"]
        for each in content.explanations:
            assert each.label == "class 0"
            assert np.shape(each.map) == tuple(each.size) == grid_of((HEIGHT, WIDTH))
        assert "total;dur=" in answer.headers["server-timing"]
        assert await run.metric("perceiver_explanations_total") == 2
        assert await run.metric("perceiver_explanation_runs_total") == 2 * RUNS
        assert await run.metric("perceiver_images_total") == 0
        (stats,) = (await run.client.get("/v2/models/stats")).json()["model_stats"]
        assert stats["inference_count"] == 2 * RUNS
        assert await run.metric('perceiver_requests_total{code="200",route="/explain"}') == 1
        assert await run.metric("perceiver_request_seconds_count") == 0  # they have no objective
        assert run.service.admission.images == run.service.admission.bytes == 0


async def test_the_map_says_how_far_the_probability_falls(tmp_path: Path) -> None:
    """The fake engine reads the image's number from its first pixel, so nothing but the corner matters."""
    async with running(tmp_path, FakeEngine(tag=20)) as run:
        answer = await run.client.post("/explain", content=png(24), headers=PNG)
        (each,) = answer.json()["explanations"]
        found = np.array(each["map"])
        assert found[0, 0] == found.max() > 3 * np.sort(found.ravel())[-2]


async def test_no_thread_is_started_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the system starts no more threads, the answer would be 500."""

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    async with running(tmp_path) as run:
        monkeypatch.setattr(threading.Thread, "start", refuse)
        for accept in ("application/json", "image/png"):
            answer = await run.client.post("/explain", content=png(1), headers=PNG | {"accept": accept})
            assert answer.status_code == 200, answer.text
        monkeypatch.undo()


async def test_another_label_can_be_explained(tmp_path: Path) -> None:
    async with running(tmp_path) as run:
        answer = await run.client.post("/explain?label=class%203", content=png(1), headers=PNG)
        (each,) = answer.json()["explanations"]
        assert (each["label"], each["index"]) == ("class 3", 3)
        assert each["probability"] < 0.2


@pytest.mark.parametrize(
    ("query", "code"),
    [
        ("label=dragon", "invalid_label"),
        ("label=", "invalid_label"),
        ("label=class%200&label=class%201", "bad_request"),
        ("label=%ff", "bad_request"),
        ("label=a&label=b&label=c", "bad_request"),
        ("top_k=1", "bad_request"),
    ],
)
async def test_a_label_that_is_none_is_refused_before_anything_runs(tmp_path: Path, query: str, code: str) -> None:
    async with running(tmp_path) as run:
        answer = await run.client.post(f"/explain?{query}", content=png(1), headers=PNG)
        assert (answer.status_code, error_of(answer.content)) == (400, code)
        assert run.engine.batches == []


async def test_the_label_may_be_a_field_of_a_form_and_the_query_goes_before_it(tmp_path: Path) -> None:
    async with running(tmp_path) as run:
        files = {"file": ("a.png", png(1))}
        for query, field, index in (("", "class 2", 2), ("?label=class%201", "class 2", 1)):
            answer = await run.client.post(f"/explain{query}", files=files, data={"label": field})
            assert [each["index"] for each in answer.json()["explanations"]] == [index]
        answer = await run.client.post("/explain", files=files, data={"label": "dragon"})
        assert (answer.status_code, error_of(answer.content)) == (400, "invalid_label")


async def test_as_png_the_image_comes_with_its_map(tmp_path: Path) -> None:
    async with running(tmp_path) as run:
        photograph = encode(pixels(90, 60), "PNG")
        answer = await run.client.post("/explain", content=photograph, headers=PNG | {"accept": "image/png"})
        assert answer.status_code == 200
        assert answer.headers["content-type"] == "image/png"
        assert Image.open(io.BytesIO(answer.content)).size[0] > 448
        two = [("file", ("a.png", png(1))), ("file", ("b.png", png(2)))]
        refused = await run.client.post("/explain", files=two, headers={"accept": "image/png"})
        assert (refused.status_code, error_of(refused.content)) == (413, "too_many_images")


async def test_a_request_has_no_more_runs_than_the_setting_allows(tmp_path: Path) -> None:
    async with running(tmp_path, explain_max_runs=2 * RUNS - 1) as run:
        one = await run.client.post("/explain", content=png(1), headers=PNG)
        assert one.status_code == 200
        ran = len(run.engine.batches)
        two = [("file", ("a.png", png(1))), ("file", ("b.png", png(2)))]
        refused = await run.client.post("/explain", files=two)
        assert (refused.status_code, error_of(refused.content)) == (413, "too_many_images")
        assert len(run.engine.batches) == ran
        broken = [("file", ("a.png", b"none")), ("file", ("b.png", b"none"))]  # refused before anything is decoded
        assert error_of((await run.client.post("/explain", files=broken)).content) == "too_many_images"


async def test_explanations_can_be_off(tmp_path: Path) -> None:
    async with running(tmp_path, explain_max_runs=0) as run:
        answer = await run.client.post("/explain", content=png(1), headers=PNG)
        assert (answer.status_code, error_of(answer.content)) == (403, "explain_disabled")


async def test_it_needs_a_key_where_predict_does(tmp_path: Path) -> None:
    async with running(tmp_path, api_keys="secret") as run:
        assert (await run.client.post("/explain", content=png(1), headers=PNG)).status_code == 401
        keyed = await run.client.post("/explain", content=png(1), headers=PNG | {"x-api-key": "secret"})
        assert keyed.status_code == 200


async def test_what_comes_meanwhile_waits_for_one_batch(tmp_path: Path) -> None:
    async with running(tmp_path) as run:
        run.engine.hold()
        explained = asyncio.create_task(run.client.post("/explain", content=png(1), headers=PNG))
        await run.until(lambda: run.engine.batches == [[1]])
        predicted = asyncio.create_task(run.predict(7))
        await run.until(lambda: run.service.queue_length == 1)
        run.engine.release()
        await run.until(lambda: len(run.engine.batches) == 2)
        assert run.engine.batches[1] == [7]  # before any cover
        run.engine.let_go()
        assert (await predicted).status_code == (await explained).status_code == 200


async def test_admission_counts_a_batch_of_it(tmp_path: Path) -> None:
    async with running(tmp_path, FakeEngine(max_batch_size=4), max_queue_size=8, max_images=8) as run:
        run.engine.hold()
        explained = asyncio.create_task(run.client.post("/explain", content=png(1), headers=PNG))
        await run.until(lambda: run.engine.batches == [[1]])
        run.engine.release()
        await run.until(lambda: len(run.engine.batches) == 2)
        assert run.service.admission.images == 4
        for metric in ("perceiver_admitted_images", "perceiver_admitted_background_images"):
            assert await run.metric(metric) == 4
        run.engine.let_go()
        assert (await explained).status_code == 200
        assert run.service.admission.images == 0


@pytest.mark.parametrize(("max_queue_size", "taken"), [(8, 4), (512, masks.RUNS)])
async def test_a_large_batch_of_it_keeps_nobody_out(tmp_path: Path, max_queue_size: int, taken: int) -> None:
    engine = FakeEngine(max_batch_size=512)
    async with running(tmp_path, engine, max_batch_size=512, max_queue_size=max_queue_size, max_images=1) as run:
        run.engine.hold()
        explained = asyncio.create_task(run.client.post("/explain", content=png(1), headers=PNG))
        await run.until(lambda: run.engine.batches == [[1]])
        run.engine.release()
        await run.until(lambda: len(run.engine.batches) == 2)
        assert run.service.admission.images == len(run.engine.batches[1]) == taken
        predicted = asyncio.create_task(run.predict(7))
        await run.until(lambda: run.service.queue_length == 1 or predicted.done())
        run.engine.let_go()
        assert (await predicted).status_code == (await explained).status_code == 200


async def test_who_leaves_stops_the_runs(tmp_path: Path) -> None:
    async with running(tmp_path) as run:
        run.engine.hold()
        explained = asyncio.create_task(run.client.post("/explain", content=png(1), headers=PNG))
        await run.until(lambda: run.engine.batches == [[1]])
        run.engine.release()
        await run.until(lambda: len(run.engine.batches) == 2)
        explained.cancel()
        await run.until(lambda: run.in_flight == 0)
        run.engine.let_go()
        assert (await run.predict(9)).status_code == 200
        assert len(run.engine.batches) == 3  # nothing of it after the batch that ran
        ran = sum(map(len, run.engine.batches[:2]))
        assert await run.metric("perceiver_explanation_runs_total") == ran  # nobody is answered with them
        assert await run.metric("perceiver_images_total") == 1
        assert run.service.admission.images == 0


async def test_a_deadline_ends_it(tmp_path: Path) -> None:
    async with running(tmp_path, FakeEngine(delay=0.5)) as run:
        answer = await run.client.post("/explain", content=png(1), headers=PNG | {"x-request-timeout-ms": "2000"})
        assert (answer.status_code, error_of(answer.content)) == (504, "deadline_exceeded")
        await run.until(lambda: run.service.queue_length == 0)
        ran = sum(map(len, run.engine.batches))
        assert ran < RUNS
        assert 0 < await run.metric("perceiver_explanation_runs_total") <= ran
        assert await run.metric("perceiver_explanations_total") == 0


async def test_a_failing_run_fails_it(tmp_path: Path) -> None:
    async with running(tmp_path) as run:
        run.engine.fail = lambda numbers: None if numbers == [1] else RuntimeError("broken")
        answer = await run.client.post("/explain", content=png(1), headers=PNG)
        assert (answer.status_code, error_of(answer.content)) == (500, "inference_failed")
        assert run.service.admission.images == run.in_flight == 0
