"""The environment of the clients of the Open Inference Protocol, which are no dependencies of the project."""

import fcntl
import functools
import hashlib
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tests.end_to_end.process import ROOT

REQUIREMENTS = Path(__file__).parent / "requirements.txt"


@functools.cache
def client_python() -> Path:
    """The interpreter of an environment with both clients, made once for each state of the requirements.

    It lies over the project's own: what is required in the same version there is not installed once more.
    """
    state = hashlib.sha256(REQUIREMENTS.read_bytes() + (ROOT / "constraints.txt").read_bytes())
    home = ROOT / ".venv-clients" / state.hexdigest()[:12]
    home.mkdir(parents=True, exist_ok=True)
    python, mark = home / "bin/python", home / "installed"
    with (home / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # processes of pytest-xdist share it
        if not mark.exists():
            # Python compiles what the clients import; pip would compile all of it, most of the time.
            subprocess.run([sys.executable, "-m", "venv", "--without-pip", home], check=True)
            site = sysconfig.get_path("purelib", vars={"base": str(home)})
            Path(site, "project.pth").write_text(sysconfig.get_path("purelib"))
            pip = [sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check"]
            install = [*pip, "install", "--quiet", "--no-compile", "--requirement", REQUIREMENTS]
            run = subprocess.run(install, capture_output=True, text=True, check=False)
            if run.returncode != 0:
                (pytest.fail if os.environ.get("CI") else pytest.skip)(f"no clients from PyPI: {run.stderr[-2000:]}")
            mark.touch()
    return python
