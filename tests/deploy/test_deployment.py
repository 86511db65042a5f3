"""What the pods are told: that probes, drain, security and devices fit the service and its image."""

from __future__ import annotations

import re

import pytest

from tests.deploy.files import ROOT, Yaml
from tests.deploy.test_chart import KEYS, OCI_IMAGE, PEER, QUEUE
from tests.deploy.tools import NAME, Helm, Objects

DOCKERFILE = (ROOT / "docker" / "service.Dockerfile").read_text()
OWN_END_S = 6  # in which the service ends after its drain: PERCEIVER_DRAIN_TIMEOUT_S in docs/reference.md
GPU: Yaml = {"gpu": {"enabled": True, "count": 2}}


@pytest.mark.parametrize("drain", [{}, {"preStopSeconds": 0}, {"delaySeconds": 600, "timeoutSeconds": 3600}])
def test_a_pod_is_killed_after_its_drain_and_not_within(helm: Helm, drain: Yaml):
    objects = helm.objects({"drain": drain})
    environment, lifecycle = objects.environment(), objects.container().get("lifecycle")
    pause = lifecycle["preStop"]["sleep"]["seconds"] if lifecycle else 0
    assert pause == drain.get("preStopSeconds", 5)
    whole = pause + int(environment["PERCEIVER_DRAIN_DELAY_S"]) + int(environment["PERCEIVER_DRAIN_TIMEOUT_S"])
    assert objects.pod()["terminationGracePeriodSeconds"] >= whole + OWN_END_S


def test_reference_still_says_how_long_the_end_takes():
    row = re.search(r"`PERCEIVER_DRAIN_TIMEOUT_S`.*", (ROOT / "docs" / "reference.md").read_text())
    assert row is not None
    assert "ends within six seconds more" in row[0]


def target_ports(objects: Objects) -> dict[str, set[str]]:
    """The ports of the pods behind each Service, whose own have the same names."""
    services = [one for one in objects if one["kind"] == "Service"]
    for port in (port for one in services for port in one["spec"]["ports"]):
        assert port["name"] == port["targetPort"]
    return {one["metadata"]["name"]: {port["name"] for port in one["spec"]["ports"]} for one in services}


def test_management_ports_are_inside_the_cluster_whatever_clients_have(helm: Helm):
    monitor = {"serviceMonitor": {"enabled": True}, "networkPolicy": {"enabled": True}}
    objects = helm.objects({"service": {"type": "LoadBalancer"}, "managementPort": 9000} | monitor)
    clients, management = (one for one in objects if one["kind"] == "Service")
    assert (clients["spec"]["type"], management["spec"]["type"]) == ("LoadBalancer", "ClusterIP")
    assert [port["name"] for port in clients["spec"]["ports"]] == ["http"]
    assert clients["spec"]["selector"] == management["spec"]["selector"]
    found = objects.one("ServiceMonitor")["spec"]["selector"]["matchLabels"]
    assert found.items() <= management["metadata"]["labels"].items()


@pytest.mark.parametrize(("port", "name"), [(None, "http"), (9000, "management")])
def test_probes_and_prometheus_ask_the_same_port(helm: Helm, port: int | None, name: str):
    objects = helm.objects({"managementPort": port, "serviceMonitor": {"enabled": True}})
    container = objects.container()
    probes = {kind: container[f"{kind}Probe"]["httpGet"] for kind in ("startup", "liveness", "readiness")}
    assert probes == {
        "startup": {"path": "/health/live", "port": name},
        "liveness": {"path": "/health/live", "port": name},
        "readiness": {"path": "/health/ready", "port": name},
    }
    (endpoint,) = objects.one("ServiceMonitor")["spec"]["endpoints"]
    assert (endpoint["port"], endpoint["path"]) == (name, "/metrics")
    ports = {one["name"]: one["containerPort"] for one in container["ports"]}
    assert ports == {"http": 8000} | ({"management": port} if port else {})
    assert target_ports(objects) == {NAME: {"http"}} | ({f"{NAME}-management": {"management"}} if port else {})
    assert objects.environment().get("PERCEIVER_MANAGEMENT_PORT") == (str(port) if port else None)


def test_each_worker_has_a_port_that_prometheus_and_the_readiness_probe_ask(helm: Helm):
    objects = helm.objects({"workers": 3, "managementPort": 9000, "serviceMonitor": {"enabled": True}})
    container = objects.container()
    ports = {"http": 8000, "management": 9000, "management-1": 9001, "management-2": 9002}
    assert {one["name"]: one["containerPort"] for one in container["ports"]} == ports
    assert target_ports(objects) == {NAME: {"http"}, f"{NAME}-management": set(ports) - {"http"}}
    relabelled = {one["port"]: one["relabelings"] for one in objects.one("ServiceMonitor")["spec"]["endpoints"]}
    instances = {
        port: [one["replacement"] for one in relabelings if one["targetLabel"] == "instance"]
        for port, relabelings in relabelled.items()
    }
    assert instances == {"management": ["$1:9000"], "management-1": ["$1:9001"], "management-2": ["$1:9002"]}
    command = container["readinessProbe"]["exec"]["command"]
    assert command == re.findall(
        r'"([^"]+)"', DOCKERFILE.partition("HEALTHCHECK")[2].partition("CMD [")[2].partition("]")[0]
    )
    assert container["livenessProbe"]["httpGet"] == {"path": "/health/live", "port": "management"}
    assert objects.environment()["PERCEIVER_WORKERS"] == "3"


