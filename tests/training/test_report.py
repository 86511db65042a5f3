"""The report of a run, against figures computed here from its checkpoint."""

from __future__ import annotations

import errno
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.training.tiny import ALONE, data_set, run_config
from training import checkpoint
from training.data.dataset import Split
from training.evaluate import predict_logits
from training.metrics_log import append_metrics, read_metrics, truncate_after
from training.report_schema import PLOTS, Report, describe_readings
from training.train import Trainer
from training.transfer import read_origin


def finished(folder: Path, test: int | None) -> Trainer:
    folder.mkdir(exist_ok=True)
    trainer = Trainer(run_config(optimizer="adamw", learning_rate=0.01), data_set(test=test), folder, ALONE)
    assert trainer.fit()
    return trainer


@pytest.mark.usefixtures("without_figures")
def test_the_report_measures_the_best_checkpoint_on_the_test_images(tmp_path: Path) -> None:
    trainer = finished(tmp_path, test=9)
    report = trainer.report()
    assert Report.model_validate_json((tmp_path / "report.json").read_text()) == report
    model, preprocess, header = checkpoint.load_model(tmp_path)
    assert report.epoch == header.epoch
    assert report.parameters == sum(p.numel() for p in model.parameters())
    assert report.checkpoint_sha256 == checkpoint.digest(tmp_path / "best.safetensors")
    assert trainer.test_split is not None
    images, labels = trainer.test_split.images, trainer.test_split.labels.numpy()
    logits = model(preprocess(images)).detach().double().numpy()
    for name, scaled in (("test", logits / report.temperature), ("test_uncalibrated", logits)):
        p = np.exp(scaled) / np.exp(scaled).sum(axis=1, keepdims=True)
        metrics = getattr(report, name)
        assert (metrics.split, metrics.n, metrics.top5) == ("test", 9, 1)
        assert metrics.top1 == pytest.approx((p.argmax(axis=1) == labels).mean())
        assert metrics.loss == pytest.approx(-np.log(p[np.arange(9), labels]).mean(), rel=1e-4)
    assert header.val is not None
    assert report.val_uncalibrated.top1 == header.val.top1
    assert report.val.loss <= report.val_uncalibrated.loss
    assert report.note.endswith("the test images chose nothing, and were read once")
    assert (report.test_readings, report.lineage_test_readings) == (1, 1)


@pytest.mark.usefixtures("without_curves")
def test_without_test_images_the_validation_figures_do_and_it_says_so(tmp_path: Path) -> None:
    report = finished(tmp_path, test=None).report()
    assert report.test is None
    assert report.test_uncalibrated is None
    assert report.val.n == 12
    assert "no test images: the validation figures flatter" in report.note
    for name in PLOTS:
        with Image.open(tmp_path / name) as image:
            assert image.format == "PNG"


@pytest.mark.usefixtures("without_figures")
def test_the_report_lists_the_worst_confusions(tmp_path: Path) -> None:
    trainer = finished(tmp_path, test=30)
    report = trainer.report()
    model, preprocess, _ = checkpoint.load_model(tmp_path)
    assert trainer.test_split is not None
    predicted = model(preprocess(trainer.test_split.images)).argmax(-1)
    mistakes = int((predicted != trainer.test_split.labels).sum())
    assert sum(pair.count for pair in report.most_confused) == mistakes


@pytest.mark.usefixtures("without_figures")
def test_the_test_images_are_read_in_one_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = finished(tmp_path, test=9)
    passes = []

    def spy(model: object, preprocess: object, split: Split, batch_size: int) -> torch.Tensor:
        passes.append(split.images)
        return predict_logits(model, preprocess, split, batch_size)

    monkeypatch.setattr("training.report.predict_logits", spy)
    trainer.report()
    assert trainer.test_split is not None
    held = {image.numpy().tobytes() for image in trainer.test_split.images}
    seen = [sum(image.numpy().tobytes() in held for image in images) for images in passes]
    assert sorted(seen)[-2:] == [0, 9]


@pytest.mark.usefixtures("without_figures")
def test_the_report_tells_superclasses_where_the_data_has_them(tmp_path: Path) -> None:
    groups = {"superclasses": (0, 1, 0), "superclass_names": ("mammals and ants", "bees")}
    run = run_config(optimizer="adamw", learning_rate=0.01).model_copy(update=groups)
    trainer = Trainer(run, data_set(test=9), tmp_path, ALONE)
    trainer.fit()
    report = trainer.report()
    assert [(part.name, part.n) for part in report.superclasses] == [("mammals and ants", 6), ("bees", 3)]
    assert report.test is not None
    assert sum(part.n * part.top1 for part in report.superclasses) / 9 == pytest.approx(report.test.top1)
    assert finished(tmp_path / "plain", test=9).report().superclasses == ()


