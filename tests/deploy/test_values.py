"""The values: what is wrong is refused with a sentence that names it, what is right reaches the service as meant."""

from __future__ import annotations

import importlib.util
import json
import re
import tomllib
from collections.abc import Iterator
from types import ModuleType

import pytest
import yaml

from service.settings import Settings
from tests.deploy.files import CHART, DEPLOY, ROOT, VALUES, Yaml
from tests.deploy.tools import Helm

SCHEMA: Yaml = json.loads((CHART / "values.schema.json").read_text())


def write_files() -> ModuleType:
    """The script, which is in no package."""
    spec = importlib.util.spec_from_file_location("write_files", DEPLOY / "helm" / "write_files.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.smoke
def test_files_are_what_their_sources_say():
    written = write_files().files()
    for path, text in written.items():
        assert path.read_text() == text, f"run python deploy/helm/write_files.py: {path.name} is not what it writes"
    copies = {path for folder in ("rules", "dashboards") for path in (CHART / "files" / folder).iterdir()}
    assert copies == {path for path in written if path.parent != CHART}


def test_the_chart_is_of_the_projects_version():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert yaml.safe_load((CHART / "Chart.yaml").read_text())["appVersion"] == project["version"]


def closed(schema: Yaml, path: str = "") -> Iterator[str]:
    """The places at which a schema takes names that it does not list."""
    if schema.get("type") == "object" and schema.get("additionalProperties") is not False:
        yield path
    for name, one in schema.get("properties", {}).items():
        yield from closed(one, f"{path}.{name}".lstrip("."))


def test_a_name_that_is_not_listed_is_taken_nowhere_but_where_users_name_things():
    """Labels, annotations and Helm's own `global`."""
    assert set(closed(SCHEMA)) == {
        *("podAnnotations", "podLabels", "nodeSelector", "service.annotations", "global"),
        *("serviceMonitor.labels", "prometheusRule.labels", "dashboard.labels", "dashboard.annotations"),
    }


def test_schema_lists_what_the_values_list():
    def names(values: Yaml, schema: Yaml, path: str = "") -> Iterator[str]:
        listed = schema.get("properties")
        if listed is None or path in ("settings", "autoscaling.queue.fallback"):  # empty by default
            return
        assert set(values) == set(listed) - {"global"}, path
        for name, value in values.items():
            if isinstance(value, dict):
                yield from names(value, listed[name], f"{path}.{name}".lstrip("."))

    list(names(VALUES, SCHEMA))


REFUSED: dict[str, tuple[Yaml, str]] = {
    "a misspelt name at the top": ({"replicas": 3}, "additional properties 'replicas' not allowed"),
    "a misspelt name below": ({"image": {"tagg": "1"}}, "at '/image': additional properties 'tagg' not allowed"),
    "a misspelt setting": (
        {"settings": {"max_batch": 8}},
        "at '/settings': additional properties 'max_batch' not allowed",
    ),
    "a setting out of bounds": ({"settings": {"max_batch_size": 0}}, "at '/settings/max_batch_size': minimum: got 0"),
    "a setting of another type": ({"settings": {"cuda_graphs": "yes"}}, "at '/settings/cuda_graphs': got string"),
    "a setting with its own value": (
        {"settings": {"drain_timeout_s": 5}},
        "at '/settings': additional properties 'drain_timeout_s' not allowed",
    ),
    "a misspelt field of Kubernetes": (
        {"tolerations": [{"key": "gpu", "efect": "NoSchedule"}]},
        "at '/tolerations/0': additional properties 'efect' not allowed",
    ),
    "a misspelt field deep in Kubernetes": (
        {"affinity": {"nodeAffinity": {"required": {}}}},
        "at '/affinity/nodeAffinity': additional properties 'required' not allowed",
    ),
    "a source that there is not": (
        {"model": {"source": "s3"}},
        "at '/model/source': value must be one of 'image', 'pvc', 'ociImage'",
    ),
    "a folder that is a path": ({"model": {"folder": "a/b"}}, "at '/model/folder': 'a/b' does not match pattern"),
    "a volume without a name": ({"model": {"source": "pvc"}}, "model.pvc.claimName must name a PersistentVolumeClaim"),
    "an image without a name": ({"model": {"source": "ociImage"}}, "model.ociImage.reference must name an image"),
    "queue without Prometheus": (
        {"autoscaling": {"by": "queue"}},
        "autoscaling.queue.serverAddress must be the URL of Prometheus",
    ),
    "a threshold above the whole queue": (
        {"autoscaling": {"queue": {"threshold": 64}}},
        "at '/autoscaling/queue/threshold': maximum: got 64, want 1",
    ),
    "no pod at all": ({"autoscaling": {"minReplicas": 0}}, "at '/autoscaling/minReplicas': minimum: got 0, want 1"),
    "more at least than at most": (
        {"autoscaling": {"minReplicas": 5}},
        "autoscaling.minReplicas is larger than autoscaling.maxReplicas",
    ),
    "CPU use of nothing": (
        {"autoscaling": {"by": "cpu"}, "resources": {"requests": {"cpu": None}, "limits": {"cpu": None}}},
        "a percentage of resources.requests.cpu: set that",
    ),
    "one port for both": ({"managementPort": 8000}, "port 8000, which clients use, is among those that workers take"),
    "one port for the second worker": (
        {"managementPort": 7999, "workers": 2},
        "port 8000, which clients use, is among those that workers take from managementPort on",
    ),
    "one port of the Service for both": ({"managementPort": 80}, "port 80, which clients use"),
    "so many ports that nobody knows": ({"managementPort": 9000, "workers": "auto"}, "give workers a number"),
    "metrics of several workers on one port": (
        {"workers": 2, "serviceMonitor": {"enabled": True}},
        "which only management ports tell apart: set managementPort",
    ),
    "queues of several workers on one port": (
        {"workers": "auto", "autoscaling": {"by": "queue", "queue": {"serverAddress": "http://prometheus:9090"}}},
        "which only management ports tell apart: set managementPort",
    ),
    "an alarm that there is not": (
        {"prometheusRule": {"disabled": ["PerceiverUp"]}},
        "at '/prometheusRule/disabled/0': value must be one of 'PerceiverDown'",
    ),
    "workers in words": ({"workers": "many"}, "at '/workers': value must be 'auto'"),
    "no GPU": ({"gpu": {"enabled": True, "count": 0}}, "at '/gpu/count': minimum: got 0, want 1"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_wrong_is_refused_by_its_name(helm: Helm, case: str):
    values, sentence = REFUSED[case]
    assert sentence in helm.refusal(values)


def test_settings_arrive_as_text_that_the_service_reads(helm: Helm, monkeypatch: pytest.MonkeyPatch):
    given = {
        "max_queue_bytes": 1_073_741_824,  # which YAML's way through floats would make 1.073741824e+09
        "model_poll_s": 0.5,
        "cuda_graphs": False,
        "device_ids": [1, 3],
        "cors_origins": "https://a.example.org, https://b.example.org",
        "precision": "float32",
        "max_queue_delay_ms": 0,
    }
    environment = helm.objects({"settings": given}).environment()
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    settings = Settings()
    assert {name: getattr(settings, name) for name in given} == given | {
        "device_ids": (1, 3),
        "cors_origins": ("https://a.example.org", "https://b.example.org"),
    }


def test_values_that_the_docs_name_are_there():
    named = re.findall(r"`([a-z]\w+)\.([\w.]+)(?:: [^`]*)?`", (ROOT / "docs" / "kubernetes.md").read_text())
    paths = [[first, *rest.split(".")] for first, rest in named if first in VALUES]
    assert len(paths) > 20
    for path in paths:
        schema = SCHEMA
        for name in path:
            if "$ref" in schema:  # a type of Kubernetes
                break
            assert name in schema["properties"], ".".join(path)
            schema = schema["properties"][name]
