"""Alarms and dashboard on a cluster: the same as with Compose, and about the pods that the ServiceMonitor reads."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from tests.deploy import queue_share
from tests.deploy.files import ROOT, VALUES, Yaml
from tests.deploy.promtool import expect, needs_promtool, promtool
from tests.deploy.tools import NAME, NAMESPACE, Helm

DOCKER = ROOT / "docker"
UNIT_TESTS = DOCKER / "prometheus" / "tests" / "alerts.yml"
RULES = sorted((DOCKER / "prometheus" / "rules").glob("*.yml"))
REFERENCE = (ROOT / "docs" / "reference.md").read_text()


def groups(helm: Helm, **values: object) -> list[Yaml]:
    rule = helm.objects({"prometheusRule": {"enabled": True} | values}).one("PrometheusRule")
    found: list[Yaml] = rule["spec"]["groups"]
    return found


def rules(groups: list[Yaml]) -> list[Yaml]:
    return [rule for group in groups for rule in group["rules"]]


def test_alarms_are_those_of_docker(helm: Helm):
    shipped = [group for path in RULES for group in yaml.safe_load(path.read_text())["groups"]]
    assert groups(helm, disabled=[], runbookUrlPrefix="https://there/") == json.loads(
        json.dumps(shipped).replace("{{ $externalURL }}/user/", "https://there/")
    )


def test_alarms_that_are_not_about_these_pods_are_left_out(helm: Helm):
    names = {rule.get("alert") for rule in rules(groups(helm))}
    everything = {rule.get("alert") for rule in rules(groups(helm, disabled=[]))}
    assert everything - names == set(VALUES["prometheusRule"]["disabled"])
    assert "perceiver-monitoring" not in [group["name"] for group in groups(helm)]  # nothing of it is left


@needs_promtool
@pytest.mark.parametrize("values", [{}, {"disabled": []}, {"objectives": {"p99Seconds": 1, "errorRatio": 0.001}}])
def test_promtool_has_nothing_to_say(helm: Helm, values: Yaml, tmp_path: Path):
    (tmp_path / "rules.yml").write_text(yaml.safe_dump({"groups": groups(helm, **values)}))
    promtool("check", "rules", "--lint=all", "--lint-fatal", tmp_path / "rules.yml")


@needs_promtool
def test_alarms_go_off_and_stay_silent_as_they_do_with_compose(helm: Helm, tmp_path: Path):
    """The unit tests of docker/prometheus, on what the chart makes of its rules."""
    found = groups(helm, disabled=[], runbookUrlPrefix="http://prometheus:9090/user/")
    (tmp_path / "rules.yml").write_text(yaml.safe_dump({"groups": found}))
    tests: Yaml = yaml.safe_load(UNIT_TESTS.read_text())
    (tmp_path / "tests.yml").write_text(yaml.safe_dump(tests | {"rule_files": ["rules.yml"]}))
    promtool("test", "rules", tmp_path / "tests.yml")


@needs_promtool
def test_objectives_are_those_of_the_values(helm: Helm, tmp_path: Path):
    given = {"p99Seconds": 1.5, "errorRatio": 0.001, "rejectionRatio": 0.2}
    queries = {rule["record"]: rule["expr"] for rule in rules(groups(helm, objectives=given)) if "record" in rule}
    for name, value in (("p99:seconds", 1.5), ("errors:ratio", 0.001), ("rejections:ratio", 0.2)):
        expect(tmp_path, queries[f"perceiver:objective_{name}"], {}, {"0s": value})


def test_objectives_by_default_are_those_of_docker(helm: Helm):
    objectives = VALUES["prometheusRule"]["objectives"]
    queries = {
        rule.get("record"): rule["expr"] for path in RULES for rule in rules(yaml.safe_load(path.read_text())["groups"])
    }
    assert queries["perceiver:objective_p99:seconds"] == f"vector({objectives['p99Seconds']})"
    assert queries["perceiver:objective_errors:ratio"] == f"vector({objectives['errorRatio']})"
    assert queries["perceiver:objective_rejections:ratio"] == f"vector({objectives['rejectionRatio']})"


def test_runbooks_lead_to_where_the_repository_is(helm: Helm):
    prefix = "https://git.example.org/perceiver/blob/main/"
    for rule in rules(groups(helm, runbookUrlPrefix=prefix)):
        if "alert" in rule:
            assert rule["annotations"]["runbook_url"] == f"{prefix}docs/operations.md#{rule['alert'].lower()}"


def test_a_runbook_that_leads_nowhere_is_left_out(helm: Helm):
    assert not any("runbook_url" in rule.get("annotations", {}) for rule in rules(groups(helm)))


def test_the_monitor_gives_the_pods_the_job_that_the_alarms_ask_for(helm: Helm):
    monitor = helm.objects({"serviceMonitor": {"enabled": True}, "nameOverride": "other"}).one("ServiceMonitor")
    (endpoint,) = monitor["spec"]["endpoints"]
    (job,) = [one["replacement"] for one in endpoint["relabelings"] if one["targetLabel"] == "job"]
    asked = set(re.findall(r'job="(\w+)"', "".join(path.read_text() for path in RULES))) - {"dcgm"}
    assert asked == {job}


def test_the_monitor_finds_the_service(helm: Helm):
    objects = helm.objects({"serviceMonitor": {"enabled": True, "labels": {"release": "kps"}}})
    monitor, service = objects.one("ServiceMonitor"), objects.one("Service")
    assert monitor["spec"]["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
    assert monitor["metadata"]["labels"]["release"] == "kps"


def test_the_dashboard_is_that_of_docker_with_the_label_of_grafanas_sidecar(helm: Helm):
    config = helm.objects({"dashboard": {"enabled": True}}).one("ConfigMap")
    assert config["metadata"]["labels"]["grafana_dashboard"] == "1"
    shipped = (DOCKER / "grafana" / "dashboards" / "perceiver.json").read_text()
    assert json.loads(config["data"]["perceiver.json"]) == json.loads(shipped)


QUEUE: Yaml = {"by": "queue", "queue": {"serverAddress": "http://prometheus.monitoring:9090"}}


def trigger(helm: Helm, **queue: object) -> Yaml:
    values = QUEUE | {"queue": QUEUE["queue"] | queue}
    (found,) = helm.objects({"autoscaling": values}).one("ScaledObject")["spec"]["triggers"]
    assert isinstance(found, dict)
    return found


def pod(name: str, service: str = NAME, namespace: str = NAMESPACE, instance: str = "") -> str:
    """The labels that the Prometheus operator, and the ServiceMonitor, give the metrics of a pod."""
    instance = instance or name
    return f'{{namespace="{namespace}", service="{service}", pod="{name}", instance="{instance}", job="perceiver"}}'


def queue(
    name: str, *, admitted: str, background: str = "0x60", largest: str = "512x60", **where: str
) -> dict[str, str]:
    """The series of a pod's queue, in promtool's notation."""
    labels = pod(name, **where)
    return {
        f"perceiver_admitted_images{labels}": admitted,
        f"perceiver_admitted_background_images{labels}": background,
        f"perceiver_max_queue_size{labels}": largest,
    }


def test_the_queues_metrics_are_those_that_the_service_has(helm: Helm):
    metrics = set(re.findall(r"perceiver_\w+", trigger(helm)["metadata"]["query"]))
    assert len(metrics) == 3
    for metric in metrics:
        assert f"| `{metric}` | gauge |" in REFERENCE


@needs_promtool
def test_pods_wanted_are_the_shares_of_all_queues_by_the_threshold(helm: Helm, tmp_path: Path):
    """KEDA divides what the query gives by the threshold, and rounds up: AverageValue."""
    found = trigger(helm, threshold=0.125)
    assert (found["metricType"], found["metadata"]["threshold"]) == ("AverageValue", "0.125")
    assert found["metadata"]["ignoreNullValues"] == "false"
    series = {
        # 64 of 512 is the threshold itself, one pod: b goes from empty to full after 5 minutes.
        **queue("a", admitted="64x60"),
        **queue("b", admitted="0x29 512x30"),
        # Of other releases, which must not count.
        **queue("c", service="dogs-perceiver", admitted="512x60"),
        **queue("d", namespace="other", admitted="512x60"),
    }
    expect(tmp_path, found["metadata"]["query"], series, {"4m": 0.125, "8m": 1.125})


@needs_promtool
def test_workers_of_one_pod_count_as_one(helm: Helm, tmp_path: Path):
    """Half of a pod's queues is taken where one of its two is full."""
    series = {
        **queue("a", instance="a:9000", service=f"{NAME}-management", admitted="512x60"),
        **queue("a", instance="a:9001", service=f"{NAME}-management", admitted="0x60"),
    }
    values = {"workers": 2, "managementPort": 9000, "autoscaling": QUEUE}
    (found,) = helm.objects(values).one("ScaledObject")["spec"]["triggers"]
    expect(tmp_path, found["metadata"]["query"], series, {"4m": 0.5})


