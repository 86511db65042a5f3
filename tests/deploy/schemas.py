"""Kubernetes' own schemas, and those of the custom resources in crds/, each of which says where it comes from."""

from __future__ import annotations

import json
from functools import cache
from importlib import resources

import kubernetes_validate
import yaml
from jsonschema import Draft202012Validator
from referencing import Registry, Resource

from tests.deploy.files import CRDS, Yaml

OLDEST, NEWEST = "1.30", "1.37"  # of Kubernetes: the chart's kubeVersion, and the newest that kubernetes-validate knows
CUSTOM = {yaml.safe_load(path.read_text())["properties"]["kind"]["enum"][0]: path for path in CRDS.glob("*.yaml")}


@cache
def registry() -> Registry:
    """Kubernetes' own types, which custom resources are made of."""
    folder = resources.files("kubernetes_validate") / "kubernetes-json-schema" / f"v{NEWEST}.0-local-strict"
    definitions = Resource.from_contents(json.loads((folder / "_definitions.json").read_text()))
    return Registry().with_resource("https://kubernetes.io/api/_definitions.json", definitions)


def validate(one: Yaml, version: str = NEWEST) -> None:
    """Raise an error of jsonschema's unless an object is as its API says; an unknown field is an error."""
    if one["kind"] in CUSTOM:
        schema = yaml.safe_load(CUSTOM[one["kind"]].read_text())
        Draft202012Validator(schema, registry=registry()).validate(one)
    else:
        kubernetes_validate.validate(one, version, strict=True)
