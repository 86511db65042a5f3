"""What the user gets wrong is answered in a sentence, and nothing is written."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from export import build
from export.__main__ import main
from export.card import figures, nothing_else
from export.making import first_epochs, origin, training_commands
from export.source import Source, load_source
from service.artifact import list_versions
from tests.export.conftest import LABELS, write_run
from tests.fakes import make_model_folder
from training import checkpoint
from training.checkpoint import Origin
from training.config import PRESETS
from training.figures import Report


def fails(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    return captured.err


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "run"))


def test_a_run_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "does not exist" in fails([str(tmp_path / "none"), "--out", str(tmp_path / "out")], capsys)
    assert not (tmp_path / "out").exists()


def test_a_folder_without_a_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "best.safetensors: no such checkpoint" in fails([str(tmp_path), "--out", str(tmp_path / "out")], capsys)


def test_a_damaged_checkpoint(copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = copy / "best.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert "damaged" in fails([str(copy), "--out", str(tmp_path / "out")], capsys)


def test_a_report_that_is_none(copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (copy / "report.json").write_text('{"epoch": "many"}')
    assert "report.json: is not a report" in fails([str(copy), "--out", str(tmp_path / "out")], capsys)


def test_a_report_of_another_checkpoint_gives_no_temperature(copy: Path) -> None:
    report = json.loads((copy / "report.json").read_text())
    (copy / "report.json").write_text(json.dumps(report | {"checkpoint_sha256": "0" * 64}))
    source = load_source(copy)
    assert "about another checkpoint" in source.notes[0]
    assert source.temperature == 1.0
    assert source.metrics is not None
    assert source.metrics.split == "val"
    assert "Temperature 1.0000" in figures(source)
    assert "test" not in figures(source)


def test_a_run_without_a_report_says_so(copy: Path) -> None:
    (copy / "report.json").unlink()
    source = load_source(copy)
    assert "there is no" in source.notes[0]
    assert source.temperature == 1.0


def test_data_that_have_gone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run", tmp_path / "gone")
    assert "name its folder by --data" in fails([str(run), "--out", str(tmp_path / "out")], capsys)


def test_no_download_for_golden_pictures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    run = write_run(tmp_path / "run", None)
    assert "name its folder by --data" in fails([str(run), "--out", str(tmp_path / "out")], capsys)


def test_data_of_other_classes(copy: Path, tmp_path: Path, pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    others = Path(shutil.copytree(pictures, tmp_path / "others"))
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
    assert "its newest version has not the classes of this model" in error
    assert "name another --out, or say --other-classes" in error
    assert main([*arguments, "--other-classes"]) == 0
    assert main(arguments) == 0  # the newest version has them now


def test_a_folder_whose_model_is_right_more_often(
    copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The service that watches it would answer worse seconds later."""
    out = tmp_path / "served"
    arguments = [str(copy), "--out", str(out), "--golden", "2", "--max-batch", "2", "--variants"]

    def reporting(**figures: float) -> list[str]:
        report = Report.model_validate_json((copy / "report.json").read_text())
        assert report.test is not None
        report = report.model_copy(update={"test": report.test.model_copy(update=figures)})
        (copy / "report.json").write_text(report.model_dump_json())
        return arguments

    assert main(reporting(top1=0.4)) == 0
    assert main(reporting(top1=0.4)) == 0  # as good
    error = fails(reporting(top1=0.39), capsys)
    assert "its newest version is right on 40.00% of the test pictures and this model, which would be served" in error
    assert "on 39.00%; name another --out, or say --even-if-worse." in error
    assert len(list_versions(out)) == 2
    assert main(reporting(n=31)) == 0  # other pictures, which say nothing
    assert main(reporting(n=30)) == 0
    assert fails(reporting(top1=0.38, n=30), capsys)
    assert main([*arguments, "--even-if-worse"]) == 0
    (copy / "report.json").unlink()  # nobody knows how often it is right
    assert main(arguments) == 0


