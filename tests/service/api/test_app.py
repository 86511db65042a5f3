"""What every request passes, and the routes beside /predict."""

from pathlib import Path

import pytest

from service.lifecycle import Service
from service.repository import store
from service.settings import Settings
from tests.fakes import FakeEngine, make_model_folder
from tests.service.harness import error_of, fake_folder, listening, png, running


def on_cpu(folder: Path, **settings: object) -> Settings:
    values = {"port": 0, "provider": "cpu", "intra_op_threads": 1}
    return Settings.model_validate({"model_dir": folder} | values | settings)


def no_entry(folder: Path) -> None:
    raise PermissionError(13, "Permission denied", str(folder))


# Request ids


@pytest.mark.parametrize("given", ["abc-123", "A.b_C", "x" * 64])
async def test_a_request_id_comes_back(tmp_path: Path, given: str) -> None:
    async with running(tmp_path) as run:
        response = await run.client.get("/health/live", headers={"x-request-id": given})
        assert response.headers["x-request-id"] == given


@pytest.mark.parametrize("given", ["", "x" * 65, "a b", 'a"b', "a\tb", "\u00e4"])
async def test_an_unfit_request_id_is_replaced(tmp_path: Path, given: str) -> None:
    async with running(tmp_path) as run:
        headers = {"x-request-id": given.encode()}
        ids = [(await run.client.get("/nix", headers=headers)).json()["error"]["request_id"] for _ in range(2)]
        assert given not in ids
        assert len(set(ids)) == 2


# Methods and paths


async def test_unknown_paths_and_methods_have_the_shape_of_all_errors(tmp_path: Path) -> None:
    async with running(tmp_path) as run:
        for method, path, status, code in [
            ("GET", "/nix", 404, "not_found"),
            ("POST", "/", 405, "method_not_allowed"),
            ("GET", "/predict/", 404, "not_found"),
            ("POST", "/predict/1", 404, "not_found"),
            ("GET", "/predict", 405, "method_not_allowed"),
            ("HEAD", "/predict", 405, ""),
            ("PUT", "/predict", 405, "method_not_allowed"),
            ("OPTIONS", "/predict", 405, "method_not_allowed"),
            ("POST", "/health", 405, "method_not_allowed"),
            ("GET", "/models/reload", 405, "method_not_allowed"),
            ("POST", "/models/reload", 403, "reload_disabled"),
        ]:
            response = await run.client.request(method, path)
            assert response.status_code == status, (method, path)
            assert method == "HEAD" or error_of(response.content) == code
            assert response.headers["x-request-id"]
        assert (await run.client.get("/predict")).headers["allow"] == "POST"


@pytest.mark.parametrize("path", ["/predict/", "/PREDICT", "//predict//"])
async def test_a_path_that_is_nearly_one_names_it(tmp_path: Path, path: str) -> None:
    async with running(tmp_path) as run:
        response = await run.client.post(f"http://127.0.0.1:{run.port}{path}", content=png(1))
        assert response.status_code == 404
        assert response.json()["error"]["message"] == f"There is nothing at {path}; the path is /predict."


@pytest.mark.parametrize("path", ["/health", "/health/live", "/health/ready", "/metrics", "/models", "/docs", "/"])
async def test_probes_answer_head_without_a_body(tmp_path: Path, path: str) -> None:
    async with running(tmp_path) as run:
        get, head = await run.client.get(path), await run.client.head(path)
        assert (get.status_code, head.status_code) == (200, 200)
        assert head.content == b""
        if path != "/metrics":  # which has a number more or less each time
            assert head.headers["content-length"] == get.headers["content-length"]
        assert (await run.client.delete(path)).headers["allow"] == "GET, HEAD"


