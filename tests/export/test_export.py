"""From a run's folder to a version that the service's engine runs, and each way it is refused."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from export import build
from export.__main__ import main
from export.graph.to_onnx import to_onnx
from export.graph.trained import TrainedModel
from export.source import load_data, load_source
from service.engine.metadata import from_props
from service.engine.onnx_engine import OnnxEngine
from service.repository.folder import list_versions, load_golden
from service.repository.golden_check import check_golden
from tests.export.conftest import LABELS, SIZE, TINY, write_run
from training.checkpoint import Origin, RunConfig, load_model
from training.config import PRESETS
from training.data.load import load
from training.report_schema import CURVES, PLOTS
from training.transfer import validation_overlaps

pytestmark = pytest.mark.usefixtures("translated_once")


@pytest.fixture(scope="module")
def exported(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Version 1 of a model folder."""
    out = tmp_path_factory.mktemp("models") / "things"
    assert main([str(run), "--out", str(out), "--golden", "6", "--max-batch", "5", "--variants"]) == 0
    return out / "1"


def open_engine(version: Path, max_batch_size: int = 5) -> OnnxEngine:
    return OnnxEngine(version / "model.onnx", provider="cpu", max_batch_size=max_batch_size, intra_op_threads=1)


def files_below(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*"))


def test_a_version_holds_what_the_contract_says(exported: Path) -> None:
    assert {path.name for path in exported.iterdir()} == {
        "model.onnx",
        "checkpoint.safetensors",
        "golden.npz",
        "README.md",
        "metrics.json",
        CURVES,
        *PLOTS,
    }
    for name in (CURVES, *PLOTS):
        assert (exported / name).read_bytes() == name.encode()


def test_metadata_come_back_from_the_file(exported: Path, run: Path) -> None:
    props = {prop.key: prop.value for prop in onnx.load(exported / "model.onnx").metadata_props}
    metadata = from_props(props)
    assert metadata.labels == LABELS
    assert metadata.name == "things"
    assert metadata.input_size == (SIZE, SIZE)
    assert metadata.temperature == 1.25
    assert metadata.metrics is not None
    assert (metadata.metrics.split, metadata.metrics.top1) == ("test", 0.4321)
    assert metadata.provenance.checkpoint_sha256 == json.loads((run / "report.json").read_text())["checkpoint_sha256"]
    assert props["Image.BitmapPixelFormat"] == "Rgb8"
    assert open_engine(exported).metadata == metadata


@pytest.mark.smoke
def test_the_engine_gives_the_checkpoints_calibrated_logits(exported: Path, run: Path) -> None:
    model, preprocess, _ = load_model(run)
    images = np.random.default_rng(1).integers(0, 256, (5, SIZE, SIZE, 3), dtype=np.uint8)
    with torch.inference_mode():
        expected = model(preprocess(torch.from_numpy(images))).numpy() / 1.25
    np.testing.assert_allclose(open_engine(exported).run(images), expected, atol=1e-5)


def test_golden_images_are_of_the_validation_split(exported: Path, image_folder: Path) -> None:
    golden = load_golden(exported / "golden.npz")
    split = load(image_folder, input_size=SIZE).val
    known = {image.numpy().tobytes(): int(label) for image, label in zip(split.images, split.labels, strict=True)}
    assert [known[image.tobytes()] for image in golden.images] == golden.labels.tolist()
    assert set(golden.labels.tolist()) == set(range(len(LABELS)))
    check_golden(open_engine(exported), golden)


def test_the_data_are_divided_as_the_run_divided_them(run: Path, image_folder: Path) -> None:
    """Otherwise golden images and a variant's gate would use training images."""
    source = load_source(run)
    train = source.run.train.model_copy(update={"validation_fraction": 0.4})
    whole = image_folder / "train"  # no val/ in it: five images of each class
    loaded = load_data(replace(source, run=source.run.model_copy(update={"train": train})), whole)
    assert (len(loaded.train), len(loaded.val)) == (3 * len(LABELS), 2 * len(LABELS))
    assert loaded.digest() == load(whole, input_size=SIZE, validation_fraction=0.4).digest()


def test_data_that_changed_between_runs_are_told_from_data_that_are_only_divided_otherwise(
    run: Path, image_folder: Path, tmp_path: Path
) -> None:
    whole = Path(shutil.copytree(image_folder / "train", tmp_path / "whole"))
    first = load_source(run).run.model_copy(
        update={"pictures_sha256": load(whole, input_size=SIZE, validation_fraction=0.4).digest()}
    )
    first = first.model_copy(update={"train": first.train.model_copy(update={"validation_fraction": 0.4})})
    init = Origin(checkpoint_sha256="1" * 64, epoch=1, git_commit=None, run=first)

    def last(fraction: float) -> RunConfig:
        train = first.train.model_copy(update={"validation_fraction": fraction})
        digest = load(whole, input_size=SIZE, validation_fraction=fraction).digest()
        return first.model_copy(update={"train": train, "pictures_sha256": digest, "init": init})

    for fraction in (0.4, 0.2):
        assert not validation_overlaps(last(fraction), whole, has_val=False)
    assert validation_overlaps(last(0.6), whole, has_val=False)
    # Of a run that began with the last one, what the first was trained on still tells.
    again = Origin(checkpoint_sha256="2" * 64, epoch=1, git_commit=None, run=last(0.6))
    assert validation_overlaps(last(0.6).model_copy(update={"init": again}), whole, has_val=False)
    (whole / LABELS[0] / "0.png").unlink()
    for fraction in (0.4, 0.2):
        assert validation_overlaps(last(fraction), whole, has_val=False)


@pytest.mark.parametrize("batch", [1, 2, 3, 17])
def test_logits_do_not_depend_on_the_batch(exported: Path, batch: int) -> None:
    engine = open_engine(exported, 17)
    images = np.random.default_rng(batch).integers(0, 256, (batch, SIZE, SIZE, 3), dtype=np.uint8)
    alone = np.concatenate([engine.run(image[None]) for image in images])
    np.testing.assert_allclose(engine.run(images), alone, atol=1e-5)


def test_the_card_says_what_a_user_must_know(exported: Path) -> None:
    card = (exported / "README.md").read_text()
    for words in (
        "4 classes of things",
        "43.21%",  # top-1 on the test images
        "epochs 7, mixup 0.5",
        "The weights of epoch 2 of 3.",
        "15 min (900 s) of training on cpu, 2 processes of 1 thread.",
        "python -m training --preset compact --processes 2 --threads 1 --data DATA/things",
        "| 2 | 2.000 | 1.500 | 20.0% |",  # the second epoch
        "40 trained it, 20 others chose checkpoint and temperature, and 30 more tested it, and were read",
        "70.0% of the images the predicted class is at least of the right",
        "| good | 20 | 50.0% | 80.0% |",
        "bear as cup (25% of the bear images)",
        "is 60.0% on average, against 60.0% on the test pictures",
        "| noise | 10 | 30.0% | 15.0% | |",
        "| of these, without near-duplicates of training images | 26 | 42.11% |",
        "A near-duplicate has a correlation of 0.9 or more with a training image.",
        "On 20 of the images, as they are and corrupted",
        "| none | 45.0% | |",
        "| greyscale | 40.0% | -5.0 |",
        "uint8 `[batch, 8, 8, 3]`",
        "--mixup 0.5",
        "Temperature 1.2500",
        "0 of 39 labels differ",
    ):
        assert words in " ".join(card.split())
    for name in (CURVES, *PLOTS):
        assert f"]({name})\n" in card


def test_the_card_mentions_copies_of_training_images(
    run: Path, image_folder: Path, tmp_path: Path, exported: Path
) -> None:
    mixed = Path(shutil.copytree(image_folder, tmp_path / "mixed"))
    shutil.copytree(mixed / "train", mixed / "test")
    shutil.copyfile(mixed / "train" / LABELS[0] / "0.png", mixed / "val" / LABELS[1] / "0.png")
    flags = ["--golden", "2", "--max-batch", "1", "--variants", "--data", str(mixed)]
    assert main([str(run), "--out", str(tmp_path / "out"), *flags]) == 0
    card, other = (
        " ".join((folder / "README.md").read_text().split()) for folder in (tmp_path / "out" / "1", exported)
    )
    assert (
        "Some images are exact copies of training images, which makes the metrics too good: 1 of validation and 20 of "
        "test. Nothing else was used" in card
    )
    assert "exact copies of training images" not in other


def test_metrics_json_holds_report_and_verification(exported: Path, run: Path) -> None:
    metrics = json.loads((exported / "metrics.json").read_text())
    report = json.loads((run / "report.json").read_text())
    assert report.items() <= metrics["report"].items()
    assert [epoch["val_top1"] for epoch in metrics["epochs"]] == pytest.approx([0.1, 0.2, 0.3])
    assert metrics["verification"][0]["name"] == "golden"
    assert metrics["verification"][0]["n"] == 6


def without_time(path: Path) -> bytes:
    model = onnx.load(path)
    (provenance,) = [prop for prop in model.metadata_props if prop.key == "perceiver.provenance"]
    provenance.value = json.dumps(json.loads(provenance.value) | {"created": ""})
    return model.SerializeToString(deterministic=True)


def test_a_second_export_is_the_same_but_for_the_time_and_leaves_the_first_alone(
    exported: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "to_onnx", to_onnx)  # which translates once more
    before = {path: path.read_bytes() for path in exported.iterdir()}
    assert main([str(run), "--out", str(exported.parent), "--golden", "6", "--max-batch", "5", "--variants"]) == 0
    assert [version.number for version in list_versions(exported.parent)] == [1, 2]
    assert {path: path.read_bytes() for path in exported.iterdir()} == before
    second = exported.parent / "2"
    assert without_time(second / "model.onnx") == without_time(exported / "model.onnx")
    assert (second / "golden.npz").read_bytes() == (exported / "golden.npz").read_bytes()


def test_the_file_holds_no_path_of_the_machine(exported: Path) -> None:
    content = (exported / "model.onnx").read_bytes()
    assert str(Path(build.__file__).parents[1]).encode() not in content
    assert b"site-packages" not in content


def test_verify_passes_on_what_was_written(exported: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder in (exported, exported.parent):
        assert main(["--verify", str(folder), "--provider", "cpu", "--max-batch", "4"]) == 0
    assert "0 of 66 labels differ" in capsys.readouterr().out


def test_verify_refuses_a_version_whose_golden_logits_are_others(
    exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(exported, tmp_path / "1")
    golden = load_golden(exported / "golden.npz")
    np.savez(tmp_path / "1" / "golden.npz", images=golden.images, labels=golden.labels, logits=golden.logits + 0.01)
    assert main(["--verify", str(tmp_path), "--provider", "cpu", "--max-batch", "2"]) == 1
    assert "the gate refuses this model on golden" in capsys.readouterr().err


class Wrong(TrainedModel):
    """A form that differs from the trained one by a hair."""

    def with_features(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits, features = super().with_features(images)
        return logits + 0.002, features


def test_the_gate_refuses_another_function_and_nothing_is_written(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(build, "fold", lambda trained: Wrong(trained.preprocess, trained.model, 1.25).eval())
    assert main([str(run), "--out", str(tmp_path / "out"), "--golden", "2", "--max-batch", "2"]) == 1
    said = capsys.readouterr().err
    assert "largest difference 2.00e-03" in said
    assert "export/graph/fold.py has to follow; --plain exports the trained form" in said
    assert files_below(tmp_path) == []


@pytest.mark.parametrize("form", [[], ["--plain"]], ids=["folded", "plain"])
def test_a_model_that_flips_is_exported_and_verified(form: list[str], image_folder: Path, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", image_folder, TINY.model_copy(update={"test_time_flip": True}))
    assert main([str(run), "--out", str(tmp_path / "out"), "--golden", "2", "--max-batch", "3", *form]) == 0
    assert main(["--verify", str(tmp_path / "out"), "--provider", "cpu", "--max-batch", "3"]) == 0
    card = " ".join((tmp_path / "out" / "1" / "README.md").read_text().split())
    assert "probabilities. They are the mean over the image and its mirror image. The file's metadata" in card
    images = np.random.default_rng(0).integers(0, 256, (2, SIZE, SIZE, 3), dtype=np.uint8)
    engine = open_engine(tmp_path / "out" / "1")
    mirrored = engine.run(np.ascontiguousarray(images[:, :, ::-1]))
    np.testing.assert_allclose(engine.run(images), mirrored, rtol=1e-4, atol=1e-5)


def test_random_weights_need_no_data_and_say_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(PRESETS, "tiny", PRESETS["compact"].model_copy(update={"model": TINY}))
    assert main(["--random", "tiny", "--out", "x", "--golden", "2", "--max-batch", "2"]) == 0
    assert "random weights" in capsys.readouterr().out
    card = (tmp_path / "x" / "1" / "README.md").read_text()
    assert "random weights" in card
    assert "## Evaluation" not in card
    assert open_engine(tmp_path / "x" / "1").metadata.metrics is None


def test_an_exported_version_keeps_the_epochs(exported: Path, run: Path) -> None:
    assert load_source(exported).epochs == load_source(run).epochs != ()