@pytest.mark.usefixtures("without_figures")
def test_the_report_tells_how_sure_the_model_is_of_what_it_does_not_know(tmp_path: Path) -> None:
    trainer = finished(tmp_path, test=9)
    report = trainer.report()
    known, *strange = report.confidence
    assert report.test is not None
    assert (known.pictures, known.n, known.top1) == ("test images", 9, report.test.top1)
    assert [(each.pictures, each.n) for each in strange] == [
        ("noise", 64),
        ("one colour", 64),
        ("stripes", 64),
        ("text", 64),
        ("upside down", 12),
        ("enlarged corner", 12),
    ]
    assert [each.top1 is None for each in strange] == [True] * 4 + [False] * 2
    # Seeded: a second report says the same, but that it is the second.
    again = trainer.report()
    assert (again.test_readings, again.lineage_test_readings) == (2, 2)
    assert again.note.endswith("and were read 2 times")
    once = {"note": report.note, "test_readings": 1, "lineage_test_readings": 1}
    assert again.model_copy(update=once) == report


@pytest.mark.usefixtures("without_figures")
def test_the_report_tells_how_robust_the_model_is(tmp_path: Path) -> None:
    report = finished(tmp_path, test=9).report()
    clean, *corrupted = report.corruptions
    assert report.test is not None
    assert (clean.name, clean.n, clean.top1) == ("none", 9, report.test.top1)
    assert [each.name for each in corrupted] == [
        "greyscale",
        "JPEG of quality 75",
        "noise of standard deviation 20 levels",
        "blur of standard deviation 1 pixel",
        "rotation by 20 degrees",
    ]
    assert all(each.n == 9 for each in corrupted)


@pytest.mark.usefixtures("without_figures")
def test_the_report_has_the_figures_without_near_duplicates(tmp_path: Path) -> None:
    data = data_set(test=9)
    assert data.test is not None
    images = data.test.images.clone()
    images[:4] = data.train.images[7]
    data = replace(data, test=Split(images, data.test.labels))
    trainer = Trainer(run_config(optimizer="adamw"), data, tmp_path, ALONE)
    trainer.fit()
    report = trainer.report()
    assert report.distinct is not None
    assert report.distinct.n == 5
    model, preprocess, _ = checkpoint.load_model(tmp_path)
    right = model(preprocess(images[4:])).argmax(-1) == data.test.labels[4:]
    assert report.distinct.top1 == pytest.approx(right.double().mean().item())


@pytest.mark.usefixtures("without_figures")
def test_the_readings_of_a_lineage_are_counted(tmp_path: Path) -> None:
    finished(tmp_path / "first", test=9).report()
    origin = read_origin(tmp_path / "first" / "best.safetensors")
    assert origin.test_readings == 1
    # One that does not tell, or of other test images.
    older = origin.model_copy(update={"test_readings": None, "checkpoint_sha256": "0" * 64})
    elsewhere = origin.run.model_copy(update={"dataset": "web", "init": older})
    teacher = origin.model_copy(update={"run": elsewhere, "checkpoint_sha256": "1" * 64, "test_readings": 5})
    run = origin.run.model_copy(update={"init": origin.model_copy(update={"test_readings": 3}), "teachers": (teacher,)})
    assert run.lineage_test_readings(2) == 2 + 3 + 1
    assert describe_readings(2, 6) == "2 times by this run, 6 times with those that led to it"
    (tmp_path / "first" / "report.json").unlink()
    assert read_origin(tmp_path / "first" / "best.safetensors").test_readings is None


def test_lines_are_appended_read_and_forgotten(tmp_path: Path) -> None:
    assert read_metrics(tmp_path) == []
    lines = [{"epoch": epoch, "train_loss": 0.1 * epoch} for epoch in (1, 2, 3)]
    for line in lines:
        append_metrics(tmp_path, line)
    assert read_metrics(tmp_path) == lines
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 4, "tr')
    assert read_metrics(tmp_path) == lines
    truncate_after(tmp_path, 2)
    append_metrics(tmp_path, {"epoch": 3, "train_loss": 7.0})
    assert read_metrics(tmp_path) == [*lines[:2], {"epoch": 3, "train_loss": 7.0}]


def test_an_average_of_weights_is_what_the_report_measures(tmp_path: Path, without_figures: None) -> None:
    trainer = Trainer(run_config(ema_decay=0.9, optimizer="adamw"), data_set(), tmp_path, ALONE)
    trainer.fit()
    loaded = checkpoint.load_model(tmp_path / "last.safetensors")[0].state_dict()
    averaged = trainer.state.evaluated.state_dict()
    assert all(torch.equal(weight, loaded[name]) for name, weight in averaged.items())
    assert not torch.equal(trainer.state.model.latents, loaded["latents"])


def test_a_full_disk_takes_no_epochs_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for epoch in (1, 2, 3):
        append_metrics(tmp_path, {"epoch": epoch})

    def full(path: Path, text: str, encoding: str) -> None:
        path.open("w").close()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    truncate_after(tmp_path, 3)  # nothing to write
    with pytest.raises(OSError, match="No space"):
        truncate_after(tmp_path, 2)
    assert [line["epoch"] for line in read_metrics(tmp_path)] == [1, 2, 3]
