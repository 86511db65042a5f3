"""``python -m training`` from flags to files: whole runs, stops and resumes."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.training.commands import RECIPE, at_step
from training import checkpoint
from training.__main__ import main
from training.metrics_log import read_metrics
from training.report_schema import CURVES, PLOTS


def command(*flags: str | Path) -> list[str]:
    return [sys.executable, "-m", "training", *map(str, flags)]


def tensors_of(run: Path) -> dict[str, torch.Tensor]:
    return checkpoint.load(run / "last.safetensors")[0]


# --- whole runs


def test_a_run_leaves_its_folder(tmp_path: Path, image_dir: Path) -> None:
    run = tmp_path / "runs" / "tiny"
    flags = command(*RECIPE, "--data", image_dir, "--out", run)
    done = subprocess.run(flags, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    config = json.loads((run / "config.json").read_text())
    assert (config["preset"], config["labels"], config["train"]["epochs"]) == ("compact", ["ant", "bee", "cat"], 2)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2]
    assert {"train_loss", "val_loss", "val_top1", "val_top5", "learning_rate", "pictures_per_second"} <= lines[0].keys()
    assert (lines[0]["device"], lines[0]["processes"], lines[0]["threads"]) == ("cpu", 1, 1)
    (events,) = (run / "tensorboard").iterdir()
    assert b"val_top1" in events.read_bytes()
    for name in (CURVES, *PLOTS):
        with Image.open(run / name) as image:
            assert image.format == "PNG"
    assert checkpoint.load(run / "last.safetensors")[1].epoch == 2
    best = checkpoint.load(run / "best.safetensors")[1]
    report = json.loads((run / "report.json").read_text())
    assert (report["epoch"], report["test"]["split"], report["test"]["n"]) == (best.epoch, "test", 6)
    assert report["checkpoint_sha256"] == checkpoint.digest(run / "best.safetensors")
    # On the terminal: what is trained, its precision, a line for each epoch, the figures; on stderr the bar.
    first, second, *rest = done.stdout.splitlines()
    assert second.startswith(f"precision {config['train']['precision']}, since the cpu device ")
    assert "24 training and 9 validation images of 3 classes, each of 8 x 8 pixels, 1 x cpu, 3 steps an epoch" in first
    assert [line.split()[:2] for line in rest[:2]] == [["epoch", "1"], ["epoch", "2"]]
    assert '"top1"' in done.stdout
    assert "top5" not in done.stdout.replace("-", "")  # of three classes it says nothing
    assert (run / "training_images.npy").is_file()
    for shown in ("epoch 1/2", "images/s", "24.0"):
        assert shown in done.stderr
    assert "Warning" not in done.stderr


def test_ctrl_c_stops_with_a_checkpoint(
    tmp_path: Path, image_dir: Path, without_figures: None, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    flags = command(*RECIPE, "--data", image_dir, "--out", run, "--epochs=1000")
    with subprocess.Popen(flags, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
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
    for name in ("report.json", *PLOTS):
        (run / name).unlink()
    assert main(["--resume", str(run), "--threads=1"]) == 0
    assert (run / "report.json").read_bytes() == (whole / "report.json").read_bytes()
    assert (run / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    assert all((run / name).is_file() for name in PLOTS)


# --- stops, at steps that are chosen


def assert_finishes_as(run: Path, whole: Path) -> None:
    assert main(["--resume", str(run), "--threads=1"]) == 0
    expected = tensors_of(whole)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in tensors_of(run).items())
    assert [line["val_loss"] for line in read_metrics(run)] == [line["val_loss"] for line in read_metrics(whole)]
    reports = [json.loads((folder / "report.json").read_text()) for folder in (run, whole)]
    assert reports[0]["test"] == reports[1]["test"]


def test_what_goes_on_with_a_run_names_where_its_images_are_now_and_what_computes(
    tmp_path: Path, image_dir: Path, without_figures: None, capsys: pytest.CaptureFixture[str]
) -> None:
    run, old, new = tmp_path / "run", tmp_path / "old", tmp_path / "new"
    shutil.copytree(image_dir, old)
    assert main([*RECIPE, "--data", str(old), "--out", str(run), "--max-steps=1"]) == 3
    assert f"go on with: python -m training --resume {run} --threads 1 --device cpu\n" in capsys.readouterr().out
    old.rename(new)
    resume = ["--resume", str(run), "--data", str(new), "--threads=1"]
    assert main([*resume, "--max-steps=2"]) == 3
    again = capsys.readouterr().out.partition("go on with: python -m training ")[2].split()
    assert again == ["--resume", str(run), "--data", str(new), "--threads", "1"]
    assert main(again) == 0
    assert f"export: python -m export {run} --data {new} --out models/NAME" in capsys.readouterr().out


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_stops_after_the_step(
    tmp_path: Path,
    image_dir: Path,
    whole: Path,
    without_figures: None,
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
) -> None:
    if signal.getsignal(number) is signal.SIG_IGN:
        pytest.skip("nohup has the tests ignore it, and what they start")
    run = tmp_path / "run"
    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    at_step(monkeypatch, 4, lambda: signal.raise_signal(number))
    assert main([*RECIPE, "--data", str(image_dir), "--out", str(run)]) == 3
    assert checkpoint.load(run / "last.safetensors")[1].step == 4
    assert handlers == [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    assert_finishes_as(run, whole)


def test_a_second_ctrl_c_stops_at_once(
    tmp_path: Path, image_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def twice() -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    at_step(monkeypatch, 2, twice)
    assert main([*RECIPE, "--data", str(image_dir), "--out", str(tmp_path / "run")]) == 130
    assert "interrupted" in capsys.readouterr().err
    assert not (tmp_path / "run" / "last.safetensors").exists()


def test_ctrl_c_while_the_data_is_read(
    tmp_path: Path, image_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("training.data.load.load", lambda *_args, **_kwargs: signal.raise_signal(signal.SIGINT))
    assert main([*RECIPE, "--data", str(image_dir), "--out", str(tmp_path / "run")]) == 130
    assert capsys.readouterr().err.startswith("interrupted")


def test_minutes_and_steps_bound_a_run(tmp_path: Path, image_dir: Path, whole: Path, without_figures: None) -> None:
    run = tmp_path / "run"
    assert main([*RECIPE, "--data", str(image_dir), "--out", str(run), "--max-minutes=1e-9"]) == 3
    assert checkpoint.load(run / "last.safetensors")[1].step == 0
    assert main(["--resume", str(run), "--max-steps=5", "--threads=1"]) == 3
    assert checkpoint.load(run / "last.safetensors")[1].step == 5
    assert_finishes_as(run, whole)
