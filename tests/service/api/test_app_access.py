"""Keys, CORS, the access log, and the OpenAPI document."""

import json
import logging
from pathlib import Path

import httpx
import pytest

from service.api.app import PerceiverApp
from tests.fakes import tiny_metadata
from tests.service.harness import error_of, free_ports, png, read_answer, request_head, running

JSON_ROUTES = ["/health", "/health/live", "/health/ready", "/models", "/openapi.json"]


# The management port

FOR_OPERATORS = (
    *("GET /health", "GET /health/live", "GET /health/ready", "GET /metrics", "GET /models", "POST /models/reload"),
    *("GET /v2/models/stats", "GET /v2/models/tiny/stats", "GET /v2/models/tiny/versions/1/stats"),
    "POST /v2/repository/index",
)
FOR_CLIENTS = (
    *("POST /predict", "POST /explain", "POST /embed", "GET /", "GET /docs", "GET /openapi.json"),
    *("GET /v2", "GET /v2/health/live", "GET /v2/health/ready", "POST /v2/models/tiny/infer"),
    *(f"GET /v2/models/tiny{tail}" for tail in ("", "/ready", "/config", "/versions/1", "/versions/1/ready")),
)


async def test_each_path_is_on_one_of_the_two_ports(tmp_path: Path) -> None:
    port = free_ports(1)
    key = {"x-api-key": "first"}
    async with (
        running(tmp_path, management_port=port, api_keys="first") as run,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as management,
    ):
        sides = ((FOR_OPERATORS, management, run.client, "management"), (FOR_CLIENTS, run.client, management, "client"))
        for requests, right, wrong, name in sides:
            for request in requests:
                method, path = request.split()
                assert (await right.request(method, path, headers=key)).status_code != 404, request
                answer = await wrong.request(method, path, headers=key)
                assert answer.status_code == 404, request
                assert f"the {name} port may have it" in answer.text, request
        for path, status in (("/metrics", 200), ("/models", 401), ("/v2/models/stats", 401)):
            assert (await management.get(path)).status_code == status, path


async def test_without_a_management_port_one_port_has_all(tmp_path: Path) -> None:
    async with running(tmp_path) as run:
        for request in (*FOR_OPERATORS, *FOR_CLIENTS):
            assert (await run.client.request(*request.split())).status_code != 404, request
        (stats,) = (await run.client.get("/v2/models/tiny/stats")).json()["model_stats"]
        assert stats["version"] == "1"


# Keys


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 401),
        ({"x-api-key": "wrong"}, 401),
        ({"authorization": "Bearer wrong"}, 401),
        ({"authorization": "Basic first"}, 401),
        ({"x-api-key": "first"}, 200),
        ({"x-api-key": "second"}, 200),
        ({"authorization": "Bearer second"}, 200),
        ({"authorization": "bearer first"}, 200),
        ({"x-api-key": "root"}, 401),
    ],
)
async def test_api_keys(tmp_path: Path, headers: dict[str, str], status: int) -> None:
    async with running(tmp_path / "m", api_keys="first, second", admin_key="root") as run:
        predicted = await run.client.post("/predict", content=png(1), headers=headers | {"content-type": "image/png"})
        listed = await run.client.get("/models", headers=headers)
        headed = await run.client.head("/models", headers=headers)
        assert (predicted.status_code, listed.status_code, headed.status_code) == (status, status, status)
        if status == 401:
            assert error_of(predicted.content) == "unauthorized"
            assert predicted.headers["www-authenticate"] == "Bearer"
            assert run.engine.batches == []
        for path in ("/health", "/health/ready", "/metrics", "/openapi.json"):
            assert (await run.client.get(path)).status_code == 200


