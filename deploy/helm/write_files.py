"""Write the chart's files that others decide: python deploy/helm/write_files.py, in the environment of `make test`.

A chart reads files of its own folder alone, so the alarms and the dashboard lie there once more, byte for byte.
`values.schema.json` is made from the schema below, from `service.settings` and from Kubernetes' own schemas; a test
holds all of them to their sources.
"""

import json
from importlib import resources
from pathlib import Path
from typing import Any

from service.settings import Settings

Json = dict[str, Any]

ROOT = Path(__file__).parents[2]
CHART = Path(__file__).parent / "perceiver"
DOCKER = ROOT / "docker"

# Settings that other values decide, or that would break the probes.
DECIDED = {
    *("model_dir", "model_version", "port", "management_port", "workers", "drain_delay_s", "drain_timeout_s"),
    *("api_keys", "api_keys_file", "admin_key", "admin_key_file", "tls_cert", "tls_key"),
}
KUBERNETES = "kubernetes-json-schema/v1.37.0-local-strict/_definitions.json"
PREFIXES = {
    name: f"io.k8s.api.{group}.{name}"
    for group, names in {
        "apps.v1": ("DeploymentStrategy",),
        "autoscaling.v2": ("HorizontalPodAutoscalerBehavior",),
        "core.v1": (
            *("Affinity", "EnvVar", "LocalObjectReference", "PodSecurityContext", "ResourceRequirements"),
            *("SecurityContext", "Toleration", "TopologySpreadConstraint"),
        ),
        "networking.v1": ("NetworkPolicyPeer",),
    }.items()
    for name in names
}

TEXT: Json = {"type": "string"}
NAME: Json = {"type": "string", "minLength": 1}
SWITCH: Json = {"type": "boolean"}
TEXTS: Json = {"type": "object", "additionalProperties": {"type": "string"}}
PULL_POLICY: Json = {"enum": ["Always", "IfNotPresent", "Never"]}
DURATION: Json = {"type": "string", "pattern": r"^([0-9]+(ms|[smhdwy]))+$"}
QUANTITY: Json = {"type": ["string", "integer"]}
RATIO: Json = {"type": "number", "exclusiveMinimum": 0, "maximum": 1}
URL: Json = {"type": "string", "pattern": "^(https?://.+)?$"}


def whole(low: int, high: int | None = None) -> Json:
    """Return the schema of a whole number within bounds, both inclusive."""
    return {"type": "integer", "minimum": low} | ({} if high is None else {"maximum": high})


def kubernetes(name: str) -> Json:
    """Return a reference to the schema of one of Kubernetes' own types."""
    return {"$ref": f"#/$defs/{PREFIXES[name]}"}


def list_of(item: Json) -> Json:
    """Return the schema of a list."""
    return {"type": "array", "items": item}


def block(**properties: Json) -> Json:
    """Return the schema of a mapping that has these keys and no others."""
    return {"type": "object", "properties": properties, "additionalProperties": False}


PORT = whole(1, 65535)
PROBE = block(periodSeconds=whole(1), timeoutSeconds=whole(1), failureThreshold=whole(1))
WORKERS: Json = {"anyOf": [whole(1), {"const": "auto"}]}
NULL: Json = {"type": "null"}


def values() -> Json:
    """Return the schema of every value of the chart."""
    return block(
        image=block(repository=NAME, tag=TEXT, pullPolicy=PULL_POLICY),
        imagePullSecrets=list_of(kubernetes("LocalObjectReference")),
        nameOverride=TEXT,
        fullnameOverride=TEXT,
        replicaCount=whole(0),
        workers=WORKERS,
        managementPort={"anyOf": [PORT, NULL]},
        settings=block(**settings()),
        extraEnv=list_of(kubernetes("EnvVar")),
        model=block(
            source={"enum": ["image", "pvc", "ociImage"]},
            folder={"type": "string", "pattern": "^[^/]*$"},
            version={"anyOf": [whole(1), NULL]},
            pvc=block(claimName=TEXT, readOnly=SWITCH),
            ociImage=block(reference=TEXT, pullPolicy=PULL_POLICY),
        ),
        keys=block(secretName=TEXT, apiKeys=NAME, adminKey=TEXT),
        gpu=block(
            enabled=SWITCH,
            resource=NAME,
            count=whole(1),
            runtimeClassName=TEXT,
            tolerations=list_of(kubernetes("Toleration")),
        ),
        resources=kubernetes("ResourceRequirements"),
        service=block(type={"enum": ["ClusterIP", "NodePort", "LoadBalancer"]}, port=PORT, annotations=TEXTS),
        drain=block(preStopSeconds=whole(0), delaySeconds=whole(0, 600), timeoutSeconds=whole(0, 3600)),
        probes=block(startup=PROBE, liveness=PROBE, readiness=PROBE),
        strategy=kubernetes("DeploymentStrategy"),
        podAnnotations=TEXTS,
        podLabels=TEXTS,
        serviceAccountName=TEXT,
        priorityClassName=TEXT,
        nodeSelector=TEXTS,
        tolerations=list_of(kubernetes("Toleration")),
        affinity=kubernetes("Affinity"),
        topologySpreadConstraints=list_of(kubernetes("TopologySpreadConstraint")),
        podSecurityContext=kubernetes("PodSecurityContext"),
        containerSecurityContext=kubernetes("SecurityContext"),
        tmpSizeLimit=QUANTITY,
        autoscaling=autoscaling(),
        podDisruptionBudget=block(
            enabled=SWITCH, maxUnavailable={"anyOf": [whole(0), {"type": "string", "pattern": "^[0-9]+%$"}]}
        ),
        serviceMonitor=block(enabled=SWITCH, labels=TEXTS, interval=DURATION, scrapeTimeout=DURATION),
        prometheusRule=block(
            enabled=SWITCH,
            labels=TEXTS,
            disabled=list_of({"enum": alarms()}),
            objectives=block(
                p99Seconds={"type": "number", "exclusiveMinimum": 0}, errorRatio=RATIO, rejectionRatio=RATIO
            ),
            runbookUrlPrefix=URL,
        ),
        dashboard=block(enabled=SWITCH, labels=TEXTS, annotations=TEXTS),
        networkPolicy=block(
            enabled=SWITCH,
            **{"from": list_of(kubernetes("NetworkPolicyPeer"))},
            metricsFrom=list_of(kubernetes("NetworkPolicyPeer")),
        ),
        **{"global": {"type": "object", "description": "Helm's own, for charts that hold this one."}},
    )


