"""Every switch of the chart, by helm and by the schemas of what it makes."""

from __future__ import annotations

from copy import deepcopy

import pytest
from jsonschema import ValidationError

from service.settings import Settings
from tests.deploy.files import CHART, VALUES, Yaml
from tests.deploy.schemas import CUSTOM, NEWEST, OLDEST, validate
from tests.deploy.tools import NAME, Helm

QUEUE: Yaml = {"autoscaling": {"by": "queue", "queue": {"serverAddress": "http://prometheus.monitoring:9090"}}}
KEYS: Yaml = {"keys": {"secretName": "perceiver-keys", "adminKey": "admin-key"}}
PEER: Yaml = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "shop"}}}

# What is always there, and what each case has beside that.
ALWAYS = {"Deployment", "Service", "PodDisruptionBudget", "Pod"}
CASES: dict[str, tuple[Yaml, set[str]]] = {
    "defaults": ({}, set()),
    "workers": ({"workers": "auto"}, set()),
    "management port": ({"managementPort": 9000}, set()),
    "workers with management ports": (
        {"workers": 3, "managementPort": 9000, "serviceMonitor": {"enabled": True}, "networkPolicy": {"enabled": True}},
        {"ServiceMonitor", "NetworkPolicy"},
    ),
    "settings": ({"settings": {"max_batch_size": 64, "precision": "float32", "device_ids": [0, 1]}}, set()),
    "extra environment": ({"extraEnv": [{"name": "OMP_NUM_THREADS", "value": "1"}]}, set()),
    "model in a volume": ({"model": {"source": "pvc", "folder": "", "pvc": {"claimName": "models"}}}, set()),
    "keys": (KEYS, set()),
    "GPU": ({"gpu": {"enabled": True, "count": 2, "runtimeClassName": "nvidia"}}, set()),
    "MIG": ({"gpu": {"enabled": True, "resource": "nvidia.com/mig-1g.10gb"}}, set()),
    "no pause before the drain": ({"drain": {"preStopSeconds": 0}}, set()),
    "another strategy": ({"strategy": {"rollingUpdate": {"maxSurge": 0, "maxUnavailable": 1}}}, set()),
    "scheduling": (
        {
            "nodeSelector": {"kubernetes.io/arch": "amd64"},
            "tolerations": [{"key": "dedicated", "operator": "Equal", "value": "vision", "effect": "NoSchedule"}],
            "affinity": {
                "podAntiAffinity": {
                    "preferredDuringSchedulingIgnoredDuringExecution": [
                        {"weight": 1, "podAffinityTerm": {"topologyKey": "topology.kubernetes.io/zone"}}
                    ]
                }
            },
            "topologySpreadConstraints": [
                {"topologyKey": "topology.kubernetes.io/zone", "maxSkew": 1, "whenUnsatisfiable": "DoNotSchedule"}
            ],
            "priorityClassName": "high",
        },
        set(),
    ),
    "labels and the like": (
        {
            "podAnnotations": {"sidecar.istio.io/inject": "false"},
            "podLabels": {"team": "vision"},
            "serviceAccountName": "perceiver",
            "imagePullSecrets": [{"name": "registry"}],
            "service": {"type": "LoadBalancer", "annotations": {"example.org/internal": "true"}},
        },
        set(),
    ),
    "no user of its own, as OpenShift wants it": (
        {"podSecurityContext": {"runAsUser": None, "runAsGroup": None, "fsGroup": None}},
        set(),
    ),
    "HPA": ({"autoscaling": {"by": "cpu"}}, {"HorizontalPodAutoscaler"}),
    "KEDA": (QUEUE, {"ScaledObject"}),
    "KEDA with all": (
        {
            "autoscaling": {
                "by": "queue",
                "queue": {
                    "serverAddress": "https://thanos.example.org",
                    "fallback": {"failureThreshold": 4, "replicas": 4, "behavior": "currentReplicasIfHigher"},
                    "authenticationRef": "thanos",
                    "query": "sum(other_metric)",
                },
            }
        },
        {"ScaledObject"},
    ),
    "no disruption budget": ({"podDisruptionBudget": {"enabled": False}}, set()),
    "service monitor": ({"serviceMonitor": {"enabled": True, "labels": {"release": "kps"}}}, {"ServiceMonitor"}),
    "alarms": ({"prometheusRule": {"enabled": True, "labels": {"release": "kps"}}}, {"PrometheusRule"}),
    "dashboard": ({"dashboard": {"enabled": True, "annotations": {"grafana_folder": "Vision"}}}, {"ConfigMap"}),
    "network policy": ({"networkPolicy": {"enabled": True}}, {"NetworkPolicy"}),
    "network policy with peers": (
        {"networkPolicy": {"enabled": True, "from": [PEER], "metricsFrom": [PEER]}, "managementPort": 9000},
        {"NetworkPolicy"},
    ),
    "all at once": (
        KEYS
        | QUEUE
        | {
            "workers": 2,
            "managementPort": 9000,
            "model": {"source": "pvc", "pvc": {"claimName": "models"}, "version": 3},
            "gpu": {"enabled": True},
            "serviceMonitor": {"enabled": True},
            "prometheusRule": {"enabled": True},
            "dashboard": {"enabled": True},
            "networkPolicy": {"enabled": True, "from": [PEER]},
        },
        {"ScaledObject", "ServiceMonitor", "PrometheusRule", "ConfigMap", "NetworkPolicy"},
    ),
}
OCI_IMAGE: Yaml = {"model": {"source": "ociImage", "folder": "", "ociImage": {"reference": "registry.example.org/m:9"}}}


