"""helm and kubectl as functions."""

from __future__ import annotations

import os
import subprocess
from collections import Counter
from pathlib import Path

import yaml

from tests.deploy.files import CHART, Yaml

RELEASE, NAMESPACE = "cats", "vision"
NAME = "cats-perceiver"  # what the objects are called then


class Objects(list[Yaml]):
    """What a chart gives."""

    def one(self, kind: str, name: str = "") -> Yaml:
        """The only object of a kind; of the pods of a Deployment and of `helm test`, the latter is a Pod."""
        found = [one for one in self if one["kind"] == kind and name in one["metadata"]["name"]]
        assert len(found) == 1, f"{len(found)} of kind {kind}"
        return found[0]

    def kinds(self) -> Counter[str]:
        return Counter(one["kind"] for one in self)

    def pod(self) -> Yaml:
        """The specification of the serving pods."""
        spec: Yaml = self.one("Deployment")["spec"]["template"]["spec"]
        return spec

    def container(self) -> Yaml:
        (container,) = self.pod()["containers"]
        assert isinstance(container, dict)
        return container

    def environment(self) -> dict[str, str]:
        return {one["name"]: one["value"] for one in self.container()["env"] if "value" in one}


class Tool:
    """A binary, with a home of its own."""

    def __init__(self, path: Path, home: Path) -> None:
        self._path = path
        self._environment = {"PATH": os.environ["PATH"], "HOME": str(home)}

    def run(self, *arguments: object, text: str = "") -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [self._path, *map(str, arguments)],
            input=text,
            capture_output=True,
            text=True,
            env=self._environment,
            check=False,
        )


class Helm(Tool):
    """helm."""

    def template(self, values: Yaml | None = None, *, kubernetes: str = "1.37") -> subprocess.CompletedProcess[str]:
        command = ("template", RELEASE, CHART, "--namespace", NAMESPACE, "--kube-version", kubernetes)
        return self.run(*command, "--values", "-", text=yaml.safe_dump(values or {}))

    def objects(self, values: Yaml | None = None, *, kubernetes: str = "1.37") -> Objects:
        """What the chart gives with these values."""
        run = self.template(values, kubernetes=kubernetes)
        assert run.returncode == 0, run.stderr
        return Objects(one for one in yaml.load_all(run.stdout, yaml.CSafeLoader) if one is not None)

    def refusal(self, values: Yaml, *, kubernetes: str = "1.37") -> str:
        """What helm says of values that it refuses."""
        run = self.template(values, kubernetes=kubernetes)
        assert run.returncode != 0
        return run.stderr


class Kubectl(Tool):
    """kubectl, with what it does without a cluster."""

    def kustomize(self, folder: Path) -> Objects:
        """What a folder with a kustomization.yaml gives."""
        run = self.run("kustomize", folder)
        assert run.returncode == 0, run.stderr
        return Objects(yaml.load_all(run.stdout, yaml.CSafeLoader))