async def test_an_unexpected_error_is_a_500_without_details(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def explode() -> None:
        raise RuntimeError("secret detail")

    async with running(tmp_path) as run:
        run.service.check_ready = explode  # type: ignore[method-assign]
        for response in (await run.predict(), await run.client.get("/health/ready")):
            assert (response.status_code, error_of(response.content)) == (500, "internal_error")
            assert "secret" not in response.text
            assert response.json()["error"]["request_id"] in caplog.text
        assert "secret detail" in caplog.text
        assert await run.metric('perceiver_rejections_total{reason="internal_error"}') == 2


# Health


async def test_health_summarises(tmp_path: Path) -> None:
    async with running(tmp_path, max_queue_size=64) as run:
        response = await run.client.get("/health")
        assert response.status_code == 200
        assert response.json() == {
            "status": "ready",
            "model": "tiny",
            "version": 1,
            "provider": "cpu",
            "queue": {
                "waiting": 0,
                "images": 0,
                "max_images": 64,
                "bytes": 0,
                "max_bytes": run.service.settings.max_queue_bytes,
            },
        }


async def test_before_the_golden_check_has_passed_nothing_is_ready(tmp_path: Path) -> None:
    engine = FakeEngine()
    folder = fake_folder(tmp_path, engine)
    engine.hold()
    settings = Settings(model_dir=folder, port=0)
    async with listening(Service(settings, open_engines=lambda path, options: [engine]), engine) as run:
        await run.until(lambda: engine.batches)  # the golden images are being run
        assert (await run.client.get("/health/live")).status_code == 200
        ready, predicted = await run.client.get("/health/ready"), await run.predict()
        for response in (ready, predicted):
            assert (response.status_code, error_of(response.content)) == (503, "not_ready")
            assert int(response.headers["retry-after"]) >= 1
        health = await run.client.get("/health")
        assert (health.status_code, health.json()["status"], health.json()["model"]) == (503, "loading", None)
        assert await run.metric("perceiver_ready") == 0
        engine.release(10)
        await run.until(lambda: run.service.status == "ready")
        assert (await run.client.get("/health/ready")).status_code == 200
        assert await run.metric("perceiver_ready") == 1


async def test_a_model_that_is_refused_fails_the_service_with_the_reason(tmp_path: Path) -> None:
    make_model_folder(tmp_path, defect="golden_mismatch")
    async with listening(Service(on_cpu(tmp_path)), FakeEngine()) as run:
        await run.until(lambda: run.service.failure)
        assert "golden" in run.service.failure
        assert (await run.client.get("/health")).json()["status"] == "failed"
        assert (await run.client.get("/health/ready")).status_code == 503
        assert await run.metric('perceiver_model_reloads_total{result="refused"}') == 1
        assert await run.metric("perceiver_golden_max_abs_difference") > 0


async def test_an_engine_that_hangs_fails_the_service(tmp_path: Path) -> None:
    engine = FakeEngine()
    async with running(tmp_path, engine, run_timeout_ms=50) as run:
        engine.hold()
        response = await run.predict()
        assert (response.status_code, error_of(response.content)) == (500, "inference_failed")
        await run.until(lambda: run.service.status == "failed")
        assert (await run.client.get("/health/ready")).status_code == 503
        assert error_of((await run.predict()).content) == "not_ready"
        assert (await run.client.get("/health/live")).status_code == 200


async def test_while_draining_what_was_accepted_finishes_and_nothing_new_begins(tmp_path: Path) -> None:
    engine = FakeEngine()
    async with running(tmp_path, engine) as run:
        accepted = await run.hold_first()
        run.drain()
        for response in (await run.client.get("/health/ready"), await run.predict(2)):
            assert (response.status_code, error_of(response.content)) == (503, "draining")
            assert response.headers["connection"] == "close"
        assert (await run.client.get("/health")).json()["status"] == "draining"
        engine.release()
        assert (await accepted).status_code == 200
        await run.until(lambda: run.in_flight == 0)  # another process counts after it has answered


async def test_who_leaves_tells_the_probes_and_still_answers(tmp_path: Path) -> None:
    async with running(tmp_path) as run:
        assert "connection" not in (await run.predict()).headers
        run.service.leaving = True
        for _ in range(2):
            response = await run.client.get("/health/ready")
            assert (response.status_code, error_of(response.content)) == (503, "draining")
            response = await run.client.get("/health")
            assert (response.status_code, response.json()["status"]) == (503, "draining")
            assert (await run.client.get("/health/live")).status_code == 200
            # Every client comes back on another connection, and so to another process.
            assert (await run.predict()).headers["connection"] == "close"
        assert await run.metric("perceiver_ready") == 0


# Models


async def test_models_lists_versions_with_metadata(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_model_folder(tmp_path, 1)
    make_model_folder(tmp_path, 2)
    make_model_folder(tmp_path, 3, defect="golden_mismatch")
    make_model_folder(tmp_path, 5, defect="corrupt_onnx")
    async with listening(Service(on_cpu(tmp_path, admin_key="root")), FakeEngine()) as run:
        await run.until(lambda: run.service.status == "ready")
        answer = (await run.client.get("/models")).json()
        assert answer["live"] == 2
        assert [(entry["version"], entry["state"]) for entry in answer["versions"]] == [
            (1, "available"),
            (2, "live"),
            (3, "refused"),
            (5, "refused"),
        ]
        assert "golden" in answer["versions"][2]["reason"]
        assert str(tmp_path) not in str(answer)
        assert answer["versions"][1]["metadata"]["labels"][0] == "class 0"
        make_model_folder(tmp_path, 4)
        reloaded = await run.client.post("/models/reload", headers={"x-api-key": "root"})
        assert (reloaded.status_code, reloaded.json()["live"]) == (200, 4)
        assert (await run.predict()).json()["version"] == 4
        assert await run.metric('perceiver_model_reloads_total{result="loaded"}') == 2
        monkeypatch.setattr(store, "scan", no_entry)
        refused = await run.client.post("/models/reload", headers={"x-api-key": "root"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "folder_unavailable")
        # An alarm takes that for a connection too many.
        assert await run.metric('perceiver_rejections_total{reason="unavailable"}') == 0
        assert refused.json()["error"]["message"] == "The model folder can't be looked into: Permission denied."
        label = 'perceiver_model_info{name="tiny",precision="float32",provider="cpu",version="%d"}'
        assert [await run.metric(label % version) for version in (2, 4)] == [0, 1]
