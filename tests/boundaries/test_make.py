"""What `make serve` listens on, as make itself tells it without running anything."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="no make")


def host_of(*arguments: str, **environment: str) -> str:
    """The value of --host that `make serve` would start the service with."""
    done = subprocess.run(
        ["make", "-n", "serve", "RUNTIME=cpu", *arguments],
        cwd=ROOT,
        env={"PATH": os.environ["PATH"]} | environment,
        capture_output=True,
        encoding="utf-8",
        check=True,
    )
    words = done.stdout.split()
    return words[words.index("--host") + 1]


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
    assert host_of(*arguments, **environment) == host
