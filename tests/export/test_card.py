"""The model card: what it says of a run, of earlier runs, and of the data."""

import json
from dataclasses import replace
from pathlib import Path

from export.build import make_metadata
from export.card.error_analysis import confusions, error_analysis
from export.card.markdown import code, literal
from export.card.model_card import evaluation, limitations, other_data, title, training_data
from export.card.training_record import describe_run, first_epochs, training_commands
from export.source import Source, load_source
from tests.export.conftest import LABELS
from training.checkpoint import Origin
from training.config import PRESETS
from training.evaluate import ConfusedPair
from training.report_schema import Report


def source_with_metrics(run: Path, content: str) -> Source:
    (run / "metrics.jsonl").write_text(content)
    return load_source(run)


def test_unfinished_epochs_of_a_metrics_file_are_ignored(copy: Path) -> None:
    content = (copy / "metrics.jsonl").read_text()
    assert load_source(copy).training_seconds == 900
    assert source_with_metrics(copy, content[:-5]).training_seconds == 600  # the last epoch was cut off
    first = content.splitlines(keepends=True)[0]
    for damaged in (first, "", "no JSON\n", '{"seconds": 3}\n' * 3):  # epoch 2, of which the weights are, is missing
        source = source_with_metrics(copy, damaged)
        assert source.training_seconds is None
        assert describe_run(source) == "The weights of epoch 2."


def test_a_run_without_machines_names_none(copy: Path) -> None:
    lines = [{"epoch": epoch, "seconds": 30.0} for epoch in (1, 2)]
    source = source_with_metrics(copy, "".join(json.dumps(line) + "\n" for line in lines))
    assert describe_run(source) == "The weights of epoch 2 of 2. All 2 epochs took 60 s of training."
    assert next(training_commands(source)).startswith("python -m training --preset compact")
    assert first_epochs(source) == ""


def test_a_run_whose_later_epochs_name_the_machine(copy: Path) -> None:
    lines = [json.loads(line) for line in (copy / "metrics.jsonl").read_text().splitlines()]
    del lines[0]["device"]
    source = source_with_metrics(copy, "".join(json.dumps(line) + "\n" for line in lines))
    assert "on cpu, 2 processes of 1 thread (1 of the epochs do not name a machine)." in describe_run(source)
    assert next(training_commands(source)).startswith("python -m training --preset compact --processes 2 --threads 1")
    alone = [{**line, "processes": 1, "threads": 2} for line in lines]
    source = source_with_metrics(copy, "".join(json.dumps(line) + "\n" for line in alone))
    assert next(training_commands(source)).startswith("python -m training --preset compact --processes 1 --threads 2")
    on_gpus = [{**line, "device": "Some GPU"} for line in lines]
    source = source_with_metrics(copy, "".join(json.dumps(line) + "\n" for line in on_gpus))
    assert next(training_commands(source)).startswith("torchrun --standalone --nproc-per-node 2 -m training")


def test_a_run_that_changed_machines_names_both(copy: Path) -> None:
    lines = [json.loads(line) for line in (copy / "metrics.jsonl").read_text().splitlines()]
    lines[2] |= {"device": "Some GPU", "processes": 1, "threads": 8}
    source = source_with_metrics(copy, "".join(json.dumps(line) + "\n" for line in lines))
    assert "on cpu, 2 processes of 1 thread and then Some GPU, 1 process." in describe_run(source)
    assert next(training_commands(source)).startswith("python -m training --preset compact")