def test_what_the_image_says_of_itself_is_what_the_chart_says(helm: Helm):
    objects = helm.objects()
    environment, pod = objects.environment(), objects.pod()
    of_image = dict(re.findall(r"(PERCEIVER_\w+)=(\S+)", DOCKERFILE))
    assert environment["PERCEIVER_MODEL_DIR"] == of_image["PERCEIVER_MODEL_DIR"]
    assert environment["PERCEIVER_PORT"] == of_image["PERCEIVER_PORT"]
    user = f"{pod['securityContext']['runAsUser']}:{pod['securityContext']['runAsGroup']}"
    assert f"USER {user}\n" in DOCKERFILE
    (writable,) = [one["mountPath"] for one in objects.container()["volumeMounts"] if not one.get("readOnly")]
    assert re.findall(r" HOME=(\S+)", DOCKERFILE) == [writable]


def both(objects: Objects) -> list[Yaml]:
    return [objects.pod(), objects.one("Pod")["spec"]]


@pytest.mark.parametrize("values", [{}, GPU, KEYS, OCI_IMAGE])
def test_pods_keep_to_the_restricted_pod_security_standard(helm: Helm, values: Yaml):
    """https://kubernetes.io/docs/concepts/security/pod-security-standards/, and what it leaves open."""
    for pod in both(helm.objects(values)):
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.keys()
        kinds = {kind for volume in pod.get("volumes", []) for kind in volume if kind != "name"}
        assert kinds <= {"emptyDir", "secret", "persistentVolumeClaim", "image"}
        (container,) = pod["containers"]
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
            "readOnlyRootFilesystem": True,
        }
        assert (pod["enableServiceLinks"], pod["automountServiceAccountToken"]) == (False, False)


def test_without_a_gpu_the_container_sees_none(helm: Helm):
    objects = helm.objects()
    environment = objects.environment()
    assert (environment["PERCEIVER_PROVIDER"], environment["NVIDIA_VISIBLE_DEVICES"]) == ("cpu", "void")
    assert "PERCEIVER_DEVICE_IDS" not in environment
    assert "tolerations" not in objects.pod()


