"""The model card: what it tells of a run, of those before it, and of the data."""

import json
from dataclasses import replace
from pathlib import Path

from export.build import make_metadata
from export.card.error_analysis import confusions
from export.card.markdown import code, literal
from export.card.model_card import data, figures, limits, nothing_else, title
from export.card.training_record import first_epochs, origin, training_commands
from export.source import Source, load_source
from tests.export.conftest import LABELS
from training.checkpoint import Origin
from training.config import PRESETS
from training.evaluate import ConfusedPair


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


def test_a_card_without_test_pictures_tells_what_is_served(run: Path) -> None:
    source = load_source(run)
    assert source.report is not None
    val = source.report.val.model_copy(update={"ece": 0.0321})
    report = source.report.model_copy(update={"test": None, "test_uncalibrated": None, "val": val})
    assert "| **validation, as served** | 20 | 50.00% | 100.00% | 1.0000 | 0.0321 |" in figures(
        replace(source, report=report)
    )
    assert "validation, as served" not in figures(source)


def test_only_of_a_run_with_a_report_the_card_says_that_it_is_calibrated(run: Path) -> None:
    source = load_source(run)
    metadata = make_metadata(source, "things")
    calibrated = "calibrated on pictures like those it was trained on"
    assert calibrated in " ".join(limits(source, metadata).split())
    without = " ".join(limits(replace(source, report=None, temperature=1.0), metadata).split())
    assert calibrated not in without
    assert "the probabilities are not calibrated on any pictures" in without


def test_of_cifar100_the_card_tells_that_test_pictures_resemble_training_pictures(run: Path) -> None:
    source = load_source(run)
    metadata = make_metadata(source, "things")
    near = "A tenth of its test pictures have near-duplicates among the training pictures (Barz and Denzler 2020)"
    for dataset, told in (("cifar100", True), ("things", False)):
        named = metadata.model_copy(update={"dataset": dataset})
        words = " ".join(data(source, named, flattered=False, copies={"test": 3}).split())
        assert (near in words) == told
        assert "read once to test it. Copies of training pictures, pixel for pixel, are among these: 3 of test" in words


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


def test_names_are_shown_as_they_are_whatever_markdown_or_html_would_make_of_them(run: Path) -> None:
    source = load_source(run)
    assert source.report is not None
    pairs = (ConfusedPair("<unknown>", "*_x_*", 1, 0.5),)
    report = source.report.model_copy(update={"most_confused": pairs})
    said = confusions(replace(source, report=report))
    assert said == r"Confused most: \<unknown\> is taken for \*\_x\_\* (50% of the \<unknown\> pictures)."
    metadata = make_metadata(source, "C# <b>").model_copy(update={"dataset": "<!-- mine"})
    told = title(source, metadata, 1)
    assert told.startswith("# C\\# \\<b\\>\n")
    assert r"4 classes of \<!-- mine apart" in told
    assert "The pictures of `<!-- mine`" in data(source, metadata, flattered=False, copies={})


def test_most_names_need_nothing() -> None:
    names = ("sweet_pepper", "five-things", "lamp (old)", "M. C. Escher's", "猫")
    assert [literal(name) for name in names] == list(names)
    assert [code(name) for name in ("a_b", "a`b``c")] == ["`a_b`", "``` a`b``c ```"]