def test_a_run_with_initial_weights_lists_the_commands_of_all_stages(copy: Path) -> None:
    source = load_source(copy)
    first = source.run.model_copy(update={"dataset": "animals", "preset": "reference"})
    init = Origin(checkpoint_sha256="f" * 64, epoch=9, git_commit="abc", run=first)
    source = replace(source, run=source.run.model_copy(update={"init": init}))
    before, after = training_commands(source)
    assert before.startswith("python -m training --preset reference --out runs/stage-1 --data DATA/animals ")
    assert after.startswith(
        "python -m training --preset compact --processes 2 --threads 1 --init runs/stage-1 --data DATA/things "
    )
    assert (
        "Training started from the weights of epoch 9 of another run (preset `reference` on `animals`, "
        in describe_run(source)
    )
    assert "distillation" not in describe_run(source)
    taught = source.run.model_copy(update={"train": source.run.train.model_copy(update={"distillation": 0.3})})
    assert describe_run(replace(source, run=taught)).endswith(
        "Of the targets 30% were the outputs of that model (knowledge distillation)."
    )
    assert other_data(source, leakage=False) == "Training started from weights trained on `animals`."
    longer = source.run.model_copy(
        update={"init": init.model_copy(update={"run": source.run, "checkpoint_sha256": "e" * 64})}
    )
    first, second, third = training_commands(replace(source, run=longer))
    assert first == before
    assert "--preset compact --out runs/stage-2 --init runs/stage-1 --data DATA/things " in second
    assert "--threads 1 --init runs/stage-2 " in third
    same = init.model_copy(update={"run": source.run.model_copy(update={"init": None})})
    again = source.run.model_copy(update={"init": same})
    assert other_data(replace(source, run=again), leakage=False).startswith("Nothing else was used")
    second_of_animals = init.run.model_copy(update={"init": init})
    thrice = init.model_copy(update={"run": second_of_animals, "checkpoint_sha256": "e" * 64})
    of_animals = source.run.model_copy(update={"init": thrice})
    assert (
        other_data(replace(source, run=of_animals), leakage=False)
        == "Training started from weights trained on `animals`."
    )
    assert "The data or their split changed between its runs" in other_data(replace(source, run=again), leakage=True)
    both = other_data(replace(source, run=of_animals), leakage=True)
    assert both.startswith(
        "Training started from weights trained on `animals`. The data or their split changed between its runs"
    )
    assert "The data or their split changed" not in other_data(replace(source, run=again), leakage=False)
    others = again.model_copy(update={"labels": ("other", *again.labels[1:])})
    assert (
        other_data(replace(source, run=others), leakage=False) == "Training started from weights trained on `things`."
    )


def test_a_distilled_run_lists_the_commands_of_its_teacher(copy: Path) -> None:
    source = load_source(copy)
    common = source.run.model_copy(update={"preset": "reference"})
    init = Origin(checkpoint_sha256="1" * 64, epoch=9, git_commit="abc", run=common)
    # The teacher began with the same weights as the student.
    of_teacher = source.run.model_copy(update={"preset": "accurate", "init": init})
    teacher = Origin(checkpoint_sha256="2" * 64, epoch=12, git_commit="abd", run=of_teacher)
    train = source.run.train.model_copy(update={"distillation": 0.4})
    run = source.run.model_copy(update={"init": init, "teachers": (teacher,), "train": train})
    source = replace(source, run=run)
    first, second, last = training_commands(source)
    assert "--preset reference --out runs/stage-1 --data" in first
    assert "--preset accurate --out runs/stage-2 --init runs/stage-1 --data" in second
    assert "--init runs/stage-1 --teacher runs/stage-2 --data" in last
    assert "--distillation 0.4" in last
    assert describe_run(source).endswith(
        "Of the targets 40% were the outputs of another model (knowledge distillation): of epoch 12 of a run that the "
        "commands before the last train as well (preset `accurate` on `things`, commit `abd`, checkpoint's SHA-256 "
        f"`{'2' * 64}`)."
    )
    source = replace(source, run=run.model_copy(update={"teachers": (teacher, init)}))
    assert "--init runs/stage-1 --teacher runs/stage-2 runs/stage-1 --data" in list(training_commands(source))[-1]
    assert "the mean of the outputs of 2 models (knowledge distillation), which" in describe_run(source)
    elsewhere = teacher.model_copy(update={"run": of_teacher.model_copy(update={"dataset": "web"})})
    source = replace(source, run=run.model_copy(update={"teachers": (elsewhere,)}))
    assert other_data(source, leakage=False) == "It goes back to models trained on `web`."


def test_a_card_without_test_images_has_validation_metrics_as_served(run: Path) -> None:
    source = load_source(run)
    assert source.report is not None
    val = source.report.val.model_copy(update={"ece": 0.0321})
    report = source.report.model_copy(update={"test": None, "test_uncalibrated": None, "val": val})
    assert "| **validation, as served** | 20 | 50.00% | 1.0000 | 0.0321 |" in evaluation(replace(source, report=report))
    assert "validation, as served" not in evaluation(source)


