"""The Open Inference Protocol v2 as its own clients speak it: tritonclient and kserve from PyPI, and a real process."""

import json
import subprocess
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from tests.end_to_end.clients.environment import client_python
from tests.end_to_end.process import ROOT, SECONDS, on_model, started
from tests.fakes import CLASSES, HEIGHT, WIDTH, make_model_folder, tiny_images, tiny_logits
from tests.imaging.files import encode
from tests.service.harness import free_ports

CLIENTS = Path(__file__).parent / "clients"


def output_of(python: Path, *arguments: object) -> str:
    """What a program of the clients' environment prints."""
    run = subprocess.run([python, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return run.stdout


@pytest.mark.timeout(900)  # the first time, the environment is made
def test_both_clients_get_what_the_model_says(tmp_path: Path) -> None:
    make_model_folder(tmp_path / "m")
    images = tiny_images(3)
    same = np.stack([images[0], images[0]])
    np.save(tmp_path / "images.npy", images)
    (tmp_path / "image.png").write_bytes(encode(images[0], "PNG"))
    port = free_ports(1)
    management = f"http://127.0.0.1:{port}"
    arguments = on_model(tmp_path / "m", f"--management-port={port}")
    with started(tmp_path, *arguments) as process, ExitStack() as stack:
        client = stack.enter_context(httpx.Client(base_url=process.url(), timeout=SECONDS))
        process.wait(lambda: client.get("/v2/health/ready").status_code == 200)
        files = tmp_path / "images.npy", tmp_path / "image.png"
        seen = json.loads(output_of(client_python(), CLIENTS / "calls.py", process.url(), management, "tiny", *files))
        by_predict = client.post("/predict", content=(tmp_path / "image.png").read_bytes()).json()["predictions"][0]
        assert "Traceback" not in process.stderr
    expected = {"images": tiny_logits(images, 1), "image_bytes": tiny_logits(same, 1)}
    check_triton(seen["triton"], expected)
    assert seen["triton_aio"]["ready"]
    assert seen["triton_aio"]["metadata"] == seen["triton"]["metadata"]
    for name, logits in expected.items():
        np.testing.assert_allclose(seen["triton_aio"][name], logits, atol=1e-4)
    check_kserve(seen["kserve"], expected)
    # One image, one label, whichever way it comes.
    best = by_predict["top"][0]
    assert seen["kserve"]["labels"] == [f"{best['probability']:.6f}:{best['index']}:{best['label']}"] * 2


def check_triton(seen: dict[str, Any], expected: dict[str, np.ndarray]) -> None:
    assert (seen["live"], seen["ready"], seen["model_ready"], seen["version_ready"]) == (True,) * 4
    assert not seen["other_ready"]
    assert "binary_tensor_data" in seen["server"]["extensions"]
    assert seen["metadata"] == {
        "name": "tiny",
        "versions": ["1"],
        "platform": "onnxruntime_onnx",
        "inputs": [
            {"name": "images", "datatype": "UINT8", "shape": [-1, HEIGHT, WIDTH, 3]},
            {"name": "image_bytes", "datatype": "BYTES", "shape": [-1]},
        ],
        "outputs": [{"name": name, "datatype": "FP32", "shape": [-1, CLASSES]} for name in ("logits", "probabilities")],
    }
    assert seen["config"]["max_batch_size"] >= 1
    assert seen["index"] == [{"name": "tiny", "version": "1", "state": "READY", "reason": ""}]
    for name, logits in expected.items():
        probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
        best = logits.argmax(axis=1)
        for binary in (True, False):
            answer = seen[f"{name}_{binary}"]
            assert (answer["id"], answer["version"]) == ("seven", "1")
            np.testing.assert_allclose(answer["probabilities"], probabilities, atol=1e-5)
            assert [len(row) for row in answer["logits"]] == [2] * len(logits)
            for row, index, values in zip(answer["logits"], best, logits, strict=True):
                value, number, label = row[0].split(":")
                assert (int(number), label) == (index, f"class {index}")
                assert float(value) == pytest.approx(values[index], abs=1e-4)
    np.testing.assert_allclose(seen["default"], expected["images"], atol=1e-4)
    assert seen["async"] == seen["default"]
    assert [status for status, _ in seen["errors"]] == ["404", "404", "400", "400", "415", "404", "404", "404", "404"]
    messages = [message for _, message in seen["errors"]]
    assert messages[:4] == [
        "There is no model 'other' here; there is 'tiny'.",
        "Version '2' of tiny is not served; version 1 is.",
        "The request has 2 inputs; send one, images or image_bytes.",
        "The model has no output features; it has logits and probabilities.",
    ]
    elsewhere = "There is nothing at this path of this port; the {} port may have it."
    assert messages[6:] == [elsewhere.format(port) for port in ("management", "management", "client")]
    (stats,) = seen["stats"][0]["model_stats"]
    assert stats == seen["stats"][1]["model_stats"][0]
    assert stats["inference_stats"]["success"]["count"] == 6
    assert stats["inference_count"] == 4 * 3 + 2 * 2
    measured = ("success", "queue", "compute_input", "compute_infer")
    assert all(stats["inference_stats"][step]["ns"] > 0 for step in measured)


def check_kserve(seen: dict[str, Any], expected: dict[str, np.ndarray]) -> None:
    assert (seen["live"], seen["ready"], seen["model_ready"], seen["other_ready"]) == (True, True, True, False)
    assert seen["id"] == "seven"
    for binary in (True, False):
        np.testing.assert_allclose(seen[f"images_{binary}"], expected["images"], atol=1e-4)
    assert seen["error"].startswith("There is no model 'other' here; there is 'tiny'., '404")