def autoscaling() -> Json:
    """Return the schema of `autoscaling`."""
    return block(
        by={"enum": ["none", "cpu", "queue"]},
        minReplicas=whole(1),
        maxReplicas=whole(1),
        behavior=kubernetes("HorizontalPodAutoscalerBehavior"),
        cpu=block(averageUtilization=whole(1)),
        queue=block(
            serverAddress=URL,
            threshold=RATIO,
            activationThreshold={"type": "number", "minimum": 0, "maximum": 1},
            window=DURATION,
            pollingInterval=whole(1),
            ignoreNullValues=SWITCH,
            fallback=block(
                failureThreshold=whole(1),
                replicas=whole(1),
                behavior={"enum": ["static", "currentReplicas", "currentReplicasIfHigher", "currentReplicasIfLower"]},
            ),
            authenticationRef=TEXT,
            query=TEXT,
        ),
    )


def settings() -> dict[str, Json]:
    """Return the schemas of the service's settings, with their bounds; a list may be written as text with commas."""
    properties = Settings.model_json_schema()["properties"]
    result: dict[str, Json] = {}
    for name in sorted(properties.keys() - DECIDED):
        schema = {key: value for key, value in properties[name].items() if key not in ("default", "title")}
        description = schema.pop("description")
        if schema.get("type") == "array":
            schema = {"anyOf": [schema, TEXT]}
        result[name] = {"description": description} | schema
    return result


def alarms() -> list[str]:
    """Return the names of the alarms, as the lines `- alert: NAME` of the rules' files have them."""
    lines = [line.strip() for path in rules() for line in path.read_text(encoding="utf-8").splitlines()]
    return [line.removeprefix("- alert: ") for line in lines if line.startswith("- alert: ")]


def rules() -> list[Path]:
    """Return the files of the alarms and of what they are computed from."""
    return sorted((DOCKER / "prometheus" / "rules").glob("*.yml"))


def definitions() -> dict[str, Json]:
    """Return Kubernetes' schemas of the types that the values hold, and of all that these are made of."""
    source = json.loads(resources.files("kubernetes_validate").joinpath(KUBERNETES).read_text())["$defs"]
    found: dict[str, Json] = {}
    waiting = list(PREFIXES.values())
    while waiting:
        if (name := waiting.pop()) not in found:
            found[name] = bare(source[name])
            waiting += references(found[name])
    return dict(sorted(found.items()))


def bare(schema: Json) -> Json:
    """Leave out what checks nothing."""
    result: Json = {}
    for key, value in schema.items():
        if key == "properties":
            result[key] = {name: bare(one) for name, one in value.items()}
        elif isinstance(value, dict):
            result[key] = bare(value)
        elif key not in ("description", "format"):
            result[key] = value
    return result


def references(schema: object) -> list[str]:
    """Return the names of the definitions that a schema refers to."""
    if isinstance(schema, list):
        return [name for item in schema for name in references(item)]
    if not isinstance(schema, dict):
        return []
    here = [schema["$ref"].rpartition("/")[2]] if "$ref" in schema else []
    return here + [name for value in schema.values() for name in references(value)]


def files() -> dict[Path, str]:
    """Return every file that is written, with its content."""
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "Values of the chart", **values()}
    dashboard = DOCKER / "grafana" / "dashboards" / "perceiver.json"
    return {
        CHART / "values.schema.json": json.dumps(schema | {"$defs": definitions()}, indent=2) + "\n",
        CHART / "files" / "dashboards" / dashboard.name: dashboard.read_text(encoding="utf-8"),
        **{CHART / "files" / "rules" / path.name: path.read_text(encoding="utf-8") for path in rules()},
    }


if __name__ == "__main__":
    for path, text in files().items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