def test_data_that_have_changed_since_the_run(
    copy: Path, tmp_path: Path, pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is a validation picture now may have been trained on: fit for golden pictures, not for a variant's gate."""
    arguments = [str(copy), "--out", str(tmp_path / "out"), "--golden", "2", "--max-batch", "2"]
    tensors, header = checkpoint.load(copy / "best.safetensors")
    run = header.run.model_copy(update={"pictures_sha256": "0" * 64})
    checkpoint.save(copy / "best.safetensors", tensors, header.model_copy(update={"run": run}))
    (copy / "report.json").unlink()
    assert "other pictures than the run was trained on, so it can't judge int8" in fails(
        [*arguments, "--variants", "int8"], capsys
    )
    for more, judged in ((["--variants"], ""), ([], ", and judges no int8 file")):
        assert main([*arguments, *more]) == 0
        told = capsys.readouterr().out
        assert "note: the data set has other pictures than the run was trained on; the golden pictures" in told
        assert f"from it as it is{judged}." in told
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
    assert f"there are {', '.join(PRESETS)}." in error


def test_a_folder_that_can_not_be_written(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    arguments = [str(run), "--out", str(tmp_path / "file" / "out"), "--golden", "2", "--max-batch", "2"]
    assert "is no folder that can be written to" in fails(arguments, capsys)


def test_a_model_without_a_name(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "name:" in fails([str(run), "--out", str(tmp_path / "out"), "--name", ""], capsys)


def told(run: Path, content: str) -> Source:
    (run / "metrics.jsonl").write_text(content)
    return load_source(run)


def test_of_a_metrics_file_what_is_whole_is_told(copy: Path) -> None:
    content = (copy / "metrics.jsonl").read_text()
    assert load_source(copy).training_seconds == 900
    assert told(copy, content[:-5]).training_seconds == 600  # the last epoch was cut off
    first = content.splitlines(keepends=True)[0]
    for damaged in (first, "", "no JSON\n", '{"seconds": 3}\n' * 3):  # epoch 2, of which the weights are, is missing
        source = told(copy, damaged)
        assert source.training_seconds is None
        assert origin(source) == "The weights of epoch 2."


def test_a_run_of_the_first_days_names_no_machine(copy: Path) -> None:
    lines = [{"epoch": epoch, "seconds": 30.0} for epoch in (1, 2)]
    source = told(copy, "".join(json.dumps(line) + "\n" for line in lines))
    assert origin(source) == "The weights of epoch 2 of 2. All 2 epochs took 60 s of training."
    assert next(training_commands(source)).startswith("python -m training --preset compact")
    assert first_epochs(source) == ""


def test_a_run_whose_later_epochs_name_the_machine(copy: Path) -> None:
    lines = [json.loads(line) for line in (copy / "metrics.jsonl").read_text().splitlines()]
    del lines[0]["device"]
    source = told(copy, "".join(json.dumps(line) + "\n" for line in lines))
    assert "on cpu, 2 processes of 1 thread (1 of the epochs do not tell on what)." in origin(source)
    assert next(training_commands(source)).startswith("torchrun --standalone --nproc-per-node 2 -m training")


def test_a_run_that_changed_machines_names_both(copy: Path) -> None:
    lines = [json.loads(line) for line in (copy / "metrics.jsonl").read_text().splitlines()]
    lines[2] |= {"device": "Some GPU", "processes": 1, "threads": 8}
    source = told(copy, "".join(json.dumps(line) + "\n" for line in lines))
    assert "on cpu, 2 processes of 1 thread and then Some GPU, 1 process." in origin(source)
    assert next(training_commands(source)).startswith("python -m training --preset compact")


def test_a_run_that_began_with_another_tells_the_way_from_the_beginning(copy: Path) -> None:
    source = load_source(copy)
    first = source.run.model_copy(update={"dataset": "animals", "preset": "reference"})
    init = Origin(checkpoint_sha256="f" * 64, epoch=9, git_commit="abc", run=first)
    source = replace(source, run=source.run.model_copy(update={"init": init}))
    before, after = training_commands(source)
    assert before.startswith("python -m training --preset reference --out runs/beginning-1 --data DATA/animals ")
    assert after.startswith(
        "torchrun --standalone --nproc-per-node 2 -m training --preset compact --threads 1 "
        "--init runs/beginning-1 --data DATA/things "
    )
    assert "They began with the weights that epoch 9 of another run left (preset `reference` on `animals`, " in origin(
        source
    )
    assert "distillation" not in origin(source)
    taught = source.run.model_copy(update={"train": source.run.train.model_copy(update={"distillation": 0.3})})
    assert origin(replace(source, run=taught)).endswith(
        "Of the targets 30% were that model's own answers (knowledge distillation)."
    )
    assert nothing_else(source, flattered=False) == "It began with weights that had been trained on `animals`."
    longer = source.run.model_copy(
        update={"init": init.model_copy(update={"run": source.run, "checkpoint_sha256": "e" * 64})}
    )
    first, second, third = training_commands(replace(source, run=longer))
    assert first == before
    assert "--preset compact --out runs/beginning-2 --init runs/beginning-1 --data DATA/things " in second
    assert "--threads 1 --init runs/beginning-2 " in third
    same = init.model_copy(update={"run": source.run.model_copy(update={"init": None})})
    again = source.run.model_copy(update={"init": same})
    assert nothing_else(replace(source, run=again), flattered=False).startswith("Nothing else was used")
    second_of_animals = init.run.model_copy(update={"init": init})
    thrice = init.model_copy(update={"run": second_of_animals, "checkpoint_sha256": "e" * 64})
    of_animals = source.run.model_copy(update={"init": thrice})
    assert (
        nothing_else(replace(source, run=of_animals), flattered=False)
        == "It began with weights that had been trained on `animals`."
    )
    assert "The data changed between its runs" in nothing_else(replace(source, run=again), flattered=True)
    both = nothing_else(replace(source, run=of_animals), flattered=True)
    assert both.startswith(
        "It began with weights that had been trained on `animals`. The data changed between its runs"
    )
    assert "The data changed" not in nothing_else(replace(source, run=again), flattered=False)
    others = again.model_copy(update={"labels": ("other", *again.labels[1:])})
    assert (
        nothing_else(replace(source, run=others), flattered=False)
        == "It began with weights that had been trained on `things`."
    )


def test_a_run_that_a_larger_model_taught_tells_the_way_to_both(copy: Path) -> None:
    source = load_source(copy)
    common = source.run.model_copy(update={"preset": "reference"})
    init = Origin(checkpoint_sha256="1" * 64, epoch=9, git_commit="abc", run=common)
    # The teacher began with the same weights as the student.
    of_teacher = source.run.model_copy(update={"preset": "accurate", "init": init})
    teacher = Origin(checkpoint_sha256="2" * 64, epoch=12, git_commit="abd", run=of_teacher)
    train = source.run.train.model_copy(update={"distillation": 0.4})
    run = source.run.model_copy(update={"init": init, "teacher": teacher, "train": train})
    source = replace(source, run=run)
    first, second, last = training_commands(source)
    assert "--preset reference --out runs/beginning-1 --data" in first
    assert "--preset accurate --out runs/beginning-2 --init runs/beginning-1 --data" in second
    assert "--init runs/beginning-1 --teacher runs/beginning-2 --data" in last
    assert "--distillation 0.4" in last
    assert origin(source).endswith(
        "Of the targets 40% were another model's answers (knowledge distillation): of epoch 12 of a run that the "
        "commands before the last train as well (preset `accurate` on `things`, commit `abd`, checkpoint's SHA-256 "
        f"`{'2' * 64}`)."
    )
    elsewhere = teacher.model_copy(update={"run": of_teacher.model_copy(update={"dataset": "web"})})
    source = replace(source, run=run.model_copy(update={"teacher": elsewhere}))
    assert nothing_else(source, flattered=False) == "It goes back to models that had been trained on `web`."


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
    assert "has changed since the export began" in error
    assert not list((tmp_path / "out").iterdir())


def test_a_card_without_test_pictures_tells_what_is_served(run: Path) -> None:
    source = load_source(run)
    assert source.report is not None
    val = source.report.val.model_copy(update={"ece": 0.0321})
    report = source.report.model_copy(update={"test": None, "test_uncalibrated": None, "val": val})
    assert "| **validation, as served** | 20 | 50.00% | 100.00% | 1.0000 | 0.0321 |" in figures(
        replace(source, report=report)
    )
    assert "validation, as served" not in figures(source)


def test_a_data_sets_name_with_a_space_is_quoted(run: Path) -> None:
    source = load_source(run)
    named = source.run.model_copy(update={"dataset": "my things"})
    (command,) = training_commands(replace(source, run=named))
    assert "--data 'DATA/my things'" in command
    # Always, and not where it differs from the preset's alone: of few pictures that is halved where none is given.
    train = named.train.model_copy(update={"batch_size": PRESETS[named.preset].train.batch_size})
    (command,) = training_commands(replace(source, run=named.model_copy(update={"train": train})))
    assert f"--batch-size {train.batch_size}" in command
    few = named.model_copy(update={"labels": LABELS[:3]})
    assert "Of 3 classes the right one is always among the first five" in figures(replace(source, run=few))
    many = named.model_copy(update={"labels": (*LABELS, "x", "y")})
    assert "among the first five" not in figures(replace(source, run=many))
