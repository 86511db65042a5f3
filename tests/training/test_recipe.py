"""Recipes: several stages by one command, which can be stopped anywhere."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import pytest
import torch

from export.build import make_metadata
from export.card.training_record import describe_run, first_epochs, training_record
from export.source import load_source
from tests.training.commands import RECIPE, at_step
from training import checkpoint
from training.__main__ import main
from training.checkpoint import CheckpointError, RunConfig
from training.cli import build_parser
from training.metrics_log import MetricsEntry, read_metrics
from training.recipe import DEFAULT_RECIPE, check_flags, find_recipe, is_bare, plan, read_recipe
from training.report_schema import Report
from training.transfer import find_checkpoint

FLAGS = [flag for flag in RECIPE if not flag.startswith(("--threads", "--device"))]
MACHINE = ["--threads=1", "--device=cpu"]
LINES = [
    " ".join(FLAGS),
    "--epochs 1 --batch-size 8 --num-blocks 2",
    "--epochs 1 --batch-size 8 --distillation 0.5 --teacher stage-1",
]


def write_recipe(folder: Path, lines: list[str]) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / "mine.toml"
    path.write_text(f"stages = {json.dumps(lines)}\n")
    return path


def run_of(folder: Path) -> RunConfig:
    return RunConfig.model_validate_json((folder / "config.json").read_text())


@pytest.mark.usefixtures("without_figures")
def test_the_same_command_goes_on_where_it_was(
    tmp_path: Path, image_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, out = write_recipe(tmp_path, LINES), tmp_path / "run"
    command = ["--recipe", str(recipe), "--data", str(image_dir), "--out", str(out), *MACHINE, "--seed=3"]
    with monkeypatch.context() as patch:
        at_step(patch, 4, lambda: signal.raise_signal(signal.SIGINT))
        assert main(command) == 3
    said = capsys.readouterr().out
    assert f"stopped after step 4; go on with: python -m training --recipe {recipe}" in said
    assert not (out / "stage-2").exists()
    with pytest.raises(CheckpointError, match="stage-3: the recipe's last stage has not begun"):
        find_checkpoint(out)
    assert main(command) == 0
    assert main(command) == 0  # nothing is left to do
    said = capsys.readouterr().out
    assert said.count("stage 1 of 3, stopped") == said.count("stage 2 of 3, not begun") == 1
    assert said.count("export: python -m export") == 1
    again = tmp_path / "again"
    assert main([str(again) if word == str(out) else word for word in command]) == 0
    one, other = (checkpoint.load(folder / "stage-3" / "best.safetensors")[0] for folder in (out, again))
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    capsys.readouterr()
    runs = [run_of(out / f"stage-{number}") for number in (1, 2, 3)]
    digests = [checkpoint.digest(out / f"stage-{number}" / "best.safetensors") for number in (1, 2, 3)]
    assert [run.init and run.init.checkpoint_sha256 for run in runs] == [None, digests[0], digests[1]]
    assert [teacher.checkpoint_sha256 for teacher in runs[2].teachers] == [digests[0]]
    assert [run.model.num_blocks for run in runs] == [1, 2, 2]
    assert [run.train.seed for run in runs] == [3, 3, 3]
    # The last stage alone reads the test images.
    reports = [
        Report.model_validate_json((out / f"stage-{number}" / "report.json").read_text()) for number in (1, 2, 3)
    ]
    assert [report.test is None for report in reports] == [True, True, False]
    assert [report.lineage_test_readings for report in reports] == [0, 0, 1]
    # The card has one command.
    source = load_source(out / "stage-3")
    record = training_record(source, make_metadata(source, "things"))
    commands = [line for line in record.splitlines() if line.startswith("    ")]
    machine = "--processes 1 --threads 1"
    assert commands == [f"    python -m training --recipe mine.toml --seed=3 {machine} --data DATA/{image_dir.name}"]
    assert "`--epochs 1 --batch-size 8 --num-blocks 2 --seed=3`" in record
    # A stage on its own has those that led to it.
    half = load_source(out / "stage-2")
    assert "--recipe" not in training_record(half, make_metadata(half, "things"))


def test_a_stage_that_names_a_preset_begins_at_random(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, [LINES[0], "--preset teacher --epochs 1", "--init stage-1 --teacher stage-2"])
    flags = ["--recipe", str(recipe), "--out", str(tmp_path / "run")]
    first, teacher, last = (stage.args for stage in plan(build_parser().parse_args(flags), flags))
    assert (first.init, teacher.init, last.init) == (None, None, [first.out])
    assert last.teacher == [teacher.out]


def entries(folder: Path) -> list[MetricsEntry]:
    """The epochs in a folder, without what the clock says."""
    timed = {"seconds", "pictures_per_second"}
    return [{key: value for key, value in line.items() if key not in timed} for line in read_metrics(folder)]


@pytest.fixture
def drawn(without_figures: None, monkeypatch: pytest.MonkeyPatch) -> dict[Path, list[MetricsEntry]]:
    """What the last curves in each file were drawn from."""
    seen: dict[Path, list[MetricsEntry]] = {}

    def draw(lines: list[MetricsEntry], path: Path, best_by: str) -> None:
        seen[path] = lines
        path.write_bytes(str(path).encode())

    monkeypatch.setattr("training.report.save_curves", draw)
    return seen


def test_the_whole_run_has_one_log_and_one_curve(
    tmp_path: Path,
    image_dir: Path,
    drawn: dict[Path, list[MetricsEntry]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    lines = [f"{LINES[0]} --epochs=1", "--epochs 2 --batch-size 8"]
    recipe, out, undisturbed = write_recipe(tmp_path, lines), tmp_path / "run", tmp_path / "undisturbed"
    command = ["--recipe", str(recipe), "--data", str(image_dir), *MACHINE]
    assert main([*command, "--out", str(undisturbed)]) == 0
    expected = entries(undisturbed)
    assert [(line["stage"], line["stage_epoch"], line["epoch"]) for line in expected] == [
        (1, 1, 1),
        (2, 1, 2),
        (2, 2, 3),
    ]
    steps = expected[0]["step"]
    assert [line["step"] for line in expected] == [steps, 2 * steps, 3 * steps]
    of_stages = [*entries(undisturbed / "stage-1"), *entries(undisturbed / "stage-2")]
    assert [line["val_loss"] for line in expected] == [line["val_loss"] for line in of_stages]
    # Its digest, which the second stage draws from, has the time in it: trained again, it would be another.
    shutil.copytree(undisturbed / "stage-1", out / "stage-1")
    with monkeypatch.context() as patch:
        at_step(patch, steps + 1, lambda: signal.raise_signal(signal.SIGINT))  # which the first stage does not reach
        assert main([*command, "--out", str(out)]) == 3
    assert entries(out) == expected[:2]
    with (out / "stage-2" / "metrics.jsonl").open("a") as file:  # as a kill before the checkpoint leaves it
        file.write(json.dumps(of_stages[-1]) + "\n")
    assert main([*command, "--out", str(out)]) == 0
    assert entries(out) == expected
    assert [line["epoch"] for line in drawn[out / "curves.png"]] == [1, 2, 3]
    assert [line["epoch"] for line in drawn[out / "stage-2" / "curves.png"]] == [1, 2]
    assert all("val_top5" not in line for lines in drawn.values() for line in lines)  # of three classes
    assert json.loads((out / "config.json").read_text()) == {"recipe": "--recipe mine.toml", "stages": lines}
    # The last stage's card tells of them all, also when what was exported is exported again.
    source = load_source(out / "stage-2")
    assert list(source.epochs) == read_metrics(out)
    assert source.plots[0].read_text() == str(out / "curves.png")
    told = describe_run(source)
    assert told.startswith(
        f"The weights of epoch {source.epoch} of 2 in the last stage. All 3 epochs of its 2 stages took "
    )
    assert "These were its first epochs" in first_epochs(source)
    exported = tmp_path / "model" / "1"
    exported.mkdir(parents=True)
    shutil.copy(out / "stage-2" / "best.safetensors", exported / "checkpoint.safetensors")
    report = json.loads((out / "stage-2" / "report.json").read_text())
    (exported / "metrics.json").write_text(json.dumps({"report": report, "epochs": source.epochs}))
    assert describe_run(load_source(exported)) == told
    # A stage that began with another one than there is now is not taken for this recipe's.
    stage = undisturbed / "stage-1"
    shutil.copy(stage / "last.safetensors", stage / "best.safetensors")
    assert main([*command, "--out", str(undisturbed)]) == 2
    shutil.rmtree(stage)
    assert main([*command, "--out", str(undisturbed)]) == 2
    message = f"{undisturbed / 'stage-2'}: began with another stage-1 than there is now; restore that one, or remove"
    assert capsys.readouterr().err.count(message) == 2
    assert not stage.exists()
    # An earlier stage's card tells of that one alone, and so does a copy that lies elsewhere.
    assert list(load_source(out / "stage-1").epochs) == read_metrics(out / "stage-1")
    copy = shutil.copytree(out / "stage-2", tmp_path / "stage-2")
    assert list(load_source(copy).epochs) == read_metrics(copy)


def test_stages_without_epochs_are_no_gap(
    tmp_path: Path, image_dir: Path, whole: Path, drawn: dict[Path, list[MetricsEntry]]
) -> None:
    lines = [f"--init {whole} --epochs 0", "--epochs 1 --batch-size 8", "--init stage-1 stage-2 --epochs 0"]
    recipe, out = write_recipe(tmp_path, lines), tmp_path / "run"
    assert main(["--recipe", str(recipe), "--data", str(image_dir), "--out", str(out), *MACHINE]) == 0
    (line,) = read_metrics(out)
    assert (line["stage"], line["stage_epoch"], line["epoch"]) == (2, 1, 1)
    assert list(drawn) == [out / "stage-2" / "curves.png", out / "curves.png"]
    source = load_source(out)
    assert source.checkpoint == out / "stage-3" / "best.safetensors"
    assert source.plots[0] == out / "curves.png"
    assert "The mean of the weights of 2 models" in describe_run(source)
    assert main(["--resume", str(out / "stage-3"), *MACHINE]) == 0  # measures it again
    assert load_source(out / "stage-3").checkpoint_sha256 == source.checkpoint_sha256
    assert " All 1 epochs of its 3 stages took " in describe_run(source)


@pytest.mark.usefixtures("without_figures")
def test_the_folder_of_the_whole_is_no_other_run_s(
    tmp_path: Path, image_dir: Path, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(tmp_path, LINES[:1])
    run = shutil.copytree(whole, tmp_path / "single")
    command = ["--recipe", str(recipe), "--data", str(image_dir), *MACHINE]
    assert main([*command, "--out", str(run)]) == 2
    assert f"--out {run}: holds a run that is none of a recipe" in capsys.readouterr().err
    out = tmp_path / "run"
    assert main([*command, "--out", str(out)]) == 0
    assert main(["--resume", str(out)]) == 2
    assert f"--resume {out}: holds the stages of a recipe; go on with the command" in capsys.readouterr().err


@pytest.mark.usefixtures("without_figures")
def test_a_stage_of_other_flags_is_not_taken_for_this_one(
    tmp_path: Path, image_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(tmp_path, LINES[:1])
    command = ["--data", str(image_dir), "--out", str(tmp_path / "run"), *MACHINE]
    assert main(["--recipe", str(recipe), *command]) == 0
    write_recipe(tmp_path, [LINES[0] + " --seed 7"])
    assert main(["--recipe", str(recipe), *command]) == 2
    assert "stage-1: was trained by other flags than the recipe's" in capsys.readouterr().err
    assert main(["--recipe", str(recipe), *command, "--stages"]) == 0
    assert capsys.readouterr().out.startswith(f"stage 1 of 1, done, {tmp_path / 'run' / 'stage-1'}: ")
    shutil.rmtree(tmp_path / "run")


@pytest.mark.parametrize(
    ("content", "flags", "message"),
    [
        ("stages = []", [], 'must hold stages = ["flags of a stage", ...], may hold took'),
        ("stages = [3]", [], "each of its stages must be a text"),
        ('stages = ["--epochs 3"]\ntook = 3', [], "took must be a text"),
        ('stages = ["--epochs 3"]\nhours = "3"', [], "and nothing else."),
        ("stages = ", [], "is no TOML"),
        ('stages = ["--out x"]', [], "stage 1 says --out, which is given beside --recipe."),
        ('stages = ["--epochs 3"]', ["--init", "x"], "--recipe takes no --init: its stages say that"),
        ('stages = ["--epochs 3"]', ["--max-steps", "3"], "--max-steps is for one run, and --recipe "),
        ('stages = ["--max-steps 3"]', [], "stage 1 says --max-steps, which is for one run and not for a recipe"),
        ('stages = ["--epochs 3", "--epochs \'4"]', [], "stage 2 can't be read (No closing quotation): --epochs '4"),
        ('stages = ["--preset huge"]', [], "stage 1 of 1: --preset huge: there is no such preset"),
        ('stages = ["--epochs 3", "--distillation 2"]', [], "stage 2 of 2: --distillation 2.0: Input should be less"),
        (
            'stages = ["--epochs 3", "--network residual"]',
            [],
            "stage 2 of 2: --network residual: the model of --init is",
        ),
        ('stages = ["--preset teacher", "--patch-size 2"]', [], "stage 2 of 2: a residual network has no use for"),
        (
            'stages = ["--epochs 3", "--init stage-2"]',
            [],
            "stage 2 names stage-2: name a stage before it, from stage-1.",
        ),
        ('stages = ["--epochs 3", "--init x"]', [], "stage 2 of 2: x: no such checkpoint"),
    ],
)
def test_what_is_no_recipe_is_told(
    tmp_path: Path, content: str, flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.toml").write_text(content)
    command = ["--recipe", str(tmp_path / "mine.toml"), "--out", str(tmp_path / "run"), *MACHINE[:1], *flags]
    for again in (command, [*command, "--stages"]):
        assert main(again) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        ("--epochs 1 --dim 32", "stage 2 of 2: {run}/stage-1: "),
        ("--epochs 1 --distillation 0.5 --teacher nowhere", "stage 2 of 2: nowhere: no such checkpoint"),
        ("--init stage-1 nowhere --epochs 0", "stage 2 of 2: nowhere: no such checkpoint"),
    ],
)
def test_a_stage_that_could_not_begin_is_told_before_the_first_is_trained(
    stage: str, message: str, tmp_path: Path, image_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, out = write_recipe(tmp_path, [LINES[0], stage]), tmp_path / "run"
    assert main(["--recipe", str(recipe), "--data", str(image_dir), "--out", str(out), *MACHINE]) == 2
    assert message.format(run=out) in capsys.readouterr().err
    assert not out.exists()


def test_a_stage_may_begin_with_a_file_that_an_earlier_one_will_write(tmp_path: Path) -> None:
    out = tmp_path / "run"
    lines = ["--preset photo", f"--init {out}/stage-1/last.safetensors --epochs 1"]
    flags = ["--recipe", str(write_recipe(tmp_path, lines)), "--out", str(out)]
    stages = plan(build_parser().parse_args(flags), flags)
    assert [run.preset for run in check_flags(stages).values()] == ["photo", "photo"]


def test_what_may_not_be_read_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = "x" * 300
    for flag in ("--recipe", "--init"):
        assert main([flag, name, "--out", str(tmp_path / "run")]) == 2
        said = capsys.readouterr().err
        assert said.startswith("error: ")
        assert name in said
        assert said.endswith(": File name too long.\n")


def test_a_stage_whose_configuration_is_damaged_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe, stage = write_recipe(tmp_path, LINES), tmp_path / "run" / "stage-1"
    stage.mkdir(parents=True)
    (stage / "last.safetensors").touch()
    (stage / "config.json").write_text("{}")
    assert main(["--recipe", str(recipe), "--out", str(tmp_path / "run"), *MACHINE]) == 2
    assert f"stage 1 of 3: {stage / 'config.json'} is not of this version" in capsys.readouterr().err


@pytest.mark.usefixtures("without_figures")
def test_data_with_their_own_val_suit_a_recipe_that_holds_out_a_share(tmp_path: Path, image_dir: Path) -> None:
    assert (image_dir / "val").is_dir()
    recipe = write_recipe(tmp_path, [LINES[0] + " --epochs 1", "--epochs 1 --validation-fraction 0.02"])
    command = ["--recipe", str(recipe), "--data", str(image_dir), "--out", str(tmp_path / "run"), *MACHINE]
    assert main(command) == 0
    assert run_of(tmp_path / "run" / "stage-2").train.validation_fraction == 0.02


@pytest.mark.usefixtures("without_figures")
def test_stages_are_told_in_their_own_order_and_an_early_one_alone_reads_no_test_image(
    tmp_path: Path, image_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [
        LINES[0] + " --epochs 1",
        LINES[0] + " --epochs 1 --seed 5",
        "--epochs 1 --distillation 0.5 --teacher stage-1",
    ]
    recipe, out = write_recipe(tmp_path, lines), tmp_path / "run"
    command = ["--recipe", str(recipe), "--data", str(image_dir), "--out", str(out), *MACHINE]
    with monkeypatch.context() as patch:
        at_step(patch, 2, lambda: signal.raise_signal(signal.SIGINT))
        assert main(command) == 3
    capsys.readouterr()
    assert main(["--resume", str(out / "stage-1"), *MACHINE]) == 0
    said = capsys.readouterr().out
    assert f"{out / 'stage-1'} has ended; the same command with --recipe goes on" in said
    assert Report.model_validate_json((out / "stage-1" / "report.json").read_text()).test is None
    assert main(command) == 0
    source = load_source(out)
    record = training_record(source, make_metadata(source, "things"))
    told = [line for line in record.splitlines() if line.startswith("- stage-")]
    assert told == [f"- stage-{number}: `{line}`" for number, line in enumerate(lines, 1)]


def test_a_recipe_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--recipe", "huge"]) == 2
    assert f"there is no such file, and no such recipe; there are {DEFAULT_RECIPE}." in capsys.readouterr().err


def test_a_stage_with_flags_that_can_not_be_read_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_recipe(tmp_path, ["--epochs 3", "--epochs many"])
    with pytest.raises(SystemExit) as caught:
        main(["--recipe", str(path)])
    assert caught.value.code == 2
    assert "stage 2 has flags that can't be read" in capsys.readouterr().err


def test_without_a_word_of_what_to_train_the_default_recipe_is_meant(capsys: pytest.CaptureFixture[str]) -> None:
    assert is_bare(build_parser().parse_args(["--threads=1", "--out=x", "--max-minutes=3"]))
    for flags in (["--epochs=1"], ["--preset=compact"], ["--data=x"], ["--init=x"], ["--resume=x"], ["--no-flip"]):
        assert not is_bare(build_parser().parse_args(flags))
    assert main(["--stages"]) == 0
    recipe = read_recipe(DEFAULT_RECIPE)
    *stages, last = capsys.readouterr().out.splitlines()
    assert len(stages) == len(recipe.lines)
    assert last == f"It took {recipe.took}."


def test_the_recipe_of_the_shipped_model_is_what_trained_it() -> None:
    """Its stages' configurations, from the checkpoint; the machine decides the precision now."""
    source = load_source(Path("models/perceiver-cifar100"))
    run = source.run
    assert find_recipe(run) == DEFAULT_RECIPE
    recipe = read_recipe(DEFAULT_RECIPE)
    assert recipe.took is not None
    record = training_record(source, make_metadata(source, "things"))
    assert [line for line in record.splitlines() if line.startswith("    ")] == [
        f"    python -m training --recipe {DEFAULT_RECIPE}"
    ]
    assert f"It took {recipe.took}." in record.replace("\n", " ")
    assert "Its stages were started one by one" in record
    assert f"- stage-{len(recipe.lines)}: `{recipe.lines[-1]}`" in record


def test_a_run_of_other_stages_is_not_the_recipe_s() -> None:
    run = checkpoint.load(find_checkpoint(Path("models/perceiver-cifar100")))[1].run
    assert run.init is not None
    warmer = run.train.model_copy(update={"learning_rate": 0.5})
    first = run.init.run.model_copy(update={"train": run.init.run.train.model_copy(update={"seed": 1})})
    for changes in (
        {"train": warmer},
        {"preset": "accurate"},
        {"model": run.model.model_copy(update={"num_blocks": 5})},
        {"init": run.init.model_copy(update={"run": first})},
        {"init": run.init.model_copy(update={"checkpoint_sha256": "0" * 64}), "averaged": ()},
        {"init": None, "averaged": (), "teachers": ()},
        {"labels": ("other", *run.labels[1:])},
    ):
        assert find_recipe(run.model_copy(update=changes)) is None, changes.keys()
