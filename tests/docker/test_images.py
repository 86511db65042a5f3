"""The Dockerfiles: linted by hadolint, and what hadolint does not know."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.docker.files import DOCKER, DOCKERFILES, ROOT

HADOLINT = Path(sys.executable).parent / "hadolint"


def last_stage(path: Path) -> str:
    return "FROM" + path.read_text().split("\nFROM")[-1]


def ignored(pattern: str, path: str) -> bool:
    """Whether a path falls under a line of .dockerignore."""
    return bool(re.fullmatch(re.escape(pattern).replace(r"\*\*/", "(.*/)?").replace(r"\*", "[^/]*") + "(/.*)?", path))


def reaches_the_builder(path: str) -> bool:
    """What Docker does with .dockerignore: the last line that fits decides."""
    sent = True
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        if line and not line.startswith("#") and ignored(line.removeprefix("!"), path):
            sent = line.startswith("!")
    return sent


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_hadolint_has_nothing_to_say(path: Path):
    run = subprocess.run([HADOLINT, "--failure-threshold", "style", path], capture_output=True, text=True)
    assert (run.returncode, run.stdout + run.stderr) == (0, "")


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_every_ignored_rule_is_explained(path: Path):
    lines = path.read_text().splitlines()
    for number, line in enumerate(lines):
        if "hadolint ignore" in line:
            assert lines[number - 1].startswith("# "), f"{path.name}:{number + 1}"


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_base_image_is_pinned_and_the_same_in_every_stage(path: Path):
    text = path.read_text()
    assert re.findall(r"^ARG PYTHON_IMAGE=(.*)$", text, re.MULTILINE) == ["python:3.11.15-slim-bookworm"]
    stages = re.findall(r"^FROM (\S+)(?: AS (\w+))?$", text, re.MULTILINE)
    names = {name for _, name in stages}
    assert len(stages) > 1
    assert all(base == "${PYTHON_IMAGE}" or base in names for base, _ in stages)


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_what_is_copied_exists_and_reaches_the_builder(path: Path):
    sources = re.findall(r"^COPY (?!--from)(.*) \S+$", path.read_text(), re.MULTILINE)
    assert sources
    for source in " ".join(sources).split():
        assert (ROOT / source).exists(), source
        assert reaches_the_builder(source), source


def test_nothing_else_reaches_the_builder():
    for path in (
        ".env",
        ".git/config",
        "models/perceiver-cifar100",
        "data",
        "runs",
        "tests/fakes.py",
        "secrets/api-keys",
    ):
        assert not reaches_the_builder(path), path
    assert not reaches_the_builder("service/__pycache__/app.pyc")


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_last_stage_does_not_run_as_root_and_is_told_to_stop(path: Path):
    stage = last_stage(path)
    assert re.findall(r"^USER (.*)$", stage, re.MULTILINE) == ["10001:10001"]
    assert re.findall(r"^STOPSIGNAL (.*)$", stage, re.MULTILINE) == ["SIGTERM"]
    assert "org.opencontainers.image.revision" in stage


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_the_programs_can_be_read_whatever_the_umask_of_the_clone(path: Path):
    """COPY keeps the files' mode: 0600 of a clone under umask 077, and root's."""
    before, _, after = path.read_text().partition("chmod -R a+rX /app")
    assert "COPY docker/" in before, "after the last of them"
    assert not re.search(r"^COPY (?!--from)", after, re.MULTILINE)


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_gpus_are_counted_as_docker_counts_them(path: Path):
    """A number in PERCEIVER_DEVICE_IDS, in CUDA_VISIBLE_DEVICES of a training and in the metrics is the same GPU."""
    assert re.findall(r"\bCUDA_DEVICE_ORDER=(\w+)", last_stage(path)) == ["PCI_BUS_ID"]


def test_training_has_the_compilers_that_torch_compile_calls():
    """Triton's a C compiler, for a GPU; inductor's a C++ compiler, where compose.cpu.yml has taken the GPU away."""
    (installed,) = re.findall(r"apt-get install (.*) \\", last_stage(DOCKER / "training.Dockerfile"))
    assert {"gcc", "libc6-dev", "g++"} <= set(installed.split())


def test_training_knows_the_revision_that_it_was_built_from():
    stage = last_stage(DOCKER / "training.Dockerfile")
    assert "ARG REVISION=unknown\n" in stage
    assert "\nENV REVISION=${REVISION}\n" in stage.split("ARG REVISION=unknown\n")[1]


def test_last_stage_of_the_service_installs_nothing():
    stage = last_stage(DOCKER / "service.Dockerfile")
    assert "RUN" not in stage
    assert not re.search(r"\b(apt-get|pip|gcc|torch)\b", stage.split("LABEL")[0].replace("# ", ""))


def test_requirements_are_those_of_the_project():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    command = [sys.executable, DOCKER / "requirements.py", "gpu"]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    assert printed == project["dependencies"] + project["optional-dependencies"]["gpu"]
    assert subprocess.run([*command, "no-such"], cwd=ROOT, capture_output=True).returncode != 0


def test_service_serves_what_it_is_tested_with():
    """The interpreter's minor version is the one that `requires-python` starts with, which CI runs."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    minor = project["requires-python"].removeprefix(">=").partition(",")[0]
    assert all(f"python:{minor}." in path.read_text() for path in DOCKERFILES)