def test_with_gpus_the_service_uses_what_the_pod_gets(helm: Helm):
    own = {"key": "dedicated", "operator": "Exists"}
    objects = helm.objects(GPU | {"tolerations": [own]})
    environment, container = objects.environment(), objects.container()
    assert (environment["PERCEIVER_PROVIDER"], environment["PERCEIVER_DEVICE_IDS"]) == ("cuda", "0,1")
    assert "NVIDIA_VISIBLE_DEVICES" not in environment  # the device plugin says which
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 2
    assert container["resources"]["limits"]["memory"] == "3Gi"
    assert objects.pod()["tolerations"] == [
        own,
        {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"},
    ]
    test = objects.one("Pod")["spec"]["containers"][0]
    assert {"name": "NVIDIA_VISIBLE_DEVICES", "value": "void"} in test["env"]  # and takes nobody's GPU


def test_settings_win_over_other_values(helm: Helm):
    environment = helm.objects(GPU | {"settings": {"provider": "tensorrt", "device_ids": [1]}}).environment()
    assert (environment["PERCEIVER_PROVIDER"], environment["PERCEIVER_DEVICE_IDS"]) == ("tensorrt", "1")


@pytest.mark.parametrize(
    ("model", "folder", "volume"),
    [
        ({}, "/models/perceiver-cifar100", None),
        (
            {"source": "pvc", "folder": "mine", "pvc": {"claimName": "models"}},
            "/models/mine",
            {"persistentVolumeClaim": {"claimName": "models", "readOnly": True}},
        ),
        (
            {"source": "ociImage", "folder": "", "ociImage": {"reference": "r/m@sha256:0"}},
            "/models",
            {"image": {"reference": "r/m@sha256:0", "pullPolicy": "IfNotPresent"}},
        ),
    ],
)
def test_the_model_is_where_the_service_looks(helm: Helm, model: Yaml, folder: str, volume: Yaml | None):
    objects = helm.objects({"model": model})
    assert objects.environment()["PERCEIVER_MODEL_DIR"] == folder
    mounts = {one["name"]: one for one in objects.container()["volumeMounts"]}
    volumes = {one["name"]: one for one in objects.pod()["volumes"]}
    if volume is None:
        assert "models" not in mounts | volumes
    else:
        assert mounts["models"] == {"name": "models", "mountPath": "/models", "readOnly": True}
        assert volumes["models"] == {"name": "models"} | volume


def test_keys_come_as_files_of_the_secret(helm: Helm):
    objects = helm.objects(KEYS)
    environment = objects.environment()
    assert environment["PERCEIVER_API_KEYS_FILE"] == "/etc/perceiver/keys/api-keys"
    assert environment["PERCEIVER_ADMIN_KEY_FILE"] == "/etc/perceiver/keys/admin-key"
    for pod in both(objects):
        (container,) = pod["containers"]
        assert {"name": "keys", "mountPath": "/etc/perceiver/keys", "readOnly": True} in container["volumeMounts"]
        # YAML's 0440; the group is podSecurityContext.fsGroup.
        assert {"name": "keys", "secret": {"secretName": "perceiver-keys", "defaultMode": 0o440}} in pod["volumes"]


def test_selectors_find_the_serving_pods_and_not_the_one_that_tests(helm: Helm):
    objects = helm.objects({"networkPolicy": {"enabled": True}})
    served = objects.one("Deployment")["spec"]["template"]["metadata"]["labels"]
    tests = objects.one("Pod")["metadata"]["labels"]
    selectors = [
        objects.one("Service")["spec"]["selector"],
        objects.one("Deployment")["spec"]["selector"]["matchLabels"],
        objects.one("PodDisruptionBudget")["spec"]["selector"]["matchLabels"],
        objects.one("NetworkPolicy")["spec"]["podSelector"]["matchLabels"],
        objects.pod()["topologySpreadConstraints"][0]["labelSelector"]["matchLabels"],
    ]
    for selector in selectors:
        assert selector.items() <= served.items()
        assert not selector.items() <= tests.items()


def test_labels_of_the_pods_do_not_change_with_the_chart(helm: Helm):
    """Else a new chart with the same image would replace every pod."""
    labels = helm.objects()
    served = labels.one("Deployment")["spec"]["template"]["metadata"]["labels"]
    assert set(served) == {f"app.kubernetes.io/{name}" for name in ("name", "instance", "component")}


def test_a_constraint_with_its_own_selector_keeps_it(helm: Helm):
    own = {"matchLabels": {"team": "vision"}}
    spread = {"topologyKey": "zone", "maxSkew": 1, "whenUnsatisfiable": "DoNotSchedule", "labelSelector": own}
    assert helm.objects({"topologySpreadConstraints": [spread]}).pod()["topologySpreadConstraints"] == [spread]


@pytest.mark.parametrize("values", [QUEUE, {"autoscaling": {"by": "cpu"}}])
def test_replicas_are_left_to_the_autoscaler(helm: Helm, values: Yaml):
    """Else every upgrade would set them back."""
    assert helm.objects().one("Deployment")["spec"]["replicas"] == 1
    assert "replicas" not in helm.objects(values).one("Deployment")["spec"]


def ingress(objects: Objects) -> dict[str, Yaml]:
    rules = objects.one("NetworkPolicy")["spec"]["ingress"]
    return {rule["ports"][0]["port"]: rule for rule in rules}


def test_network_policy_lets_nothing_out(helm: Helm):
    policy = helm.objects({"networkPolicy": {"enabled": True}}).one("NetworkPolicy")["spec"]
    assert policy["policyTypes"] == ["Ingress", "Egress"]
    assert policy["egress"] == []
    assert policy["ingress"] == [{"ports": [{"port": "http", "protocol": "TCP"}]}]


def test_network_policy_lets_in_who_is_listed_and_helm_test(helm: Helm):
    monitoring = {"podSelector": {"matchLabels": {"app": "prometheus"}}}
    policy = {"networkPolicy": {"enabled": True, "from": [PEER], "metricsFrom": [monitoring]}}
    apart = helm.objects(policy | {"managementPort": 9000})
    test = {"podSelector": {"matchLabels": apart.one("Pod")["metadata"]["labels"]}}
    test["podSelector"]["matchLabels"] = {
        name: value
        for name, value in test["podSelector"]["matchLabels"].items()
        if name in ("app.kubernetes.io/name", "app.kubernetes.io/instance", "app.kubernetes.io/component")
    }
    assert ingress(apart)["http"]["from"] == [PEER, test]
    assert ingress(apart)["management"]["from"] == [monitoring]
    together = helm.objects(policy)
    assert ingress(together)["http"]["from"] == [PEER, monitoring, test]


def test_names_follow_the_release(helm: Helm):
    assert helm.objects().one("Service")["metadata"]["name"] == NAME
    assert helm.objects({"fullnameOverride": "labels"}).one("Service")["metadata"]["name"] == "labels"
    assert helm.objects({"nameOverride": "vision"}).one("Service")["metadata"]["name"] == "cats-vision"
