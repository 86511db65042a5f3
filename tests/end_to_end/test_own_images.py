"""The README's commands for a folder of one's own images, as a user types them: train, export, serve, ask."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import pytest

ROOT = Path(__file__).parents[2]
EXAMPLE = "docs/examples/five-things"
LABELS = {"bicycle", "orange", "sea", "sunflower", "wardrobe"}
SECONDS = 240  # of each command, on a machine that is busy with others


def commands() -> list[list[str]]:
    """The README's lines that name the example or what comes of it, as words."""
    lines = [line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("    ")]
    return [shlex.split(line, comments=True) for line in lines if "five-things" in line]


def in_this_environment(words: list[str], folder: Path, more: str = "", written: str = "runs|models") -> list[str]:
    """The same command with this interpreter's environment, and with what it writes below another folder.

    Args:
        words: `make TARGET NAME=VALUE...`.
        folder: stands for the repository's root where runs and models are written.
        more: goes behind `ARGS`.
        written: folders of the root that are.
    """
    moved = [re.sub(rf"(?<![\w/])(?=({written})/)", f"{folder}/", word) for word in words]
    assert moved != words
    if not any(word.startswith("ARGS=") for word in moved):
        moved.append("ARGS=")
    moved = [f"{word} {more}" if word.startswith("ARGS=") else word for word in moved]
    # Nothing is installed: what runs the tests has all that the two environments have.
    return [*moved, f"DEV={sys.prefix}", f"SERVE={sys.prefix}", "-o", f"{sys.prefix}/.installed"]


def environment() -> dict[str, str]:
    """A user's: training has a process for each core, where tests have one thread."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("PERCEIVER_", "OMP_"))}


def run(command: list[str]) -> str:
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@contextmanager
def serving(command: list[str], log: Path) -> Iterator[httpx.Client]:
    """A client of the service that the command starts, once it is ready."""
    with log.open("wb") as stderr:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL, stderr=stderr, start_new_session=True
        )
    try:
        until = time.monotonic() + SECONDS
        while not (found := re.search(r"starting on (http://[\d.:]+)", log.read_text())):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < until, log.read_text()
            time.sleep(0.05)
        with httpx.Client(base_url=found[1], timeout=SECONDS) as client:
            while client.get("/health/ready").status_code != 200:
                assert time.monotonic() < until, log.read_text()
                time.sleep(0.05)
            yield client
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_the_example_is_small_and_its_classes_are_folders() -> None:
    folders = [path for path in (ROOT / EXAMPLE).iterdir() if path.is_dir()]
    assert {folder.name for folder in folders} == LABELS
    images = [path for folder in folders for path in folder.iterdir()]
    assert {path.suffix for path in images} == {".png"}
    assert sum(path.stat().st_size for path in images) < 400_000


@pytest.mark.timeout(4 * SECONDS)
@pytest.mark.skipif(shutil.which("make") is None, reason="no make")
def test_a_folder_of_images_becomes_a_served_model_by_three_commands(tmp_path: Path) -> None:
    train, export, serve, ask = commands()
    assert [train[:2], export[:2], serve[:2], ask[0]] == [
        ["make", "train"],
        ["make", "export"],
        ["make", "serve"],
        "curl",
    ]
    output = run(in_this_environment(train, tmp_path, "--epochs 1 --threads 1 --device cpu", "runs"))
    # Trained on from the shipped model, it knows them after an epoch.
    val = json.loads((tmp_path / "runs" / "five-things" / "report.json").read_text())["val"]
    assert val["top1"] > 0.5, output
    assert "warning: 145 training images are few: a step takes 32 of them" in output
    run(in_this_environment(export, tmp_path, "--golden 8 --max-batch 4"))
    (image,) = (word.removeprefix("file=@") for word in ask if word.startswith("file=@"))
    served = in_this_environment(serve, tmp_path, "--provider cpu --intra-op-threads 1")
    with serving([*served, "PORT=0"], tmp_path / "stderr") as client:
        response = client.post("/predict", files={"file": ("image.png", (ROOT / image).read_bytes())})
    assert response.status_code == 200
    answer = response.json()
    assert (answer["model"], answer["version"]) == ("five-things", 1)
    top = answer["predictions"][0]["top"]
    assert {entry["label"] for entry in top} == LABELS
    assert sum(entry["probability"] for entry in top) == pytest.approx(1, abs=1e-4)
    card = (tmp_path / "models" / "five-things" / "1" / "README.md").read_text()
    assert "classifies images into the 5 classes of five-things" in card
    assert re.search(r"--init runs/stage-\d+ --data DATA/five-things --epochs 1 --batch-size 32", card)


@pytest.mark.skipif(shutil.which("make") is None, reason="no make")
def test_ctrl_c_through_make_is_no_error_and_names_the_make_command_that_goes_on(tmp_path: Path) -> None:
    """As a terminal does it: make, its shell and the training get the signal together."""
    out, log = tmp_path / "runs" / "one", tmp_path / "log"
    flags = f"--data {EXAMPLE} --out {out} --epochs 1000 --num-latents 4 --threads 1 --device cpu"
    command = ["make", "train", f"ARGS={flags}", f"DEV={sys.prefix}", "-o", f"{sys.prefix}/.installed"]
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment(), stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        until = time.monotonic() + SECONDS
        while not (out / "last.safetensors").exists():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < until, log.read_text()
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGINT)
        process.wait(SECONDS)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    said = log.read_text()
    assert f'go on with: make train ARGS="--resume {out} --threads 1 --device cpu"' in said
    assert "Error" not in said
