"""Nobody is told how the service is used: onnxruntime's builds tell their maker unless they are asked not to."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fakes import make_model_folder

ROOT = Path(__file__).parents[2]
RUN = """
import sys
from pathlib import Path
import {first}
from service.engine.onnx_engine import OnnxEngine
OnnxEngine(Path(sys.argv[1]), provider="cpu")
"""


def traces(tmp_path: Path, first: str, **environment: str) -> list[str]:
    """What a process that opens a model leaves in a new home: a number for the machine, and what is to be sent."""
    home = tmp_path / "home"
    home.mkdir()
    # Alone, since onnxruntime keeps quiet by itself where one of many variables says that it runs in a CI.
    kept = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH") if name in os.environ}
    subprocess.run(
        [sys.executable, "-c", RUN.format(first=first), str(make_model_folder(tmp_path) / "model.onnx")],
        env=kept | {"HOME": str(home)} | environment,
        cwd=ROOT,
        check=True,
        timeout=100,
    )
    return [str(path) for path in home.rglob("*") if "onnxruntime" in path.name]


@pytest.mark.parametrize("first", ["service", "export.graph.to_onnx", "export.quantization.int8"])
def test_onnxruntime_keeps_no_record_for_its_maker(tmp_path: Path, first: str) -> None:
    assert traces(tmp_path, first) == []


@pytest.mark.skipif(sys.platform != "linux", reason="looks where it is kept on Linux")
def test_who_wants_it_can_have_it(tmp_path: Path) -> None:
    """So the test above could fail."""
    assert traces(tmp_path, "service", ORT_DISABLE_TELEMETRY="0")