@needs_promtool
def test_a_burst_counts_by_its_share_of_the_window(helm: Helm, tmp_path: Path):
    series = queue("a", admitted="0x20 512x2 0x20")
    # Of the readings within 45 s, so many were full.
    query = trigger(helm, window="45s")["metadata"]["query"]
    expect(tmp_path, query, series, {"3m20s": 0, "3m50s": 0.6, "5m": 0})


@needs_promtool
def test_pods_that_prometheus_has_lost_give_nothing_and_not_zero(helm: Helm, tmp_path: Path):
    """So that ignoreNullValues can tell the two apart, and KEDA leaves the pods as they are."""
    series = queue("a", admitted="512x12 stale", background="0x12 stale", largest="512x12 stale")
    expect(tmp_path, trigger(helm)["metadata"]["query"], series, {"2m": 1, "3m": None})


@needs_promtool
def test_explanations_ask_for_no_pods(helm: Helm, tmp_path: Path):
    """They take what others leave: 64 images wait beside them after 5 minutes, and these alone count."""
    series = queue("a", admitted="256x29 320x30", background="256x60")
    expect(tmp_path, trigger(helm)["metadata"]["query"], series, {"4m": 0, "8m": 0.125})


def test_a_query_of_ones_own_is_taken_as_it_is(helm: Helm):
    query = 'sum(my:queue_share{cluster="a"})'
    assert trigger(helm, query=query)["metadata"]["query"] == query


def test_the_table_of_loads_can_be_made_again(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr("sys.argv", ["queue_share", "--settling", "0.5", "--seconds", "1", "--loads", "0.5"])
    queue_share.main()
    share = float(capsys.readouterr().out.splitlines()[-1].split("|")[4])
    assert 0 < share < 1


def test_an_autoscaler_scales_the_deployment(helm: Helm):
    deployment = {"apiVersion": "apps/v1", "kind": "Deployment", "name": NAME}
    assert helm.objects().one("Deployment")["metadata"]["name"] == NAME
    assert helm.objects({"autoscaling": QUEUE}).one("ScaledObject")["spec"]["scaleTargetRef"] == deployment
    hpa = helm.objects({"autoscaling": {"by": "cpu"}}).one("HorizontalPodAutoscaler")["spec"]
    assert hpa["scaleTargetRef"] == deployment
    assert (hpa["minReplicas"], hpa["maxReplicas"]) == (1, 4)
