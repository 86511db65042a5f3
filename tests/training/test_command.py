"""``python -m training`` from flags to files: whole runs, stops and resumes, and what the user gets wrong."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.training.tiny import FLAGS, write_pictures
from training import checkpoint
from training.__main__ import main
from training.figures import CURVES, PICTURES
from training.lines import read_lines
from training.train import Trainer

RECIPE = [*FLAGS, "--epochs=2", "--batch-size=8", "--threads=1", "--device=cpu"]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("pictures"))


def command(*flags: str | Path) -> list[str]:
    return [sys.executable, "-m", "training", *map(str, flags)]


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1"}


def tensors_of(run: Path) -> dict[str, torch.Tensor]:
    return checkpoint.load(run / "last.safetensors")[0]


# --- whole runs


def test_a_run_leaves_its_folder(tmp_path: Path, pictures: Path) -> None:
    run = tmp_path / "runs" / "tiny"
    flags = command(*RECIPE, "--data", pictures, "--out", run)
    done = subprocess.run(flags, capture_output=True, text=True, env=environment(), timeout=240)
    assert done.returncode == 0, done.stderr
    config = json.loads((run / "config.json").read_text())
    assert (config["preset"], config["labels"], config["train"]["epochs"]) == ("compact", ["ant", "bee", "cat"], 2)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2]
    assert {"train_loss", "val_loss", "val_top1", "val_top5", "learning_rate", "pictures_per_second"} <= lines[0].keys()
    assert (lines[0]["device"], lines[0]["processes"], lines[0]["threads"]) == ("cpu", 1, 1)
    (events,) = (run / "tensorboard").iterdir()
    assert b"val_top1" in events.read_bytes()
    for name in (CURVES, *PICTURES):
        with Image.open(run / name) as picture:
            assert picture.format == "PNG"
    assert checkpoint.load(run / "last.safetensors")[1].epoch == 2
    best = checkpoint.load(run / "best.safetensors")[1]
    report = json.loads((run / "report.json").read_text())
    assert (report["epoch"], report["test"]["split"], report["test"]["n"]) == (best.epoch, "test", 6)
    assert report["checkpoint_sha256"] == checkpoint.digest(run / "best.safetensors")
    # On the terminal: what is trained, a line for each epoch, the figures; on stderr the bar.
    first, *rest = done.stdout.splitlines()
    assert "24 training and 9 validation pictures of 3 classes, 1 x cpu, 3 steps an epoch" in first
    assert [line.split()[:2] for line in rest[:2]] == [["epoch", "1"], ["epoch", "2"]]
    assert '"top5": 1.0' in done.stdout
    for shown in ("epoch 1/2", "pictures/s", "24.0"):
        assert shown in done.stderr
    assert "Warning" not in done.stderr


def test_ctrl_c_stops_with_a_checkpoint(
    tmp_path: Path, pictures: Path, without_curves: None, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    flags = command(*RECIPE, "--data", pictures, "--out", run, "--epochs=1000")
    with subprocess.Popen(
        flags, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment()
    ) as process:
        assert process.stdout is not None
        while not process.stdout.readline().startswith("epoch   1"):
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        output, error = process.communicate(timeout=240)
    assert process.returncode == 3
    assert f"go on with: python -m training --resume {run}" in output
    assert "Traceback" not in error
    step = checkpoint.load(run / "last.safetensors")[1].step
    assert 3 <= step < 3000
    assert main(["--resume", str(run), "--max-steps", str(step + 1), "--threads=1"]) == 3
    assert checkpoint.load(run / "last.safetensors")[1].step == step + 1


@pytest.mark.usefixtures("without_curves")
def test_resuming_a_finished_run_writes_its_report_again(whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    for name in ("report.json", *PICTURES):
        (run / name).unlink()
    assert main(["--resume", str(run), "--threads=1"]) == 0
    assert (run / "report.json").read_bytes() == (whole / "report.json").read_bytes()
    assert (run / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    assert all((run / name).is_file() for name in PICTURES)


# --- stops, at steps that are chosen


def at_step(monkeypatch: pytest.MonkeyPatch, number: int, act: Callable[[], object]) -> None:
    """Act when ``number`` steps are done."""
    one_step = Trainer.one_step

    def step_and_act(self: Trainer, indices: torch.Tensor) -> None:
        one_step(self, indices)
        if self.state.step == number:
            act()

    monkeypatch.setattr(Trainer, "one_step", step_and_act)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, pictures: Path) -> Path:
    """A run that nobody disturbed."""
    run = tmp_path_factory.mktemp("whole") / "run"
    assert main([*RECIPE, "--data", str(pictures), "--out", str(run)]) == 0
    return run


def assert_finishes_as(run: Path, whole: Path) -> None:
    assert main(["--resume", str(run), "--threads=1"]) == 0
    expected = tensors_of(whole)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in tensors_of(run).items())
    assert [line["val_loss"] for line in read_lines(run)] == [line["val_loss"] for line in read_lines(whole)]
    reports = [json.loads((folder / "report.json").read_text()) for folder in (run, whole)]
    assert reports[0]["test"] == reports[1]["test"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_after_the_step(
    tmp_path: Path,
    pictures: Path,
    whole: Path,
    without_curves: None,
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
) -> None:
    run = tmp_path / "run"
    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    at_step(monkeypatch, 4, lambda: signal.raise_signal(number))
    assert main([*RECIPE, "--data", str(pictures), "--out", str(run)]) == 3
    assert checkpoint.load(run / "last.safetensors")[1].step == 4
    assert handlers == [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    assert_finishes_as(run, whole)


def test_a_second_ctrl_c_stops_at_once(
    tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def twice() -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    at_step(monkeypatch, 2, twice)
    assert main([*RECIPE, "--data", str(pictures), "--out", str(tmp_path / "run")]) == 130
    assert "interrupted" in capsys.readouterr().err
    assert not (tmp_path / "run" / "last.safetensors").exists()


def test_ctrl_c_while_the_data_is_read(
    tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("training.data.load", lambda *_args, **_kwargs: signal.raise_signal(signal.SIGINT))
    assert main([*RECIPE, "--data", str(pictures), "--out", str(tmp_path / "run")]) == 130
    assert capsys.readouterr().err.startswith("interrupted")


def test_minutes_and_steps_bound_a_run(tmp_path: Path, pictures: Path, whole: Path, without_curves: None) -> None:
    run = tmp_path / "run"
    assert main([*RECIPE, "--data", str(pictures), "--out", str(run), "--max-minutes=1e-9"]) == 3
    assert checkpoint.load(run / "last.safetensors")[1].step == 0
    assert main(["--resume", str(run), "--max-steps=5", "--threads=1"]) == 3
    assert checkpoint.load(run / "last.safetensors")[1].step == 5
    assert_finishes_as(run, whole)


# --- what the user gets wrong


Arrange = Callable[[Path, Path], list[str]]


def no_data_there(folder: Path, pictures: Path) -> list[str]:
    return ["--data", str(folder / "nowhere")]


def empty_class(folder: Path, pictures: Path) -> list[str]:
    shutil.copytree(pictures, folder / "data")
    for path in (folder / "data" / "train" / "bee").iterdir():
        path.unlink()
    return ["--data", str(folder / "data")]


def unreadable_picture(folder: Path, pictures: Path) -> list[str]:
    shutil.copytree(pictures, folder / "data")
    (folder / "data" / "train" / "cat" / "002.png").write_bytes(b"no picture")
    return ["--data", str(folder / "data")]


def run_is_there(folder: Path, pictures: Path) -> list[str]:
    (folder / "run").mkdir()
    (folder / "run" / "last.safetensors").write_bytes(b"")
    return ["--data", str(pictures)]


def a_file_in_its_place(folder: Path, pictures: Path) -> list[str]:
    (folder / "run").write_text("")
    return ["--data", str(pictures)]


def below_a_file(folder: Path, pictures: Path) -> list[str]:
    (folder / "file").write_text("")
    return ["--data", str(pictures), "--out", str(folder / "file" / "run")]


WRONG: dict[str, tuple[Arrange, str]] = {
    "no data there": (no_data_there, "nowhere: does not exist; --data takes a folder"),
    "class without pictures": (empty_class, "bee: this class folder has no pictures"),
    "unreadable picture": (unreadable_picture, "002.png: this picture cannot be read"),
    "run is there": (run_is_there, "run holds a run already: go on with it by --resume"),
    "file in its place": (a_file_in_its_place, "is a file; name a folder for the run"),
    "below a file": (below_a_file, "file/run: Not a directory"),
}


@pytest.mark.parametrize(("arrange", "message"), WRONG.values(), ids=WRONG.keys())
def test_wrong_data_and_folders(
    tmp_path: Path, pictures: Path, capsys: pytest.CaptureFixture[str], arrange: Arrange, message: str
) -> None:
    assert main([*RECIPE, "--out", str(tmp_path / "run"), *arrange(tmp_path, pictures)]) == 2
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert message in error
    assert not (tmp_path / "run" / "config.json").exists()


def emptied(run: Path) -> None:
    shutil.rmtree(run)


def without_checkpoint(run: Path) -> None:
    (run / "last.safetensors").unlink()


def with_broken_config(run: Path) -> None:
    (run / "config.json").write_text('{"preset": "compact"')


def with_truncated_checkpoint(run: Path) -> None:
    path = run / "last.safetensors"
    path.write_bytes(path.read_bytes()[:-10])


def of_another_preset(run: Path) -> None:
    config = json.loads((run / "config.json").read_text())
    config["preset"] = "reference"
    config["model"]["self_heads"] = 4
    (run / "config.json").write_text(json.dumps(config))


def with_another_class(run: Path) -> None:
    data = Path(json.loads((run / "config.json").read_text())["data"])
    shutil.copytree(data, run / "data")
    (run / "data" / "train" / "cat").rename(run / "data" / "train" / "cow")
    shutil.rmtree(run / "data" / "val" / "cat")
    shutil.rmtree(run / "data" / "test" / "cat")


def with_another_picture(run: Path) -> None:
    data = Path(json.loads((run / "config.json").read_text())["data"])
    shutil.copytree(data, run / "data")
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(run / "data" / "train" / "cat" / "new.png")


UNRESUMABLE: dict[str, tuple[Callable[[Path], None], list[str], str]] = {
    "no run": (emptied, [], "is no run; it has no config.json"),
    "no checkpoint yet": (without_checkpoint, [], "ended before its first checkpoint; start it again with --out"),
    "broken configuration": (with_broken_config, [], "config.json is not of this version of the project"),
    "broken checkpoint": (with_truncated_checkpoint, [], "last.safetensors: damaged or not a safetensors file"),
    "another preset": (of_another_preset, [], r"another configuration (preset compact) than"),
    "another preset's flag": (lambda run: None, ["--preset=reference"], "leave out --preset, or start a new run"),
    "conflicting flags": (lambda run: None, ["--epochs=9", "--dim=8"], "leave out --epochs, --dim, or start a new run"),
    "other classes": (with_another_class, ["--data=DATA"], "the data now has other classes than when"),
    "other pictures": (with_another_picture, ["--data=DATA"], "began with 24 training pictures, and now there are 25"),
}


@pytest.mark.parametrize(("spoil", "flags", "message"), UNRESUMABLE.values(), ids=UNRESUMABLE.keys())
def test_runs_that_cannot_be_resumed(
    tmp_path: Path,
    whole: Path,
    capsys: pytest.CaptureFixture[str],
    spoil: Callable[[Path], None],
    flags: list[str],
    message: str,
) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    spoil(run)
    flags = [flag.replace("DATA", str(run / "data")) for flag in flags]
    assert main(["--resume", str(run), *flags]) == 2
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert message in error


def raise_out_of_memory() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")


EXHAUSTED: dict[str, Callable[[], object]] = {
    "torch on a CPU": lambda: torch.empty(2**62, dtype=torch.uint8),
    "torch on a GPU": raise_out_of_memory,
    "numpy": lambda: np.empty(2**62, np.uint8),
}


@pytest.mark.parametrize("exhaust", EXHAUSTED.values(), ids=EXHAUSTED.keys())
def test_too_little_memory_for_the_batch(
    tmp_path: Path,
    pictures: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    exhaust: Callable[[], object],
) -> None:
    run = [*RECIPE, "--data", str(pictures), "--out", str(tmp_path / "run")]
    with monkeypatch.context() as patched:
        at_step(patched, 1, exhaust)
        assert main(run) == 2
    error = capsys.readouterr().err
    assert "error: too little memory for a batch of 8 pictures: start with a lower --batch-size" in error
    # Nothing stands in the way of the advice.
    assert main([*run, "--batch-size=4", "--max-steps=1"]) == 3


def test_too_little_memory_for_the_data(
    tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("training.data.load", lambda *_args, **_kwargs: np.empty(2**62, np.uint8))
    assert main([*RECIPE, "--data", str(pictures), "--out", str(tmp_path / "run")]) == 2
    assert "error: too little memory for the data" in capsys.readouterr().err


def test_other_errors_are_not_taken_for_want_of_memory(
    tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_step(monkeypatch, 1, lambda: torch.ones(2) @ torch.ones(3))
    with pytest.raises(RuntimeError, match="inconsistent tensor size"):
        main([*RECIPE, "--data", str(pictures), "--out", str(tmp_path / "run")])


def test_a_loss_that_bursts_is_told(
    tmp_path: Path, pictures: Path, capsys: pytest.CaptureFixture[str], without_curves: None
) -> None:
    run = [*RECIPE, "--data", str(pictures), "--out", str(tmp_path / "run")]
    burst = ["--optimizer=adamw", "--learning-rate=1e30", "--clip-norm=0", "--schedule=plateau"]
    assert main([*run, *burst]) == 1
    assert "lower --learning-rate, or set --clip-norm 1" in capsys.readouterr().err


def test_cuda_that_is_not_there(
    pictures: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert main(["--data", str(pictures), "--device=cuda"]) == 2
    assert "error: --device cuda: torch sees no CUDA device; use --device cpu" in capsys.readouterr().err