async def test_keys_from_files_and_the_admin_key(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("# clients\nfirst\n\n  second  # a friend\n")
    (tmp_path / "admin").write_text("root\nnext\n")
    files = {"api_keys_file": tmp_path / "keys", "admin_key_file": tmp_path / "admin", "admin_key": "last"}
    async with running(tmp_path / "m", **files) as run:
        assert run.service.settings.client_keys() == ("first", "second")
        assert (await run.client.get("/models", headers={"x-api-key": "second"})).status_code == 200
        for key, status in (("second", 401), ("root", 200), ("next", 200), ("last", 200), ("", 401)):
            response = await run.client.post("/models/reload", headers={"x-api-key": key})
            assert response.status_code == status
        # They are read at the start, and a secret may be gone or another by now.
        for name in ("keys", "admin"):
            (tmp_path / name).unlink()
        assert (await run.client.get("/models", headers={"x-api-key": "second"})).status_code == 200
        document = (await run.client.get("/openapi.json")).json()
        for method, path in (("post", "/predict"), ("get", "/models"), ("post", "/models/reload")):
            assert document["paths"][path][method]["security"], path


@pytest.mark.parametrize("suffix", ["%0A", "%0D", "%0D%0A", "%00", "%E2%80%A8", "/", "//", "%2F", ";", "%20", "%3F"])
async def test_no_other_spelling_of_a_path_gets_round_the_keys(
    tmp_path: Path, suffix: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "service.access")
    async with running(tmp_path / "m", api_keys="first", admin_key="root", access_log=True) as run:
        for method, path in (("POST", "/predict"), ("GET", "/models"), ("POST", "/models/reload")):
            for spelling in (path + suffix, "/" + path, path.upper()):
                reader, writer = await run.connect()
                writer.write(request_head(len(png(1)), method=method, target=spelling) + png(1))
                status, _, _ = await read_answer(reader)
                assert status == 404, spelling
        assert run.engine.batches == []
    assert not [record.getMessage() for record in caplog.records if not record.getMessage().isprintable()]


# CORS


async def test_cors_preflight_and_errors_can_be_read_by_allowed_origins_alone(tmp_path: Path) -> None:
    async with running(tmp_path, cors_origins="https://example.org", api_keys="key") as run:
        asking = {"access-control-request-method": "POST", "access-control-request-headers": "x-api-key"}
        good = await run.client.options("/predict", headers={"origin": "https://example.org"} | asking)
        assert good.status_code == 200
        assert good.headers["access-control-allow-origin"] == "https://example.org"
        bad = await run.client.options("/predict", headers={"origin": "https://evil.example"} | asking)
        assert bad.status_code == 400
        error = bad.json()["error"]
        assert (error["code"], error["message"]) == ("bad_request", "Disallowed CORS origin.")
        assert bad.headers["x-request-id"] == error["request_id"]
        assert "access-control-allow-origin" not in bad.headers
        assert "Origin" in bad.headers["vary"]
        refused = await run.client.post("/predict", headers={"origin": "https://example.org"})
        assert refused.status_code == 401
        assert refused.headers["access-control-allow-origin"] == "https://example.org"
        assert "X-Request-Id" in refused.headers["access-control-expose-headers"]
        assert "Inference-Header-Content-Length" in refused.headers["access-control-expose-headers"]


async def test_without_the_setting_there_are_no_cors_headers(tmp_path: Path) -> None:
    async with running(tmp_path) as run:
        response = await run.client.get("/health", headers={"origin": "https://example.org"})
        assert not [name for name in response.headers if name.startswith("access-control")]


# Logs


async def test_the_access_log_is_off_unless_set_and_holds_no_content(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    async with running(tmp_path / "a") as run:
        await run.predict()
    assert not [record for record in caplog.records if record.name == "service.access"]
    async with running(tmp_path / "b", access_log=True, api_keys="hush-hush") as run:
        await run.client.post("/predict?top_k=2", headers={"x-api-key": "hush-hush", "x-request-id": "abc"})
    (record,) = [record for record in caplog.records if record.name == "service.access"]
    assert record.getMessage() == "POST /predict 400"
    assert (record.request_id, record.status) == ("abc", 400)  # type: ignore[attr-defined]
    assert "hush-hush" not in caplog.text


# OpenAPI


async def test_the_openapi_document_is_valid_and_describes_every_status(tmp_path: Path) -> None:
    async with running(tmp_path) as run:
        document = (await run.client.get("/openapi.json")).json()
        operation = document["paths"]["/predict"]["post"]
        assert set(operation["responses"]) == {
            *("200", "400", "401", "408", "411", "413", "415", "431", "500", "501", "503", "504")
        }
        assert set(operation["requestBody"]["content"]) == {
            "multipart/form-data",
            "application/json",
            "image/*",
            "application/octet-stream",
        }
        assert "`truncated_image`" in operation["responses"]["400"]["description"]
        assert "Retry-After" in operation["responses"]["503"]["headers"]
        references = set(_references(document))
        assert references
        for reference in references:
            node = document
            for part in reference.removeprefix("#/").split("/"):
                node = node[part]
        paths = {"/predict", "/explain", "/embed", "/models", "/models/reload", "/metrics"}
        paths |= {"/health", "/health/live", "/health/ready"}
        of_model = {f"/v2/models/{{name}}{at}" for at in ("", "/versions/{version}")}
        v2 = {"/v2", "/v2/health/live", "/v2/health/ready", "/v2/models/stats", "/v2/repository/index"}
        v2 |= {f"{path}{tail}" for path in of_model for tail in ("", "/ready", "/config", "/stats", "/infer")}
        assert set(document["paths"]) == paths | v2
        assert operation["parameters"][0]["schema"]["maximum"] == 5
        assert not any("security" in entry for path in document["paths"].values() for entry in path.values())
        docs = await run.client.get("/docs")
        assert docs.status_code == 200
        assert "swagger" in docs.text


async def test_the_openapi_document_is_written_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = []
    original = PerceiverApp.openapi
    monkeypatch.setattr(PerceiverApp, "openapi", lambda app: written.append(app) or original(app))
    async with running(tmp_path) as run:
        bodies = {(await run.client.get("/openapi.json")).content for _ in range(3)}
        assert (len(bodies), len(written)) == (1, 1)
        live = run.service.store.live
        assert live is not None
        live.metadata = tiny_metadata(labels=("a", "b", "c", "d"))  # as another version's
        document = (await run.client.get("/openapi.json")).json()
        assert document["paths"]["/predict"]["post"]["parameters"][0]["schema"]["maximum"] == 4
        assert len(written) == 2


def _references(node: object) -> list[str]:
    if isinstance(node, dict):
        own = [node["$ref"]] if isinstance(node.get("$ref"), str) else []
        return own + [reference for value in node.values() for reference in _references(value)]
    return [reference for value in node for reference in _references(value)] if isinstance(node, list) else []


async def test_the_openapi_document_says_what_needs_a_key(tmp_path: Path) -> None:
    async with running(tmp_path, api_keys="a", admin_key="b") as run:
        paths = (await run.client.get("/openapi.json")).json()["paths"]
        keyed = {path for path, entry in paths.items() if any("security" in operation for operation in entry.values())}
        v2 = {
            path for path in paths if path.startswith("/v2/") and "health" not in path and not path.endswith("/ready")
        }
        assert keyed == {"/predict", "/explain", "/embed", "/models", "/models/reload"} | v2


async def test_answers_have_the_documented_shape(tmp_path: Path) -> None:
    async with running(tmp_path) as run:
        for path in JSON_ROUTES:
            response = await run.client.get(path)
            assert response.status_code == 200
            assert response.headers["content-type"] == "application/json"
            json.loads(response.content)
