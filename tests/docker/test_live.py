"""Real service, real Prometheus, shipped configuration: every query of every panel and every rule gives data."""

import base64
import io
import json
import math
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from PIL import Image

from tests.docker import stack
from tests.docker.files import Yaml, alerts, rules
from tests.docker.test_dashboard import JSON, PANELS
from tests.fakes import make_model_folder

import render  # isort: skip - files.py has put its folder on the path

pytestmark = pytest.mark.skipif(
    shutil.which("prometheus") is None, reason="prometheus is not installed; it is a package of Debian's"
)

# What can be asked only where an NVIDIA GPU, or NVIDIA's exporter, is.
GPU_PANELS = {"GPU memory", "GPU busy", "GPU temperature", "GPU power"}
GPU_RULES = {
    "gpu:perceiver_memory:used_ratio",
    "PerceiverGpuMemoryNearlyFull",
    "PerceiverGpuLost",
    "PerceiverGpuXidError",
    "PerceiverGpuExporterDown",
}

QUEUE = 8  # images: small enough that a few clients fill it
SCRAPES = 4


def png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), "teal").save(buffer, "PNG")
    return buffer.getvalue()


def post(port: int, body: bytes, content_type: str) -> int:
    """The status of one request to /predict."""
    headers = {"Content-Type": content_type}
    request = urllib.request.Request(f"http://127.0.0.1:{port}/predict", data=body, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=20) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        with error:
            return error.code


def drive(port: int) -> set[int]:
    """Good requests, bad ones, and more at once than the queue takes; returns the statuses."""
    many = json.dumps({"images": [base64.b64encode(png()).decode()] * QUEUE}).encode()
    requests = [(png(), "image/png"), (b"no image", "image/png"), *[(many, "application/json")] * 12]
    with ThreadPoolExecutor(14) as clients:
        return set(clients.map(lambda request: post(port, *request), requests))


@pytest.fixture(scope="module")
def monitored(tmp_path_factory: pytest.TempPathFactory) -> Iterator[stack.Prometheus]:
    """Prometheus after it has watched a service under load that refuses a version, takes one, and refuses another."""
    folder = tmp_path_factory.mktemp("live")
    models = folder / "tiny"
    make_model_folder(models, 1)
    options = {"max_queue_size": QUEUE, "max_images": QUEUE, "model_poll_s": 0.2, "intra_op_threads": 1}
    with stack.service(models, folder, **options) as port, stack.prometheus(folder, port) as server:
        statuses = drive(port)
        wait_until(server, "count_over_time(perceiver_ready[1m]) >= 2")  # the counters' first values are read
        make_model_folder(models, 2, defect="golden_mismatch")
        refused = 'ALERTS{alertname="PerceiverReloadRefused", alertstate="firing"}'
        wait_until(server, refused)
        make_model_folder(models, 3)
        give_up = time.monotonic() + 60
        while not {200, 400, 503} <= statuses or not server.query(f"count_over_time(perceiver_ready[1m]) >= {SCRAPES}"):
            statuses |= drive(port)
            assert time.monotonic() < give_up, statuses
        wait_until(server, 'perceiver_model_info{version="3"} == 1')
        drive(port)
        wait_until(server, "job:perceiver_requests:rate5m > 0", "job:perceiver_request_seconds:p99_5m > 0")
        # The refused version 2 is no concern any more; the next is, for as long as it lies there.
        wait_until(server, f"absent({refused})")
        make_model_folder(models, 4, defect="golden_mismatch")
        wait_until(server, refused)
        server.at = time.time()
        yield server


def wait_until(server: stack.Prometheus, *expressions: str) -> None:
    """Return when all queries give something."""
    give_up = time.monotonic() + 30
    while not all(server.query(expression) for expression in expressions):
        assert time.monotonic() < give_up, expressions
        time.sleep(0.2)


def has_data(values: list[float]) -> bool:
    return bool(values) and all(map(math.isfinite, values))


