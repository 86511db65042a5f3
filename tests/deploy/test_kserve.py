"""KServe's two objects, and the image that holds a model."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import onnx
import pytest
import yaml

from service.settings import Settings
from tests.deploy.files import DEPLOY, KSERVE, ROOT, Yaml
from tests.deploy.schemas import validate
from tests.deploy.tools import Kubectl

RUNTIME: Yaml = yaml.safe_load((KSERVE / "servingruntime.yaml").read_text())
SERVICE: Yaml = yaml.safe_load((KSERVE / "inferenceservice.yaml").read_text())
CONTAINER: Yaml = RUNTIME["spec"]["containers"][0]
PREDICTOR: Yaml = SERVICE["spec"]["predictor"]
ENVIRONMENT = {one["name"]: one["value"] for one in CONTAINER["env"] + PREDICTOR["model"]["env"]}


def test_kubectl_makes_both_and_they_are_as_kserve_wants_them(kubectl: Kubectl):
    objects = kubectl.kustomize(KSERVE)
    assert objects.kinds() == {"ServingRuntime": 1, "InferenceService": 1}
    for one in objects:
        validate(one)


def test_the_image_is_of_the_projects_version_and_kustomize_moves_it(kubectl: Kubectl, tmp_path: Path):
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert CONTAINER["image"] == f"perceiver-service:{version}"
    for path in KSERVE.iterdir():
        text = path.read_text().replace("newName: perceiver-service", "newName: registry.example.org/vision")
        (tmp_path / path.name).write_text(text)
    (container,) = kubectl.kustomize(tmp_path).one("ServingRuntime")["spec"]["containers"]
    assert container["image"] == f"registry.example.org/vision:{version}"


def test_the_container_is_where_kserve_looks():
    """Its name, port 8080 and /mnt/models are KServe's conventions; so are the annotations."""
    assert CONTAINER["name"] == "kserve-container"
    (port,) = CONTAINER["ports"]
    assert ENVIRONMENT["PERCEIVER_PORT"] == str(port["containerPort"]) == "8080"
    assert ENVIRONMENT["PERCEIVER_MODEL_DIR"] == "/mnt/models"
    assert RUNTIME["spec"]["annotations"] == {
        "prometheus.kserve.io/port": "8080",
        "prometheus.kserve.io/path": "/metrics",
    }


def test_the_model_asks_for_what_the_runtime_offers():
    model, spec = PREDICTOR["model"], RUNTIME["spec"]
    assert model["runtime"] == RUNTIME["metadata"]["name"]
    assert model["modelFormat"]["name"] in [one["name"] for one in spec["supportedModelFormats"]]
    assert model["protocolVersion"] in spec["protocolVersions"]


def test_names_are_those_of_the_shipped_model():
    path = max((ROOT / "models" / SERVICE["metadata"]["name"]).glob("*/model.onnx"))
    props = {prop.key: prop.value for prop in onnx.load(path, load_external_data=False).metadata_props}
    assert json.loads(props["perceiver.name"]) == SERVICE["metadata"]["name"]
    assert props["perceiver.schema_version"] == RUNTIME["spec"]["supportedModelFormats"][0]["version"]


def test_every_variable_is_a_setting_and_no_service_adds_one():
    names = {name.removeprefix("PERCEIVER_").lower() for name in ENVIRONMENT if name.startswith("PERCEIVER_")}
    assert names <= set(Settings.model_fields)
    assert PREDICTOR["enableServiceLinks"] is False


def test_the_drain_fits_the_time_that_kubernetes_gives():
    whole = int(ENVIRONMENT["PERCEIVER_DRAIN_DELAY_S"]) + int(ENVIRONMENT["PERCEIVER_DRAIN_TIMEOUT_S"]) + 6
    assert "terminationGracePeriodSeconds" not in PREDICTOR  # which Knative refuses; Kubernetes' own is 30 s
    assert whole < 30


@pytest.mark.parametrize("field", ["lifecycle", "startupProbe"])
def test_the_container_has_nothing_that_knative_refuses(field: str):
    assert field not in CONTAINER
    assert len(CONTAINER["ports"]) == 1


def test_hadolint_has_nothing_to_say_of_the_models_image():
    hadolint = Path(sys.executable).parent / "hadolint"
    command = [hadolint, "--failure-threshold", "style", DEPLOY / "model.Dockerfile"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout + run.stderr) == (0, "")


def test_the_models_image_holds_it_where_the_chart_looks():
    text = (DEPLOY / "model.Dockerfile").read_text()
    assert "ARG MODEL_NAME=perceiver-cifar100\n" in text
    assert text.endswith("COPY --chmod=755 . /models/${MODEL_NAME}\n")
