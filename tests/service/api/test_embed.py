"""`POST /embed` over HTTP; the fake engine's features are the image's number, counted up."""

import asyncio
from pathlib import Path

import numpy as np
import pytest

from service.api.embed import DIGITS, rounded
from service.api.schemas import EmbedResponse
from tests.fakes import FakeEngine
from tests.service.harness import error_of, png, running

PNG = {"content-type": "image/png"}


async def test_vectors_have_length_1_unless_told_otherwise(tmp_path: Path) -> None:
    async with running(tmp_path, FakeEngine(feature_dim=3)) as run:
        files = [("file", ("a.png", png(1))), ("file", ("b.png", png(5)))]
        normalized = EmbedResponse.model_validate((await run.client.post("/embed", files=files)).json())
        plain = EmbedResponse.model_validate((await run.client.post("/embed?normalize=false", files=files)).json())
        assert (normalized.dim, normalized.normalized, plain.normalized) == (3, True, False)
        assert [each.filename for each in normalized.embeddings] == ["a.png", "b.png"]
        assert [each.embedding for each in plain.embeddings] == [[1, 2, 3], [5, 6, 7]]
        assert await run.metric("perceiver_request_seconds_count") == 2
        for unit, vector in zip(normalized.embeddings, plain.embeddings, strict=True):
            expected = np.array(vector.embedding) / np.linalg.norm(vector.embedding)
            np.testing.assert_allclose(unit.embedding, expected, rtol=1e-6)


async def test_features_are_computed_where_they_are_asked_for_alone(tmp_path: Path) -> None:
    async with running(tmp_path, FakeEngine(feature_dim=3)) as run:
        assert (await run.predict(1)).status_code == 200
        assert run.engine.features_runs == []
        run.engine.hold()
        first = asyncio.create_task(run.predict(2))
        await run.until(lambda: run.engine.batches[-1] == [2])
        both = [
            asyncio.create_task(run.predict(3)),
            asyncio.create_task(run.client.post("/embed", content=png(4), headers=PNG)),
        ]
        await run.until(lambda: run.service.queue_length == 2)
        run.engine.let_go()
        answers = await asyncio.gather(first, *both)
        assert [answer.status_code for answer in answers] == [200] * 3
        assert run.engine.features_runs == [2]  # one batch of both


async def test_a_model_without_features_says_so_before_the_body_is_read(tmp_path: Path) -> None:
    async with running(tmp_path) as run:
        answer = await run.client.post("/embed", content=png(1), headers=PNG)
        assert (answer.status_code, error_of(answer.content)) == (501, "features_unavailable")
        assert "export" in answer.json()["error"]["message"]


@pytest.mark.parametrize("query", ["normalize=1", "normalize=", "normal=true", "normalize=true&normalize=true"])
async def test_a_bad_parameter_is_refused(tmp_path: Path, query: str) -> None:
    async with running(tmp_path, FakeEngine(feature_dim=3)) as run:
        answer = await run.client.post(f"/embed?{query}", content=png(1), headers=PNG)
        assert (answer.status_code, error_of(answer.content)) == (400, "bad_request")


async def test_the_parameter_may_be_a_field_of_a_form_and_the_query_goes_before_it(tmp_path: Path) -> None:
    async with running(tmp_path, FakeEngine(feature_dim=3)) as run:
        files = {"file": ("a.png", png(1))}
        for query, field, normalized in (("", "false", False), ("?normalize=true", "false", True)):
            answer = await run.client.post(f"/embed{query}", files=files, data={"normalize": field})
            assert answer.json()["normalized"] is normalized
        answer = await run.client.post("/embed", files=files, data={"normalize": "no"})
        assert (answer.status_code, error_of(answer.content)) == (400, "bad_request")


async def test_a_vector_of_zeros_stays_one(tmp_path: Path) -> None:
    async with running(tmp_path, FakeEngine(feature_dim=1)) as run:
        answer = await run.client.post("/embed", content=png(0), headers=PNG)
        assert answer.json()["embeddings"][0]["embedding"] == [0]


def test_numbers_are_rounded_to_the_digits_that_float32_has() -> None:
    random = np.random.default_rng(0)
    values = random.standard_normal(1000) * 10.0 ** random.integers(-37, 38, 1000)
    limits = np.finfo(np.float32)
    values = np.append(values, [0, 1, -1, 9.9999999, limits.max, limits.tiny, limits.smallest_subnormal])
    expected = [float(f"{value:.{DIGITS}g}") for value in values]
    np.testing.assert_allclose(rounded(values), expected, rtol=1e-15)
