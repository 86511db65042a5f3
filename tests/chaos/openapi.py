"""schemathesis, with every check on, against the OpenAPI document of a real service."""

import os
import subprocess
import sys
from pathlib import Path

from tests.end_to_end.process import ROOT

CONFIGURATION = Path(__file__).parent / "schemathesis.toml"
# Keys, so that the document says where they are asked for, and what is answered without one.
KEY = "chaos"
ARGUMENTS = (f"--api-keys={KEY}", f"--admin-key={KEY}")


def check_document(url: str, folder: Path, *options: str) -> "subprocess.CompletedProcess[str]":
    """Run schemathesis on the service at `url`; its status is 0 when every answer was as documented.

    In a process of its own, since it registers itself with pytest, and in `folder`, since it leaves files.
    """
    command = [sys.executable, "-m", "schemathesis.cli", "--no-color", "--config-file", str(CONFIGURATION)]
    return subprocess.run(
        [*command, "run", f"{url}/openapi.json", "--checks=all", *options],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
