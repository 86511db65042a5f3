"""`helm test`: what its pod runs, on a real service."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.deploy.test_chart import KEYS
from tests.deploy.tools import NAME, Helm
from tests.end_to_end.process import on_model, started
from tests.fakes import make_model_folder


def pod_test(helm: Helm, url: str, keys: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run the container's command here, with the variables that it has, pointed at a service of this machine."""
    (container,) = helm.objects(KEYS if keys else {}).one("Pod")["spec"]["containers"]
    environment = {one["name"]: one["value"] for one in container["env"]}
    assert environment["URL"] == f"http://{NAME}:80/predict"
    environment |= {"URL": f"{url}/predict", "PATH": os.environ["PATH"], "http_proxy": "http://127.0.0.1:9"}
    if keys is not None:
        assert environment["API_KEYS_FILE"] == "/etc/perceiver/keys/api-keys"
        environment["API_KEYS_FILE"] = str(keys)
    python, *flags = container["command"]
    assert python == "python"
    return subprocess.run(
        [sys.executable, *flags, *container["args"]], env=environment, capture_output=True, text=True, check=False
    )


def test_it_prints_a_label(helm: Helm, tmp_path: Path):
    make_model_folder(tmp_path / "m")
    with started(tmp_path, *on_model(tmp_path / "m")) as process, process.ready():
        run = pod_test(helm, process.url())
    assert (run.returncode, run.stderr) == (0, "")
    assert '"label":"class ' in run.stdout


def test_it_sends_the_first_key(helm: Helm, tmp_path: Path):
    make_model_folder(tmp_path / "m")
    keys = tmp_path / "keys"
    keys.write_text("# who may\n\nfirst  # of the shop\nsecond\n")
    with started(tmp_path, *on_model(tmp_path / "m", "--api-keys-file", str(keys))) as process, process.ready():
        assert pod_test(helm, process.url(), keys).returncode == 0
        refused = pod_test(helm, process.url())
    assert refused.returncode == 1
    assert "/predict: 401: " in refused.stderr
    assert "unauthorized" in refused.stderr


@pytest.mark.parametrize("url", ["http://127.0.0.1:1"])
def test_it_says_why_it_fails(helm: Helm, url: str):
    run = pod_test(helm, url)
    assert (run.returncode, run.stdout) == (1, "")
    assert run.stderr.startswith(f"{url}/predict: ")
    assert "refused" in run.stderr
