"""User errors are answered in one sentence, and nothing is written."""

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from export import build
from export.__main__ import main
from export.card.model_card import evaluation
from export.source import load_source
from service.repository.folder import list_versions
from tests.export.conftest import LABELS, write_run
from tests.fakes import make_model_folder
from tests.training.tiny import ALONE, data_set, run_config
from training import checkpoint
from training.config import ModelConfig, exportable_presets
from training.report_schema import Report
from training.train import Trainer

pytestmark = pytest.mark.usefixtures("translated_once")


def fails(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    return captured.err


def test_a_run_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "does not exist" in fails([str(tmp_path / "none"), "--out", str(tmp_path / "out")], capsys)
    assert not (tmp_path / "out").exists()


def test_a_version_is_no_place_for_versions(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    version = tmp_path / "things" / "3"
    version.mkdir(parents=True)
    (version / "model.onnx").touch()
    said = fails([str(run), "--out", str(version)], capsys)
    assert f"3: is one version of a model; name the folder of its versions, --out {tmp_path / 'things'}." in said


def test_a_folder_without_a_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = fails([str(tmp_path), "--out", str(tmp_path / "out")], capsys)
    assert f"{tmp_path}: holds no checkpoint; name a run's folder, a model folder with" in said


def test_a_damaged_checkpoint(copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = copy / "best.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert "damaged" in fails([str(copy), "--out", str(tmp_path / "out")], capsys)


def test_a_report_that_is_none(copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (copy / "report.json").write_text('{"epoch": "many"}')
    assert "report.json: is not a report" in fails([str(copy), "--out", str(tmp_path / "out")], capsys)


def test_a_version_whose_own_report_is_none(
    copy: Path, image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And a model folder stands for its newest version, which does not tell where the data lie."""
    out = tmp_path / "things"
    arguments = ["--golden", "2", "--max-batch", "2", "--variants", "--data", str(image_folder)]
    assert main([str(copy), "--out", str(out), *arguments]) == 0
    assert main([str(out), "--out", str(tmp_path / "again"), *arguments]) == 0
    again, first = (load_source(folder) for folder in (out, copy))
    assert (again.checkpoint_sha256, again.metrics) == (first.checkpoint_sha256, first.metrics)
    (out / "1" / "metrics.json").write_text('{"report": {"epoch": "many"}}')
    error = fails([str(out), "--out", str(tmp_path / "again"), *arguments], capsys)
    assert f"{out / '1' / 'metrics.json'}: is not a report of this project" in error


def test_a_report_of_another_checkpoint_gives_no_temperature(copy: Path) -> None:
    report = json.loads((copy / "report.json").read_text())
    (copy / "report.json").write_text(json.dumps(report | {"checkpoint_sha256": "0" * 64}))
    source = load_source(copy)
    assert "about another checkpoint" in source.warnings[0]
    assert source.temperature == 1.0
    assert source.metrics is not None
    assert source.metrics.split == "val"
    assert "Temperature 1.0000" in evaluation(source)
    assert "test" not in evaluation(source)


def test_a_run_without_a_report_says_so(copy: Path) -> None:
    (copy / "report.json").unlink()
    source = load_source(copy)
    assert "holds no report, so the model gets no temperature and no test metrics" in source.warnings[0]
    assert source.temperature == 1.0


def test_data_that_have_gone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run", tmp_path / "gone")
    assert "name its folder by --data" in fails([str(run), "--out", str(tmp_path / "out")], capsys)


def test_no_download_for_golden_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    run = write_run(tmp_path / "run", None)
    assert "name its folder by --data" in fails([str(run), "--out", str(tmp_path / "out")], capsys)


def test_data_of_other_classes(
    copy: Path, tmp_path: Path, image_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    others = Path(shutil.copytree(image_folder, tmp_path / "others"))
    for split in ("train", "val"):
        (others / split / LABELS[0]).rename(others / split / "zebra")
    arguments = [str(copy), "--out", str(tmp_path / "out"), "--data", str(others)]
    assert "other classes" in fails(arguments, capsys)


def test_a_folder_whose_model_has_other_classes(copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The service that watches it would answer with other labels seconds later."""
    served = make_model_folder(tmp_path / "served")
    (served.parent / "2").mkdir()  # which can't be served
    arguments = [str(copy), "--out", str(served.parent), "--golden", "2", "--max-batch", "2", "--variants"]
    error = fails(arguments, capsys)
    assert "its newest version has other classes than this model" in error
    assert "name another --out, or pass --other-classes" in error
    assert main([*arguments, "--other-classes"]) == 0
    assert main(arguments) == 0  # the newest version has them now


def test_a_folder_whose_model_has_a_higher_top1(copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The service that watches it would answer worse seconds later."""
    out = tmp_path / "served"
    arguments = [str(copy), "--out", str(out), "--golden", "2", "--max-batch", "2", "--variants"]

    def reporting(**figures: float) -> list[str]:
        report = Report.model_validate_json((copy / "report.json").read_text())
        report = report.model_copy(update={"val": report.val.model_copy(update=figures)})
        (copy / "report.json").write_text(report.model_dump_json())
        return arguments

    assert main(reporting(top1=0.4)) == 0
    assert main(reporting(top1=0.4)) == 0  # as good
    error = fails(reporting(top1=0.39), capsys)
    assert (
        "its newest version has a top-1 of 40.00% on validation images and this model, which would be served" in error
    )
    assert "of 39.00%; name another --out, or pass --even-if-worse." in error
    assert len(list_versions(out)) == 2
    assert main(reporting(n=31)) == 0  # other images: chance may be the reason
    assert main(reporting(n=20)) == 0
    assert fails(reporting(n=10_000, top1=0.01), capsys)  # but not of this
    assert fails(reporting(n=20, top1=0.38), capsys)
    assert main([*arguments, "--even-if-worse"]) == 0
    (copy / "report.json").unlink()
    assert main(arguments) == 0  # the checkpoint has the validation figures: 50 %
    tensors, header = checkpoint.load(copy / "best.safetensors")
    checkpoint.save(copy / "best.safetensors", tensors, header.model_copy(update={"val": None}))
    error = fails(arguments, capsys)
    assert "its newest version has a top-1 of 50.00% on validation images. That of this model" in error
    assert "its checkpoint was written within an epoch. Name the run's best.safetensors" in error


def test_data_that_have_changed_since_the_run(
    copy: Path, tmp_path: Path, image_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A validation image may be a training image of the run: good as a golden image, not for a variant's gate."""
    arguments = [str(copy), "--out", str(tmp_path / "out"), "--golden", "2", "--max-batch", "2"]
    tensors, header = checkpoint.load(copy / "best.safetensors")
    run = header.run.model_copy(update={"pictures_sha256": "0" * 64})
    checkpoint.save(copy / "best.safetensors", tensors, header.model_copy(update={"run": run}))
    (copy / "report.json").unlink()
    assert "other images than in training, so it can't judge int8" in fails([*arguments, "--variants", "int8"], capsys)
    for more, judged in ((["--variants"], ""), ([], ", and no int8 file is tried")):
        assert main([*arguments, *more]) == 0
        told = capsys.readouterr().out
        assert "warning: the data set has other images than in training; the golden images" in told
        assert f"are taken from it{judged}." in told
        assert "int8: not written" not in told


def test_a_report_that_is_no_text(copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (copy / "report.json").write_bytes(b"\xff\xfe")
    assert "report.json: can't be read" in fails([str(copy), "--out", str(tmp_path / "out")], capsys)


def test_ctrl_c_is_no_traceback(
    copy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("export.__main__.export", interrupted)
    assert main([str(copy), "--out", "out"]) == 130
    assert capsys.readouterr().err == "interrupted; nothing was written\n"


def test_a_preset_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    error = fails(["--random", "huge", "--out", str(tmp_path / "out")], capsys)
    assert f"choose one of {', '.join(exportable_presets())}." in error


def test_a_convolutional_teacher_is_not_exported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ["--out", str(tmp_path / "out")]
    assert "choose one of reference, compact, photo, accurate." in fails(["--random", "teacher", *out], capsys)
    residual = ModelConfig(network="residual", num_classes=3, input_size=8, image_size=8, dim=8, num_blocks=1)
    taught = run_config().model_copy(update={"model": residual})
    folder = tmp_path / "run"
    folder.mkdir()
    trainer = Trainer(taught, data_set(), folder, ALONE)
    assert trainer.keep_initial()
    assert f"{folder}: is a residual network, which teaches" in fails([str(folder), *out], capsys)


def test_a_folder_that_can_not_be_written(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    arguments = [str(run), "--out", str(tmp_path / "file" / "out"), "--golden", "2", "--max-batch", "2"]
    assert "is not a writable folder" in fails(arguments, capsys)


@pytest.mark.parametrize(
    ("names", "said"), [((), "No space left on device."), (("/tmp/x/model.onnx",), "/tmp/x/model.onnx: No space left")]
)
def test_a_disk_without_room_for_temporary_files(
    copy: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    names: Any,
    said: str,
) -> None:
    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), *names)

    monkeypatch.setattr(build, "to_onnx", full)
    error = fails([str(copy), "--out", str(tmp_path / "out"), "--golden", "2", "--max-batch", "2"], capsys)
    assert error.startswith(f"error: {said}")
    assert not (tmp_path / "out").exists()


def test_a_model_without_a_name(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "name:" in fails([str(run), "--out", str(tmp_path / "out"), "--name", ""], capsys)


def test_nothing_to_verify(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "holds no model" in fails(["--verify", str(tmp_path)], capsys)


def test_a_damaged_model_is_not_verified(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "model.onnx").write_bytes(b"no model")
    assert "golden.npz" in fails(["--verify", str(tmp_path)], capsys)


@pytest.mark.parametrize(
    "arguments", [[], ["run"], ["run", "--random", "compact", "--out", "x"], ["run", "--out", "x", "--golden", "0"]]
)
def test_wrong_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert "usage:" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run", "--out", "x", "--provider", "cuda"], "RUN does not take --provider; leave"),
        (["--random", "compact", "--out", "x", "--data", "y"], "--random does not take --data; leave"),
        (
            ["--verify", "x", "--variants", "--even-if-worse"],
            "--verify does not take --variants, --even-if-worse; leave",
        ),
        (["--verify", "x", "--golden", "64"], "--verify does not take --golden; leave"),
    ],
)
def test_flags_without_effect_are_refused(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err


def test_a_checkpoint_that_a_run_replaces_meanwhile(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:

    def to_onnx(*args: Any) -> Any:
        tensors, header = checkpoint.load(copy / "best.safetensors")
        checkpoint.save(copy / "best.safetensors", tensors, header.model_copy(update={"epoch": 3}))
        return original(*args)

    original = build.to_onnx
    monkeypatch.setattr(build, "to_onnx", to_onnx)
    error = fails(
        [str(copy), "--out", str(tmp_path / "out"), "--golden", "2", "--max-batch", "2", "--variants"], capsys
    )
    assert "was changed during the export" in error
    assert not list((tmp_path / "out").iterdir())


def test_a_run_that_is_removed_meanwhile(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is missing is said, and not that the model's folder can't be written to."""

    def to_onnx(*args: Any) -> Any:
        shutil.rmtree(copy)
        return original(*args)

    original = build.to_onnx
    monkeypatch.setattr(build, "to_onnx", to_onnx)
    arguments = [str(copy), "--out", str(tmp_path / "out"), "--golden", "2", "--max-batch", "2", "--variants"]
    assert f"{copy / 'best.safetensors'}: was removed during the export" in fails(arguments, capsys)
    assert not list((tmp_path / "out").iterdir())


def test_weights_that_are_not_finite(copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors, header = checkpoint.load(copy / "best.safetensors")
    tensors["model.latents"][0, 0] = torch.nan
    checkpoint.save(copy / "best.safetensors", tensors, header)
    error = fails([str(copy), "--out", str(tmp_path / "out"), "--variants"], capsys)
    assert f"{copy / 'best.safetensors'}: gives logits that are not finite" in error


def test_a_version_that_another_export_writes_meanwhile_is_compared_too(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both began when the folder was empty, and the worse one ends last."""
    out = tmp_path / "out"
    arguments = ["--out", str(out), "--golden", "2", "--max-batch", "2", "--variants"]
    better = Path(shutil.copytree(copy, tmp_path / "better"))
    report = Report.model_validate_json((copy / "report.json").read_text())
    report = report.model_copy(update={"val": report.val.model_copy(update={"top1": 0.9})})
    (better / "report.json").write_text(report.model_dump_json())

    def build_slowly(*args: Any) -> Any:
        monkeypatch.setattr(build, "build", original)
        assert main([str(better), *arguments]) == 0
        return original(*args)

    original = build.build
    monkeypatch.setattr(build, "build", build_slowly)
    assert "its newest version has a top-1 of 90.00% on validation images" in fails([str(copy), *arguments], capsys)
    assert [version.number for version in list_versions(out)] == [1]
