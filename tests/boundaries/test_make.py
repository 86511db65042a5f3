"""What `make serve` and `make test` do and refuse, as make itself tells it without running anything."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.conftest import LONG

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="no make")


def make_serve(*arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    """What `make serve` would run."""
    return subprocess.run(
        ["make", "-n", "-W", "pyproject.toml", "serve", *arguments],
        cwd=ROOT,
        env={"PATH": os.environ["PATH"]} | environment,
        capture_output=True,
        encoding="utf-8",
    )


@pytest.mark.parametrize(
    ("arguments", "environment", "host"),
    [
        ((), {}, "127.0.0.1"),
        ((), {"HOST": "x86_64-conda-linux-gnu"}, "127.0.0.1"),  # as conda's compilers export it
        ((), {"PERCEIVER_HOST": "0.0.0.0", "HOST": "desk"}, "0.0.0.0"),
        (("HOST=0.0.0.0",), {"PERCEIVER_HOST": "127.0.0.1"}, "0.0.0.0"),
    ],
)
def test_make_serve_listens_where_it_is_told_to(
    arguments: tuple[str, ...], environment: dict[str, str], host: str
) -> None:
    words = make_serve("RUNTIME=cpu", *arguments, **environment).stdout.split()
    assert words[words.index("--host") + 1] == host


@pytest.mark.parametrize("folder", ["models/five-things", "models/five things", "~/models"])
def test_make_serve_takes_a_folder_whatever_its_name(folder: str) -> None:
    done = make_serve("RUNTIME=cpu", f"MODEL={folder}").stdout.splitlines()
    command = next(line for line in done if "--model-dir" in line)
    words = shlex.split(command)
    assert words[words.index("--model-dir") + 1] == folder
    assert not {"'", '"'} & set(command)  # in which the shell would leave a ~ alone


def test_make_serve_says_that_it_installs_and_for_how_long() -> None:
    done = make_serve("RUNTIME=cpu").stdout
    said = 'echo "Installing in .venv-serve-cpu (once, about a minute)"'
    assert done.index(said) < done.index("pip install") < done.index("-m service")


@pytest.mark.parametrize("runtime", ["cuda", ""])
def test_a_runtime_that_there_is_not_is_refused_before_anything_is_installed(runtime: str) -> None:
    """pip would only warn, and the service would end with a traceback for want of onnxruntime."""
    done = make_serve(RUNTIME=runtime)
    assert done.returncode == 2
    assert f'RUNTIME is cpu or gpu, not "{runtime}"' in done.stderr
    assert "pip" not in done.stdout


@pytest.mark.parametrize(
    ("version", "fits"), [((3, 10, 9), False), ((3, 11), True), ((3, 14, 9), True), ((3, 15), False)]
)
def test_a_python_without_wheels_is_told_so(version: tuple[int, ...], fits: bool) -> None:
    code = next(
        shlex.split(line)[2] for line in make_serve("RUNTIME=cpu").stdout.splitlines() if "version_info" in line
    )
    patched = f"import sys; sys.version_info = {version}; exec({code!r})"
    done = subprocess.run([sys.executable, "-c", patched], capture_output=True, text=True)
    assert (done.returncode == 0) is fits, done.stderr
    assert fits or "this needs 3.11 to 3.14" in done.stderr
    first, last = re.findall(r"\(3, (\d+)\)", code)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["requires-python"] == f">=3.{first},<3.{last}"


def test_the_files_that_make_test_begins_with_are_there_and_their_order_is_kept() -> None:
    assert [name for name in LONG if not (ROOT / name).is_file()] == []
    done = subprocess.run(["make", "-n", "test"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "--dist loadfile --no-loadscope-reorder" in done


@pytest.mark.parametrize(("arguments", "named"), [((), True), (("ARGS=tests/service -k batcher",), False)])
def test_the_tests_that_measure_are_named_unless_others_are(arguments: tuple[str, ...], named: bool) -> None:
    done = subprocess.run(["make", "-n", "test", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ("$(grep " in done.stdout) is named
