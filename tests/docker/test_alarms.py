"""Scrape configuration, rules and alarms, by Prometheus' own tool; and the runbooks that they point to."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.docker.files import DOCKER, ROOT, RULES, Yaml, alerts
from tests.docker.stack import fill

import request_panels  # isort: skip - files.py has put its folder on the path

PROMETHEUS = DOCKER / "prometheus"
UNIT_TESTS = PROMETHEUS / "tests" / "alerts.yml"
NAMES = [alert["alert"] for alert in alerts()]

needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="promtool is not installed; it is in Debian's package prometheus"
)


def promtool(*arguments: object) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(["promtool", *map(str, arguments)], capture_output=True, text=True)


@needs_promtool
def test_configuration():
    run = promtool("check", "config", PROMETHEUS / "prometheus.yml")
    assert run.returncode == 0, run.stderr


@needs_promtool
def test_rules():
    run = promtool("check", "rules", "--lint=all", "--lint-fatal", *RULES)
    assert run.returncode == 0, run.stderr


@needs_promtool
def test_alarms_go_off_and_stay_silent():
    run = promtool("test", "rules", UNIT_TESTS)
    assert run.returncode == 0, run.stdout + run.stderr


def mutated(folder: Path, name: str, **changes: object) -> Path:
    """The unit tests of one alarm, over rules in which it is changed."""
    for path in RULES:
        document = yaml.load(path.read_text(), yaml.CSafeLoader)
        for rule in (rule for group in document["groups"] for rule in group["rules"]):
            if rule.get("alert") == name:
                rule.update(changes)
        (folder / path.name).write_text(yaml.dump(document, Dumper=yaml.CSafeDumper))
    tests: Yaml = yaml.load(UNIT_TESTS.read_text(), yaml.CSafeLoader)
    tests["rule_files"] = [path.name for path in RULES]
    tests["tests"] = [
        test for test in tests["tests"] if any(case["alertname"] == name for case in test["alert_rule_test"])
    ]
    (folder / "tests.yml").write_text(yaml.dump(tests, Dumper=yaml.CSafeDumper))
    return folder / "tests.yml"


@needs_promtool
@pytest.mark.parametrize("name", NAMES)
def test_unit_tests_notice_an_alarm_that_never_goes_off(name: str, tmp_path: Path):
    run = promtool("test", "rules", mutated(tmp_path, name, expr="vector(0) > 1"))
    assert f"alertname: {name}" in run.stdout + run.stderr
    assert run.returncode != 0


@needs_promtool
@pytest.mark.parametrize("name", NAMES)
def test_unit_tests_notice_an_alarm_that_always_goes_off(name: str, tmp_path: Path):
    run = promtool("test", "rules", mutated(tmp_path, name, expr="vector(1)", **{"for": "0s"}))
    assert f"alertname: {name}" in run.stdout + run.stderr
    assert run.returncode != 0


@needs_promtool
@pytest.mark.parametrize(("others", "ready"), [({}, 1), ({"up": 0}, 0), ({"up": 1, "perceiver_ready": 0}, 0)])
def test_panel_ready_tells_of_the_worst_instance(others: dict[str, int], ready: int, tmp_path: Path):
    """Beside one that is ready: none, one that is down and so tells nothing, one that loads."""
    (panel,) = [panel for panel in request_panels.NOW if panel.title == "Ready"]
    both = {"a": {"up": 1, "perceiver_ready": 1}, "b": others}
    series = [
        {"series": f'{name}{{job="perceiver", instance="{instance}"}}', "values": str(value)}
        for instance, values in both.items()
        for name, value in values.items()
    ]
    asked = {"expr": fill(panel.queries[0].expr), "eval_time": "0m", "exp_samples": [{"labels": "{}", "value": ready}]}
    test = {"tests": [{"interval": "10s", "input_series": series, "promql_expr_test": [asked]}]}
    (tmp_path / "tests.yml").write_text(yaml.safe_dump(test))
    run = promtool("test", "rules", tmp_path / "tests.yml")
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.parametrize("alert", alerts(), ids=NAMES)
def test_every_alarm_says_how_urgent_it_is_and_what_to_do(alert: Yaml):
    assert alert["labels"]["severity"] in ("critical", "warning")
    assert set(alert["annotations"]) == {"summary", "description", "runbook_url"}
    url, _, anchor = alert["annotations"]["runbook_url"].partition("#")
    assert anchor == alert["alert"].lower()
    base = "{{ $externalURL }}/user/"
    assert url.startswith(base)
    headings = re.findall(r"^#+ (.*)$", (ROOT / url.removeprefix(base)).read_text(), re.MULTILINE)
    assert alert["alert"] in headings


def test_every_runbook_has_its_alarm():
    runbooks = re.findall(r"^#+ (Perceiver\w+)$", (ROOT / "docs" / "operations.md").read_text(), re.MULTILINE)
    assert sorted(runbooks) == sorted(NAMES)
