"""What the user of ``python -m training`` gets wrong, and what the machine lacks."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.training.commands import RECIPE, at_step, fake_cpu
from training import train
from training.__main__ import main
from training.run_dir import lock_run_dir

Arrange = Callable[[Path, Path], list[str]]


def no_data_there(folder: Path, image_dir: Path) -> list[str]:
    return ["--data", str(folder / "nowhere")]


def empty_class(folder: Path, image_dir: Path) -> list[str]:
    shutil.copytree(image_dir, folder / "data")
    for path in (folder / "data" / "train" / "bee").iterdir():
        path.unlink()
    return ["--data", str(folder / "data")]


def unreadable_image(folder: Path, image_dir: Path) -> list[str]:
    shutil.copytree(image_dir, folder / "data")
    (folder / "data" / "train" / "cat" / "002.png").write_bytes(b"no image")
    return ["--data", str(folder / "data")]


def run_is_there(folder: Path, image_dir: Path) -> list[str]:
    (folder / "run").mkdir()
    (folder / "run" / "last.safetensors").write_bytes(b"")
    return ["--data", str(image_dir)]


def ended_run_is_there(folder: Path, image_dir: Path) -> list[str]:
    (folder / "run").mkdir()
    (folder / "run" / "report.json").write_text("{}")
    return ["--data", str(image_dir)]


def misnamed_validation(folder: Path, image_dir: Path) -> list[str]:
    shutil.copytree(image_dir, folder / "data")
    (folder / "data" / "val").rename(folder / "data" / "valid")
    return ["--data", str(folder / "data")]


def name_that_is_not_utf8(folder: Path, image_dir: Path) -> list[str]:
    shutil.copytree(image_dir, folder / "data")
    (folder / "data" / "train" / "cat").rename(folder / "data" / "train" / os.fsdecode(b"caf\xe9"))
    return ["--data", str(folder / "data")]


def a_file_in_its_place(folder: Path, image_dir: Path) -> list[str]:
    (folder / "run").write_text("")
    return ["--data", str(image_dir)]


def among_the_classes(folder: Path, image_dir: Path) -> list[str]:
    return ["--data", str(image_dir), "--out", str(image_dir / "val" / ".." / "train" / "run")]


def among_images_of_another_split(folder: Path, image_dir: Path) -> list[str]:
    return ["--data", str(image_dir), "--out", str(image_dir / "test" / "run")]


def folder_that_is_not_utf8(folder: Path, image_dir: Path) -> list[str]:
    return ["--data", str(shutil.copytree(image_dir, folder / os.fsdecode(b"caf\xe9")))]


def below_a_file(folder: Path, image_dir: Path) -> list[str]:
    (folder / "file").write_text("")
    return ["--data", str(image_dir), "--out", str(folder / "file" / "run")]


def among_other_files(folder: Path, image_dir: Path) -> list[str]:
    (folder / "run").mkdir()
    (folder / "run" / "thesis.tex").write_text("")
    return ["--data", str(image_dir)]


WRONG: dict[str, tuple[Arrange, str]] = {
    "no data there": (no_data_there, "nowhere: does not exist; --data takes a folder"),
    "class without images": (empty_class, "bee: this class folder has no images"),
    "unreadable image": (unreadable_image, "002.png: this image cannot be read"),
    "run is there": (run_is_there, "run holds a run already: go on with it by --resume"),
    "ended run is there": (ended_run_is_there, "holds a run that has ended, without last.safetensors: name another"),
    "misnamed validation": (misnamed_validation, "valid: is passed over under this name; rename it val, or remove it"),
    "name that is not UTF-8": (name_that_is_not_utf8, r"'caf\udce9' is not UTF-8; rename it"),
    "file in its place": (a_file_in_its_place, "is a file; name a folder for the run"),
    "among other files": (among_other_files, "run: holds other files; name a folder of the run's own"),
    "among the classes": (among_the_classes, "where each folder is a class; name a folder elsewhere"),
    "among images of another split": (among_images_of_another_split, "/test, where each folder is a class; name"),
    "folder that is not UTF-8": (folder_that_is_not_utf8, "this path is not UTF-8, which the run's configuration is"),
    "below a file": (below_a_file, "file/run: Not a directory"),
}


@pytest.mark.parametrize(("arrange", "message"), WRONG.values(), ids=WRONG.keys())
def test_wrong_data_and_folders(
    tmp_path: Path, image_dir: Path, capsys: pytest.CaptureFixture[str], arrange: Arrange, message: str
) -> None:
    assert main([*RECIPE, "--out", str(tmp_path / "run"), *arrange(tmp_path, image_dir)]) == 2
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert message in error
    assert not (tmp_path / "run" / "config.json").exists()


def emptied(run: Path) -> None:
    shutil.rmtree(run)


def without_checkpoint(run: Path) -> None:
    for name in ("last.safetensors", "best.safetensors", "report.json"):
        (run / name).unlink()


def stopped_and_without_checkpoint(run: Path) -> None:
    (run / "last.safetensors").unlink()
    (run / "report.json").unlink()


def ended_and_without_checkpoint(run: Path) -> None:
    (run / "last.safetensors").unlink()


def with_best_in_its_place(run: Path) -> None:
    shutil.copyfile(run / "best.safetensors", run / "last.safetensors")


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


def with_another_image(run: Path) -> None:
    data = Path(json.loads((run / "config.json").read_text())["data"])
    shutil.copytree(data, run / "data")
    first = min((run / "data" / "train" / "cat").iterdir())
    Image.fromarray(255 - np.asarray(Image.open(first))).save(first)


UNRESUMABLE: dict[str, tuple[Callable[[Path], None], list[str], str]] = {
    "no run": (emptied, [], "is no run; it has no config.json"),
    "no checkpoint yet": (without_checkpoint, [], "ended before its first checkpoint; start it again with --out"),
    "checkpoint gone": (ended_and_without_checkpoint, [], "has ended, and its last.safetensors is gone; export it"),
    "best alone left": (stopped_and_without_checkpoint, [], "has stopped, and its last.safetensors is gone; export it"),
    "best in its place": (with_best_in_its_place, [], "holds weights alone (as best does); to begin with them, use"),
    "broken configuration": (with_broken_config, [], "config.json is not of this version of the project"),
    "broken checkpoint": (with_truncated_checkpoint, [], "last.safetensors: damaged or not a safetensors file"),
    "another preset": (of_another_preset, [], r"another configuration (preset compact) than"),
    "another preset's flag": (lambda run: None, ["--preset=reference"], "leave out --preset, or start a new run"),
    "conflicting flags": (lambda run: None, ["--epochs=9", "--dim=8"], "leave out --epochs, --dim, or start a new run"),
    "other classes": (with_another_class, ["--data=DATA"], "the data now has other classes than when"),
    "other images": (with_another_image, ["--data=DATA"], "the data now has other images than when"),
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


def raise_error(error: Exception) -> None:
    raise error


EXHAUSTED: dict[str, Callable[[], object]] = {
    "torch on a CPU": lambda: torch.empty(2**62, dtype=torch.uint8),
    "torch on a GPU": raise_out_of_memory,
    "cuBLAS": lambda: raise_error(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`")),
    "CUDA": lambda: raise_error(torch.AcceleratorError("CUDA error: out of memory")),
    "numpy": lambda: np.empty(2**62, np.uint8),
}


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("exhaust", EXHAUSTED.values(), ids=EXHAUSTED.keys())
def test_too_little_memory_for_the_batch(
    tmp_path: Path,
    image_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    exhaust: Callable[[], object],
    native: bool,
) -> None:
    run = [*RECIPE, "--data", str(image_dir), "--out", str(tmp_path / "run"), "--precision=bfloat16"]
    fake_cpu(monkeypatch, *(["avx512_bf16"] if native else []))
    with monkeypatch.context() as patched:
        at_step(patched, 1, exhaust)
        assert main(run) == 2
    error = capsys.readouterr().err
    assert "error: too little memory for a batch of 8 images: start with a lower --batch-size." in error
    # Nothing stands in the way of the advice.
    assert main([*run, "--batch-size=4", "--max-steps=1", "--precision=float32"]) == 3
    at_step(monkeypatch, 2, exhaust)
    assert main(["--resume", str(tmp_path / "run"), "--threads=1"]) == 2
    bfloat16 = ", or with --precision bfloat16" if native else ""
    advice = f"free some, or start with a lower --batch-size{bfloat16} and --init this run."
    assert f"too little memory for a batch of 4 images: {advice}" in capsys.readouterr().err


@pytest.mark.usefixtures("without_figures")
def test_a_run_that_another_process_writes(
    tmp_path: Path, image_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its first checkpoint comes at the end of an epoch, so until then nothing in the folder tells of it."""
    run = tmp_path / "run"
    command = [*RECIPE, "--data", str(image_dir), "--out", str(run), "--max-steps=2"]
    said = f"error: {run}: another training is writing to it; wait for its end, or name another --out."

    def try_too() -> None:
        config = (run / "config.json").read_text()
        assert main([*command, "--seed=1"]) == 2
        assert said in capsys.readouterr().err
        assert (run / "config.json").read_text() == config

    with monkeypatch.context() as patched:
        at_step(patched, 1, try_too)
        assert main(command) == 3
    with lock_run_dir(run):
        assert main(["--resume", str(run), "--threads=1"]) == 2
        assert said in capsys.readouterr().err
    assert main(["--resume", str(run), "--threads=1"]) == 0


