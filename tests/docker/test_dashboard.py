"""The dashboard: what is in the repository is what the generator makes, and every panel says what it is about."""

import json
import re
from itertools import combinations

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from service.metrics.registry import OWN_ERRORS, Metrics
from tests.docker.files import DOCKER, Yaml, rules

import dashboard  # isort: skip - files.py has put its folder on the path

PANELS = [panel for row in dashboard.ROWS for panel in row.panels]
TITLES = [panel.title for panel in PANELS]
JSON: Yaml = dashboard.dashboard()

# Of NVIDIA's exporter and of Prometheus itself.
FOREIGN = {"DCGM_FI_DEV_GPU_TEMP", "DCGM_FI_DEV_POWER_USAGE", "DCGM_FI_DEV_XID_ERRORS", "ALERTS", "up"} | {
    "prometheus_config_last_reload_successful",
    "prometheus_rule_evaluation_failures_total",
    "prometheus_notifications_errors_total",
}
GPU = {
    "perceiver_gpu_up",
    "perceiver_gpu_memory_used_bytes",
    "perceiver_gpu_memory_total_bytes",
    "perceiver_gpu_utilization_ratio",
}


def names(expression: str) -> set[str]:
    """The metrics in a query: what stands before { or [ or offset or at an operator, and is no function or label."""
    bare = re.sub(r'"[^"]*"', "", expression)
    bare = re.sub(r"\{[^}]*\}|\[[^]]*\]", " ", bare)
    bare = re.sub(r"\b(by|on|group_left|without)\s*\([^)]*\)", " ", bare)
    words = re.findall(r"[a-zA-Z_:][\w:]*\b(?!\s*\()", bare)
    return {word for word in words if word not in {"or", "unless", "and", "offset", "bool", "m"}}


def exposed() -> set[str]:
    """Names of all series that a service exposes, those with labels that no request has made yet too."""
    metrics = Metrics()
    metrics.request("/predict", 200)
    metrics.rejected("overloaded")
    metrics.model_info.labels("tiny", 1, "cpu", "float32").set(1)
    body, _ = metrics.exposition("")
    families = text_string_to_metric_families(body.decode())
    return {sample.name for family in families for sample in family.samples}


def test_the_panel_of_errors_names_those_that_are_the_service_s():
    (panel,) = (panel for panel in PANELS if panel.title == "Error answers by reason")
    own = panel.bad.partition(": the service's")[0].split(", ")
    assert own == [error.code for error in OWN_ERRORS]


QUERIES = [query.expr for panel in PANELS for query in panel.queries] + [
    annotation["expr"] for annotation in JSON["annotations"]["list"]
]


@pytest.mark.smoke
def test_file_is_what_the_generator_makes():
    assert dashboard.TARGET.read_text() == dashboard.text(), "run python docker/grafana/dashboard.py"


def test_panels_have_places_of_their_own():
    panels = JSON["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells = [
        {(x, y) for x in range(p["x"], p["x"] + p["w"]) for y in range(p["y"], p["y"] + p["h"])}
        for p in (panel["gridPos"] for panel in panels)
    ]
    assert all(x < dashboard.COLUMNS for cell in cells for x, _ in cell)
    assert not any(a & b for a, b in combinations(cells, 2))


@pytest.mark.parametrize("panel", PANELS, ids=TITLES)
def test_panel_says_its_unit_what_is_bad_and_what_to_do(panel):
    made = dashboard.panel(panel)
    assert made["fieldConfig"]["defaults"]["unit"] == panel.unit != ""
    for text in (panel.shows, panel.bad, panel.do):
        assert text.endswith(".")
        assert text in made["description"]
    assert {*panel.dashed} <= {query.legend for query in panel.queries}
    assert panel.kind != "heatmap" or len(panel.queries) == 1


def test_titles_are_unique():
    assert len(set(TITLES)) == len(TITLES)


def test_every_metric_that_is_asked_for_exists():
    recorded = {rule["record"] for rule in rules() if "record" in rule}
    there = exposed() | recorded | FOREIGN | GPU
    asked = {name for expression in QUERIES + [rule["expr"] for rule in rules()] for name in names(expression)}
    assert asked <= there


def test_every_metric_of_the_service_is_on_the_dashboard_or_in_a_rule():
    asked = {name for expression in QUERIES + [rule["expr"] for rule in rules()] for name in names(expression)}
    families = {re.sub(r"_(bucket|sum|count|total|created)$", "", name) for name in exposed() | GPU}
    seen = {re.sub(r"_(bucket|sum|count|total|created)$", "", name) for name in asked}
    assert {name for name in families if name.startswith("perceiver_")} <= seen


def test_red_begins_at_the_objective():
    values = {rule["record"]: rule["expr"] for rule in rules() if "record" in rule}
    objectives = {"Errors": "errors:ratio", "Turned away": "rejections:ratio", "p99": "p99:seconds"}
    for title, objective in objectives.items():
        (panel,) = [panel for panel in PANELS if panel.title == title]
        assert values[f"perceiver:objective_{objective}"] == f"vector({panel.thresholds[1]:g})"


def test_data_source_is_the_one_that_is_provisioned():
    path = DOCKER / "grafana" / "provisioning" / "datasources" / "prometheus.yml"
    (source,) = yaml.safe_load(path.read_text())["datasources"]
    assert {"type": source["type"], "uid": source["uid"]} == dashboard.DATASOURCE
    used = re.findall(r'"uid": "(\w+)"', json.dumps(JSON))
    assert set(used) == {source["uid"], JSON["uid"]}


def test_descriptions_name_runbooks_that_exist():
    told = re.findall(
        r"Perceiver[A-Z]\w+", json.dumps([panel["description"] for panel in JSON["panels"] if "targets" in panel])
    )
    assert set(told) <= {rule.get("alert") for rule in rules()}