@pytest.mark.parametrize(
    ("title", "expression"),
    [(panel.title, query.expr) for panel in PANELS for query in panel.queries],
    ids=[f"{panel.title}: {query.legend}" for panel in PANELS for query in panel.queries],
)
def test_panel(monitored: stack.Prometheus, title: str, expression: str):
    values = monitored.query(expression)  # raises where the query is no PromQL
    if title in GPU_PANELS and not values:
        pytest.skip("needs an NVIDIA GPU and NVIDIA's exporter")
    assert has_data(values), values


def test_no_more_needs_a_gpu_than_says_so():
    assert {panel.title for panel in PANELS if panel.needs_gpu} == GPU_PANELS
    assert {rule.get("alert", rule.get("record")) for rule in rules()} >= GPU_RULES


@pytest.mark.parametrize("panel", [panel for panel in PANELS if panel.kind == "heatmap"], ids=lambda panel: panel.title)
def test_heat_map_has_buckets(monitored: stack.Prometheus, panel):
    result = monitored.api("query", query=stack.fill(panel.queries[0].expr), time=monitored.at)["result"]
    assert len({sample["metric"]["le"] for sample in result}) > 10
    assert sum(float(sample["value"][1]) for sample in result) > 0


@pytest.mark.parametrize("mark", JSON["annotations"]["list"], ids=lambda mark: mark["name"])
def test_annotation(monitored: stack.Prometheus, mark: Yaml):
    assert has_data(monitored.query(mark["expr"]))


def test_variable(monitored: stack.Prometheus):
    assert monitored.api("label/instance/values", **{"match[]": "perceiver_ready"})


@pytest.mark.parametrize("rule", rules(), ids=lambda rule: rule.get("alert", rule.get("record")))
def test_rule(monitored: stack.Prometheus, rule: Yaml):
    """A recording rule as it is; an alarm's condition, whether it holds or not."""
    values = monitored.query(stack.as_bool(rule["expr"]))
    if rule.get("alert", rule.get("record")) in GPU_RULES and not values:
        pytest.skip("needs an NVIDIA GPU and NVIDIA's exporter")
    assert has_data(values), values
    assert "alert" not in rule or rule["expr"] != stack.as_bool(rule["expr"])


def test_prometheus_evaluates_every_rule(monitored: stack.Prometheus):
    evaluated = [rule for group in monitored.api("rules")["groups"] for rule in group["rules"]]
    assert {rule["name"]: rule["health"] for rule in evaluated} == {
        rule.get("alert", rule.get("record")): "ok" for rule in rules()
    }


def test_only_the_alarm_that_should_goes_off(monitored: stack.Prometheus):
    firing = {alert["labels"]["alertname"] for alert in monitored.api("alerts")["alerts"] if alert["state"] == "firing"}
    assert firing == {"PerceiverReloadRefused"} < {alert["alert"] for alert in alerts()}


def test_the_alarm_leads_to_its_runbook(monitored: stack.Prometheus):
    (alarm,) = [one for one in monitored.api("alerts")["alerts"] if one["state"] == "firing"]
    url, _, section = alarm["annotations"]["runbook_url"].partition("#")
    assert url == f"{monitored.url}/user/docs/operations.md"
    assert b"### PerceiverReloadRefused\n" in stack.get(url)
    assert section == "perceiverreloadrefused"


def test_exemplars_carry_request_ids(monitored: stack.Prometheus):
    series = monitored.api(
        "query_exemplars",
        query="perceiver_request_seconds_bucket",
        start=monitored.at - 300,
        end=monitored.at,
    )
    assert all(exemplar["labels"]["request_id"] for found in series for exemplar in found["exemplars"])
    assert series


def test_image_of_the_dashboard(monitored: stack.Prometheus, tmp_path: Path):
    assert monitored.at is not None
    figure = render.image(render.Window(monitored.url, monitored.at, 60), "a test")
    drawn = [axes.get_title(loc="left") for axes in figure.axes]
    assert drawn[: len(PANELS) - len(GPU_PANELS)] == [panel.title for panel in PANELS if not panel.needs_gpu]
    figure.savefig(tmp_path / "dashboard.png")