def test_too_little_memory_for_the_data(
    tmp_path: Path, image_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("training.data.load.load", lambda *_args, **_kwargs: np.empty(2**62, np.uint8))
    assert main([*RECIPE, "--data", str(image_dir), "--out", str(tmp_path / "run")]) == 2
    assert "error: too little memory for the data" in capsys.readouterr().err


def test_too_little_memory_on_the_device_for_the_data(
    tmp_path: Path, image_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("training.data.dataset.Split.to", lambda split, device: raise_out_of_memory())
    assert main([*RECIPE, "--data", str(image_dir), "--out", str(tmp_path / "run")]) == 2
    assert "error: too little memory on the device for the images, which all lie there" in capsys.readouterr().err


def test_other_errors_are_not_taken_for_want_of_memory(
    tmp_path: Path, image_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_step(monkeypatch, 1, lambda: torch.ones(2) @ torch.ones(3))
    with pytest.raises(RuntimeError, match="inconsistent tensor size"):
        main([*RECIPE, "--data", str(image_dir), "--out", str(tmp_path / "run")])


def test_a_loss_that_bursts_is_told(
    tmp_path: Path, image_dir: Path, capsys: pytest.CaptureFixture[str], without_figures: None
) -> None:
    run = [*RECIPE, "--data", str(image_dir), "--out", str(tmp_path / "run")]
    burst = ["--optimizer=adamw", "--learning-rate=1e30", "--clip-norm=0", "--schedule=plateau"]
    assert main([*run, *burst]) == 1
    assert "lower --learning-rate, or set --clip-norm 1" in capsys.readouterr().err


def test_cuda_that_is_not_there(
    image_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert main(["--data", str(image_dir), "--device=cuda"]) == 2
    assert "error: --device cuda: torch sees no CUDA device; use --device cpu" in capsys.readouterr().err


def test_a_full_disk_is_told(
    tmp_path: Path, image_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(folder: Path, line: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(train, "append_metrics", full)
    assert main([*RECIPE, "--data", str(image_dir), "--out", str(tmp_path / "run")]) == 2
    assert "error: No space left on device: make room" in capsys.readouterr().err


def test_a_file_that_can_not_be_written_is_named(
    tmp_path: Path, image_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As TensorBoard's are: as bytes."""

    def refused(folder: Path, line: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system", os.fsencode(folder / "events"))

    monkeypatch.setattr(train, "append_metrics", refused)
    assert main([*RECIPE, "--data", str(image_dir), "--out", str(tmp_path / "run")]) == 2
    assert f"error: {tmp_path}/run/events: Read-only file system." in capsys.readouterr().err