def test_only_a_run_with_a_report_is_called_calibrated(run: Path) -> None:
    source = load_source(run)
    metadata = make_metadata(source, "things")
    calibrated = "calibrated on images like those of its training"
    assert calibrated in " ".join(limitations(source, metadata).split())
    without = " ".join(limitations(replace(source, report=None, temperature=1.0), metadata).split())
    assert calibrated not in without
    assert "probabilities are not calibrated, since the run has no report" in without


def test_the_card_of_cifar100_mentions_near_duplicates(run: Path) -> None:
    source = load_source(run)
    metadata = make_metadata(source, "things")
    near = "A tenth of its test images have near-duplicates among the training images (Barz and Denzler 2020)"
    for dataset, told in (("cifar100", True), ("things", False)):
        named = metadata.model_copy(update={"dataset": dataset})
        words = " ".join(training_data(source, named, leakage=False, duplicates={"test": 3}).split())
        assert (near in words) == told
        assert "more tested it, and were read once. Some images are exact copies of training" in words
        assert "makes the metrics too good: 3 of test" in words


def test_an_older_report_has_no_robustness_and_counts_a_reading_a_run(run: Path) -> None:
    source = load_source(run)
    assert source.report is not None
    fields = {"corruptions", "distinct", "test_readings", "lineage_test_readings"}
    older = source.report.model_dump(exclude=fields)
    init = Origin(checkpoint_sha256="f" * 64, epoch=9, git_commit="abc", run=source.run)
    continued = source.run.model_copy(update={"init": init})
    source = replace(source, report=Report.model_validate(older), run=continued)
    assert "near-duplicate" not in evaluation(source)
    assert "corrupted" not in error_analysis(source)
    words = " ".join(training_data(source, make_metadata(source, "x"), leakage=False, duplicates={}).split())
    assert "tested it, and were read once by this run, 2 times with those that led to it" in words


def test_a_data_sets_name_with_a_space_is_quoted(run: Path) -> None:
    source = load_source(run)
    named = source.run.model_copy(update={"dataset": "my things"})
    (command,) = training_commands(replace(source, run=named))
    assert "--data 'DATA/my things'" in command
    # Always, and not where it differs from the preset's alone: on a small data set that is halved where none is given.
    train = named.train.model_copy(update={"batch_size": PRESETS[named.preset].train.batch_size})
    (command,) = training_commands(replace(source, run=named.model_copy(update={"train": train})))
    assert f"--batch-size {train.batch_size}" in command
    few = named.model_copy(update={"labels": LABELS[:3]})
    assert "top-5" not in evaluation(replace(source, run=few)) + error_analysis(replace(source, run=few))
    many = named.model_copy(update={"labels": (*LABELS, "x", "y")})
    assert "| top-1 | top-5 |" in evaluation(replace(source, run=many))
    assert "| top-5 |" in error_analysis(replace(source, run=many))


def test_markup_in_names_is_escaped(run: Path) -> None:
    source = load_source(run)
    assert source.report is not None
    pairs = (ConfusedPair("<unknown>", "*_x_*", 1, 0.5),)
    report = source.report.model_copy(update={"most_confused": pairs})
    said = confusions(replace(source, report=report))
    assert said == r"Confused most: \<unknown\> as \*\_x\_\* (50% of the \<unknown\> images)."
    metadata = make_metadata(source, "C# <b>").model_copy(update={"dataset": "<!-- mine"})
    told = title(source, metadata, 1)
    assert told.startswith("# C\\# \\<b\\>\n")
    assert r"4 classes of \<!-- mine." in told
    assert "The images of `<!-- mine`" in training_data(source, metadata, leakage=False, duplicates={})


def test_most_names_need_no_escaping() -> None:
    names = ("sweet_pepper", "five-things", "lamp (old)", "M. C. Escher's", "猫")
    assert [literal(name) for name in names] == list(names)
    assert [code(name) for name in ("a_b", "a`b``c")] == ["`a_b`", "``` a`b``c ```"]
