"""The configurations of docker/nginx, with the addresses of here, and the nginx that runs them."""

import re
import shutil
import socket
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.end_to_end.process import ROOT

CONFIGURATIONS = ROOT / "docker/nginx"
SHARED = "perceiver_server.conf"

needs_nginx = pytest.mark.skipif(shutil.which("nginx") is None, reason="runs nginx")


def follows_dns() -> bool:
    """Whether this nginx takes the servers of an upstream from DNS while it runs: 1.27.3 and newer do."""
    if shutil.which("nginx") is None:
        return False
    said = subprocess.run(["nginx", "-v"], capture_output=True, text=True, check=True).stderr
    return tuple(map(int, re.findall(r"\d+", said)[:3])) >= (1, 27, 3)


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def changed(name: str, folder: Path, changes: Mapping[str, str]) -> str:
    """A file of docker/nginx with this folder in place of /tmp; each of the other texts stands there once."""
    text = (CONFIGURATIONS / name).read_text().replace("/tmp/", f"{folder}/")
    for old, new in changes.items():
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    return text


@contextmanager
def running(configuration: Path) -> Iterator[None]:
    """Run nginx with this file, beside which it finds the shared one."""
    folder = configuration.parent
    shutil.copy(CONFIGURATIONS / SHARED, folder)
    # Without a master, the only process is the one that is ended.
    command = ["nginx", "-p", str(folder), "-c", str(configuration), "-g", "daemon off; master_process off;"]
    tested = subprocess.run([*command, "-t"], capture_output=True, text=True, check=False)
    assert tested.returncode == 0, tested.stderr
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    try:
        yield
    finally:
        process.kill()
        process.wait()
