"""The model in a notebook, against the engine's own ways to load, read and answer; and the command that predicts."""

from __future__ import annotations

import csv
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.training.tiny import DROPOUT, LABELS, make_split, run_config
from training import checkpoint
from training.checkpoint import CheckpointError
from training.classifier import Classifier
from training.config import TrainConfig
from training.data.dataset import DataError
from training.model import Perceiver
from training.predict import main
from training.preprocessing import Preprocess
from training.report_schema import Report

ROOT = Path(__file__).parents[2]


def test_logits_are_those_of_the_checkpoint_at_its_temperature(whole: Path, image_dir: Path) -> None:
    files = sorted((image_dir / "test").glob("*/*.png"))
    arrays = np.stack([np.asarray(Image.open(file)) for file in files])
    model, preprocess, _ = checkpoint.load_model(whole)
    report = Report.model_validate_json((whole / "report.json").read_text())
    wanted = model(preprocess(torch.from_numpy(arrays))) / report.temperature
    classifier = Classifier.from_pretrained(whole)
    for images in (files, [str(file) for file in files], arrays, list(arrays)):
        torch.testing.assert_close(classifier.logits(images), wanted)
    first = classifier.predict(arrays, top_k=2)[0]
    values, indices = wanted[0].softmax(-1).topk(2)
    assert [label for label, _ in first] == [LABELS[index] for index in indices]
    assert [value for _, value in first] == pytest.approx(values.tolist())


def test_features_are_what_the_head_classifies(whole: Path) -> None:
    classifier, images = Classifier.from_pretrained(whole), make_split(5, 3).images.numpy()
    features = classifier.features(images)
    assert features.shape == (5, classifier.run.model.dim)
    torch.testing.assert_close(classifier.model.head(features) / classifier.temperature, classifier.logits(images))


def test_after_an_interrupt_nothing_is_dropped_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_args: object) -> None:
        raise KeyboardInterrupt

    run, split = run_config(DROPOUT), make_split(8, 5)
    classifier = Classifier(run, Perceiver(run.model), Preprocess(run.model.image_size))
    monkeypatch.setattr("training.classifier.clip_gradients", interrupt)
    with pytest.raises(KeyboardInterrupt):
        classifier.train_epoch(split.images.numpy(), [LABELS[index] for index in split.labels])
    images = split.images.numpy()
    assert torch.equal(classifier.logits(images), classifier.logits(images))


def test_epochs_teach_and_repeat_themselves(whole: Path) -> None:
    split = make_split(48, 5)
    images, labels = split.images.numpy(), [f"new {LABELS[index]}" for index in split.labels]
    recipe = TrainConfig(optimizer="adamw", learning_rate=0.01, batch_size=8)

    def losses() -> list[float]:
        classifier = Classifier.from_pretrained(whole, labels=sorted(set(labels)))
        assert classifier.labels == ("new ant", "new bee", "new cat")
        found = [classifier.train_epoch(images, labels, recipe) for _ in range(6)]
        right = [prediction[0][0] for prediction in classifier.predict(images)]
        assert np.mean([one == other for one, other in zip(right, labels, strict=True)]) > 0.7
        return found

    first = losses()
    assert first[-1] < 0.8 * first[0]
    assert losses() == first


def test_what_can_not_be_used_is_told(whole: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        Classifier.from_pretrained(tmp_path / "nothing")
    classifier = Classifier.from_pretrained(whole)
    with pytest.raises(ValueError, match=r"must be uint8 \[height, width, 3\], not float64 \[8, 8\]"):
        classifier.predict([np.zeros((8, 8))])
    with pytest.raises(ValueError, match="one image at least"):
        classifier.predict([])
    with pytest.raises(ValueError, match=r"\['dog'\] are not what this classifier takes"):
        classifier.train_epoch(make_split(1, 0).images.numpy(), ["dog"])
    with pytest.raises(DataError, match="cannot be read"):
        classifier.predict([tmp_path / "none.png"])


def test_the_documented_lines_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "training.md").read_text(), re.DOTALL)
    (apple,) = re.findall(r'\("apple", (0\.\d\d)\)', code)
    names: dict[str, object] = {}
    exec(code.replace('glob("*/*.png")', 'glob("*/0[0-3].png")'), names)
    model, mine = names["model"], names["mine"]
    assert isinstance(model, Classifier)
    assert isinstance(mine, Classifier)
    assert model.predict(["docs/apple.png"])[0][0] == ("apple", pytest.approx(float(apple), abs=0.006))
    assert len(mine.labels) == 5


def test_the_command_writes_a_row_for_each_label_of_each_file(
    whole: Path, image_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = sorted((image_dir / "test").rglob("*.png"))
    out = tmp_path / "labels.csv"
    assert main([str(whole), str(image_dir / "test"), "--out", str(out), "--top-k", "2"]) == 0
    with out.open(newline="") as file:
        rows = list(csv.DictReader(file))
    wanted = Classifier.from_pretrained(whole).predict(files, top_k=2)
    assert [row["file"] for row in rows] == [str(file) for file in files for _ in range(2)]
    assert [row["label"] for row in rows] == [label for prediction in wanted for label, _ in prediction]
    assert [row["rank"] for row in rows] == ["1", "2"] * len(files)
    (tmp_path / "broken.png").write_bytes(b"no image")
    assert main([str(whole), str(files[0]), str(tmp_path / "broken.png")]) == 1
    said = capsys.readouterr()
    assert len(said.out.splitlines()) == 2
    assert "broken.png: this image cannot be read" in said.err
    strange = os.fsencode(tmp_path) + b"/caf\xe9.png"
    shutil.copy(files[0], strange)
    assert main([str(whole), os.fsdecode(strange), "--out", str(out)]) == 0
    assert out.read_bytes().splitlines()[1].startswith(strange + b",1,")
    for arguments, message in (
        ([str(tmp_path / "nothing"), str(files[0])], "no such checkpoint"),
        ([str(whole), str(tmp_path / "nowhere")], "nowhere: does not exist"),
        ([str(whole), str(files[0]), "--out", str(tmp_path / "no" / "labels.csv")], "labels.csv: No such file"),
    ):
        assert main(arguments) == 2
        assert message in capsys.readouterr().err