@pytest.mark.parametrize("kubernetes", [OLDEST, NEWEST])
@pytest.mark.parametrize("case", CASES)
def test_what_the_chart_makes_is_as_kubernetes_wants_it(helm: Helm, case: str, kubernetes: str):
    values, beside = CASES[case]
    objects = helm.objects(values, kubernetes=kubernetes)
    for one in objects:
        validate(one, kubernetes)
    kinds = ALWAYS - ({"PodDisruptionBudget"} if case == "no disruption budget" else set()) | beside
    assert objects.kinds() == dict.fromkeys(kinds, 1) | {"Service": 2 if "managementPort" in values else 1}
    # A misspelt variable would stop the start.
    variables = objects.environment()
    settings = {name.removeprefix("PERCEIVER_").lower() for name in variables if name.startswith("PERCEIVER_")}
    assert {"model_dir", "drain_delay_s", "provider"} <= settings <= set(Settings.model_fields)


def test_a_model_in_an_image_of_its_own(helm: Helm):
    for kubernetes in ("1.33", NEWEST):
        for one in helm.objects(OCI_IMAGE, kubernetes=kubernetes):
            validate(one, kubernetes)
    assert "needs Kubernetes 1.33 or newer; this is v1.32" in helm.refusal(OCI_IMAGE, kubernetes="1.32")


def test_a_cluster_that_is_too_old_is_refused(helm: Helm):
    assert "requires kubeVersion: >=1.30.0-0" in helm.refusal({}, kubernetes="1.29")


def test_helm_has_nothing_to_say(helm: Helm):
    run = helm.run("lint", "--strict", "--quiet", CHART)
    assert (run.returncode, run.stdout + run.stderr) == (0, "")


def test_every_optional_piece_is_in_a_case():
    """Else the cases would not follow when a switch is added."""
    switches = {name for name, value in VALUES.items() if isinstance(value, dict) and "enabled" in value}
    used = {
        name
        for values, _ in CASES.values()
        for name, value in values.items()
        if isinstance(value, dict) and "enabled" in value
    }
    assert switches == used


def test_all_objects_of_a_release_are_told_apart_and_found(helm: Helm):
    objects = helm.objects(CASES["all at once"][0])
    names = [(one["kind"], one["metadata"]["name"]) for one in objects]
    assert len(set(names)) == len(names)
    for one in objects:
        assert one["metadata"]["name"].startswith(NAME)
        assert one["metadata"]["labels"]["app.kubernetes.io/instance"] == "cats"


def test_schemas_of_custom_resources_refuse(helm: Helm):
    """They are data of the tests: each must notice a field that it does not know, and one that is missing."""
    objects = helm.objects(CASES["all at once"][0])
    for one in objects:
        if one["kind"] in CUSTOM:
            wrong = deepcopy(one)
            wrong["spec"]["misspelt"] = 1
            with pytest.raises(ValidationError, match="'misspelt' was unexpected"):
                validate(wrong)
            del wrong["spec"]
            with pytest.raises(ValidationError, match="'spec' is a required property"):
                validate(wrong)
