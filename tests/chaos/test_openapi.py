"""A bounded run of schemathesis; `python -m tests.chaos openapi` takes the time it is given."""

import sys
from pathlib import Path

import httpx
import pytest

from tests.chaos.__main__ import main
from tests.chaos.openapi import ARGUMENTS, check_document
from tests.end_to_end.process import on_model, started
from tests.fakes import make_model_folder


def test_every_answer_is_as_the_openapi_document_says(tmp_path: Path) -> None:
    make_model_folder(tmp_path / "m")
    make_model_folder(tmp_path / "m", 2, defect="corrupt_onnx")  # so that /models has a reason to tell
    with started(tmp_path, *on_model(tmp_path / "m", *ARGUMENTS)) as process, process.ready() as client:
        done = check_document(str(client.base_url).rstrip("/"), tmp_path, "--max-examples=15", "--seed=0")
        assert done.returncode == 0, done.stdout
        assert "Tested: 24" in done.stdout
        assert "Traceback" not in process.stderr
        # It did not pass for want of a key, or of an image.
        assert predictions(client) > 10
        process.signal()
        assert process.exit_status() == 0


def predictions(client: httpx.Client) -> float:
    """How many requests to /predict were answered with 200."""
    name = 'perceiver_requests_total{code="200",route="/predict"} '
    return sum(float(line.removeprefix(name)) for line in client.get("/metrics").text.splitlines() if name in line)


def test_the_command_ends_well(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["tests.chaos", "openapi", "--seconds", "1"])
    assert main() == 0
    assert "every promise was kept" in capfd.readouterr().out
