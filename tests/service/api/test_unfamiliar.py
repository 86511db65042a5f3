"""`unfamiliar` in answers over HTTP; the fake engine's score is the image's number and a half."""

import json
from pathlib import Path

import numpy as np
import pytest

from service.api.schemas import PredictResponse
from service.engine.runners import Outputs
from tests.fakes import FakeEngine, Images
from tests.service.harness import error_of, png, running

PNG = {"content-type": "image/png"}
COUNTER = "perceiver_unfamiliar_images_total"


async def test_what_is_above_the_threshold_is_flagged_and_counted(tmp_path: Path) -> None:
    async with running(tmp_path, FakeEngine(threshold=4.5)) as run:
        files = [("file", (f"{number}.png", png(number))) for number in (1, 9, 4)]
        answer = await run.client.post("/predict", files=files)
        predictions = PredictResponse.model_validate_json(answer.content).predictions
        assert [each.unfamiliarity for each in predictions] == [1.5, 9.5, 4.5]
        assert [each.unfamiliar for each in predictions] == [False, True, False]  # the threshold itself is not above it
        assert await run.metric(COUNTER) == 1


async def test_covered_images_of_explanations_do_not_count(tmp_path: Path) -> None:
    async with running(tmp_path, FakeEngine(threshold=0.25)) as run:
        answer = await run.client.post("/explain", content=png(9), headers=PNG)
        assert answer.status_code == 200
        assert await run.metric("perceiver_explanation_runs_total") > 1
        assert await run.metric(COUNTER) == 0


async def test_a_model_that_can_not_tell_says_nothing(tmp_path: Path) -> None:
    async with running(tmp_path) as run:
        answer = await run.predict(9)
        assert set(answer.json()["predictions"][0]) == {"filename", "top"}
        PredictResponse.model_validate_json(answer.content)
        assert await run.metric(COUNTER) == 0


async def test_a_score_that_is_no_number_is_no_answer(tmp_path: Path) -> None:
    class Broken(FakeEngine):
        def run_outputs(self, images: Images, *, with_features: bool = False) -> Outputs:
            outputs = super().run_outputs(images)
            return outputs._replace(unfamiliarity=np.where(outputs.logits[:, 0] == 9, np.float32("nan"), np.float32(1)))

    engine = Broken(threshold=4.5)
    async with running(tmp_path, engine) as run:
        answer = await run.predict(9)
        assert (answer.status_code, error_of(answer.content)) == (500, "inference_failed")
        assert (await run.predict(8)).json()["predictions"][0]["unfamiliar"] is False


@pytest.mark.parametrize("threshold", [4.5, None])
async def test_v2_has_the_score_where_it_is_asked_for(tmp_path: Path, threshold: float | None) -> None:
    async with running(tmp_path, FakeEngine(feature_dim=2, threshold=threshold)) as run:
        pixels = np.zeros((2, 4, 6, 3), np.uint8)
        pixels[:, 0, 0, 1] = 7, 9
        tensor = {"name": "images", "datatype": "UINT8", "shape": [2, 4, 6, 3], "data": pixels.ravel().tolist()}
        asked = [{"name": name} for name in ("unfamiliarity", "features", "logits")]
        answer = await run.client.post(
            "/v2/models/tiny/infer", content=json.dumps({"inputs": [tensor], "outputs": asked})
        )
        described = (await run.client.get("/v2/models/tiny")).json()["outputs"]
        entry = {"name": "unfamiliarity", "datatype": "FP32", "shape": [-1, 1]}
        if threshold is None:
            assert answer.status_code == 400
            assert "no output unfamiliarity" in answer.json()["error"]
            assert entry not in described
            return
        outputs = {output["name"]: output for output in answer.json()["outputs"]}
        assert (outputs["unfamiliarity"]["shape"], outputs["unfamiliarity"]["data"]) == ([2, 1], [7.5, 9.5])
        assert outputs["features"]["data"] == [7, 8, 9, 10]
        assert entry in described
        classes = [{"name": "unfamiliarity", "parameters": {"classification": 2}}]
        refused = await run.client.post(
            "/v2/models/tiny/infer", content=json.dumps({"inputs": [tensor], "outputs": classes})
        )
        assert "unfamiliarity has no classes" in refused.json()["error"]
