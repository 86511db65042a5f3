"""`--verify` trusts nothing that a version says of itself; and the gates' own arithmetic."""

import math
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from export import build
from export.__main__ import main
from export.errors import GateError
from export.golden import make_golden
from export.graph.trained import TrainedModel, cached_reference, reference_logits
from export.parity import (
    FLOAT32_TOLERANCE,
    Comparison,
    compare,
    compare_with_itself,
    edge_batches,
    max_difference,
    run_all,
    summary,
)
from export.quantization import gate, variants
from export.quantization.gate import EvalSet, evaluate
from export.quantization.variants import TOLERANCE_FACTOR, Base, build_variant
from export.source import load_data, load_source
from export.verify import Version, _verify_file
from service.engine.metadata import EvalMetrics, ModelMetadata, from_props, to_props
from service.engine.onnx_engine import OnnxEngine
from service.engine.session import read_metadata
from tests.export.conftest import SIZE
from tests.fakes import Images, Logits, tiny_metadata
from training import checkpoint

pytestmark = pytest.mark.usefixtures("translated_once")
ARGUMENTS = ("--golden", "6", "--max-batch", "2", "--variants")


@pytest.fixture(scope="module")
def exported(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("models") / "things"
    assert main([str(run), "--out", str(out), *ARGUMENTS]) == 0
    return out / "1"


@pytest.fixture
def version(exported: Path, tmp_path: Path) -> Path:
    """One that a test may change."""
    return Path(shutil.copytree(exported, tmp_path / "1"))


def change(path: Path, change_metadata: Callable[[ModelMetadata], ModelMetadata], *, negated: bool = False) -> None:
    """Write other metadata into a file, and other weights."""
    model = onnx.load(path)
    metadata = from_props({prop.key: prop.value for prop in model.metadata_props})
    del model.metadata_props[:]
    for key, value in to_props(change_metadata(metadata)).items():
        model.metadata_props.add(key=key, value=value)
    if negated:
        last = [node for node in model.graph.node if node.op_type in ("Gemm", "MatMul")][-1]
        weights = next(tensor for tensor in model.graph.initializer if tensor.name in last.input)
        weights.CopyFrom(numpy_helper.from_array(-numpy_helper.to_array(weights), weights.name))
    path.write_bytes(model.SerializeToString())


def verify(version: Path) -> int:
    return main(["--verify", str(version), "--provider", "cpu", "--max-batch", "2"])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("labels", ("door", "cup", "bear", "apple")),
        ("dataset", "others"),
        ("preset", "reference"),
        ("parameters", 12),
        ("temperature", 1.0),
        ("metrics", EvalMetrics(split="test", n=30, top1=0.99, top5=1.0, loss=1.0, ece=0.1)),
    ],
)
def test_metadata_that_the_checkpoint_contradicts(
    version: Path, field: str, value: object, capsys: pytest.CaptureFixture[str]
) -> None:
    change(version / "model.onnx", lambda metadata: metadata.model_copy(update={field: value}))
    assert verify(version) == 1
    assert f"its metadata has another {field} than checkpoint.safetensors." in capsys.readouterr().err


def test_a_file_can_not_set_its_own_tolerance(version: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change(version / "model.onnx", lambda held: held.model_copy(update={"golden_tolerance": 1e3}), negated=True)
    assert verify(version) == 1
    assert "the gate refuses this model on golden, black x 1" in capsys.readouterr().err


def test_a_checkpoint_of_another_model(version: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = version / "checkpoint.safetensors"
    tensors, header = checkpoint.load(path)
    checkpoint.save(path, {name: tensor + 1 for name, tensor in tensors.items()}, header)
    assert verify(version) == 2
    assert "by its SHA-256 the model was exported from another checkpoint" in capsys.readouterr().err


def test_a_file_for_cpus_is_not_run_elsewhere(version: Path) -> None:
    source = load_source(version)
    golden = make_golden(TrainedModel(source.preprocess, source.model).eval(), source, None, 2)
    result = _verify_file(Version(version, golden, None, None, []), "int8", "cuda", 2)
    assert (result.comparisons, result.gate) == ([], None)
    assert result.warnings == ["this file is for CPUs, and was not run: use --provider cpu"]


# --- comparing


class Formula:
    """An engine that is a function of its images."""

    def __init__(self, formula: Callable[[Images], Logits], max_batch_size: int = 4) -> None:
        self.formula, self.max_batch_size, self.metadata = formula, max_batch_size, tiny_metadata()
        self.provider = "cpu"

    def run(self, images: Images) -> Logits:
        assert len(images) <= self.max_batch_size
        return self.formula(images)


def brightness(images: Images) -> Logits:
    return np.stack([images.mean(axis=(1, 2, 3)), np.full(len(images), 100.0)], axis=1).astype(np.float32)


def test_an_image_must_not_change_the_logits_of_another() -> None:
    alone = compare_with_itself(Formula(brightness), 1e-3)  # type: ignore[arg-type]
    assert [c.name for c in alone if not c.passed] == []
    together = Formula(lambda images: brightness(images) + np.float32(0.002) * len(images))
    failed = [c.name for c in compare_with_itself(together, 1e-3) if not c.passed]  # type: ignore[arg-type]
    assert failed == [f"{name} x {n} alone" for n in (2, 3, 4) for name in ("black", "white", "noise")]


def test_edge_batches_are_black_white_and_noise_up_to_the_largest() -> None:
    batches = dict(edge_batches((4, 6), 5))
    assert list(batches) == [f"{name} x {n}" for n in (1, 2, 3, 5) for name in ("black", "white", "noise")]
    assert {images.shape[1:] for images in batches.values()} == {(4, 6, 3)}
    for n in (1, 2, 3, 5):
        assert np.unique(batches[f"black x {n}"]).tolist() == [0]
        assert np.unique(batches[f"white x {n}"]).tolist() == [255]
        assert len(np.unique(batches[f"noise x {n}"])) > 20
        assert len(batches[f"noise x {n}"]) == n
    assert [name for name, _ in edge_batches((4, 6), 2)][-1] == "noise x 2"


def test_a_label_that_differs_and_nan_fail() -> None:
    sure = np.array([[0.0, 1.0], [1.0, 0.0]], np.float32)
    assert compare("x", sure, sure, 0.5).passed
    assert compare("x", sure, sure[::-1].copy(), 0.5).labels_differ == 2
    assert compare("x", sure, sure[::-1].copy(), 1.5).labels_differ == 0  # both leave doubt
    assert not Comparison("x", 2, 0.0, 1, 0.5).passed
    nothing = compare("x", sure, np.full_like(sure, math.nan), 0.5)
    assert not nothing.passed
    assert math.isnan(max_difference([Comparison("y", 1, 9.0, 0, 0.5), nothing]))
    assert "nan" in summary([nothing, Comparison("y", 1, 9.0, 0, 0.5)])


def test_torch_runs_once_for_equal_images() -> None:
    runs: list[int] = []

    class Mean(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            runs.append(len(images))
            return images.float().mean(dim=(1, 2))

    reference = cached_reference(Mean())
    batches = [images for _, images in edge_batches((4, 6), 3)]
    for images in batches * 2:
        np.testing.assert_allclose(reference(images), images.mean(axis=(1, 2)), rtol=1e-5)
    assert runs == [len(images) for images in batches]


def test_reference_logits_keep_the_order_of_the_images() -> None:
    images = np.arange(230, dtype=np.uint8).repeat(12).reshape(230, 2, 2, 3)

    class First(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            assert len(images) <= 100
            return images[:, 0, 0, :1].float()

    assert reference_logits(First(), images).ravel().tolist() == list(range(230))


# --- variants


def test_a_gate_counts_equal_labels_and_right_ones() -> None:
    images = np.zeros((10, 4, 6, 3), np.uint8)
    images[:, 0, 0, 0] = np.arange(10)
    logits = np.eye(10, 5, dtype=np.float32)  # the first five images are of their own class, the others of class 0
    labels = np.array([0, 1, 2, 3, 0, 0, 0, 1, 1, 1])

    def answers(images: Images) -> Logits:
        found = logits[images[:, 0, 0, 0]].copy()
        found[images[:, 0, 0, 0] == 3] = [1, 0, 0, 0, 0]  # the one label that differs, right in float32
        return found

    gate = evaluate(Formula(answers), EvalSet("val", images, labels, logits), ((1, 1.5),))  # type: ignore[arg-type]
    assert (gate.n, gate.split, gate.provider, gate.speed) == (10, "val", "cpu", ((1, 1.5),))
    assert (gate.labels_equal, gate.top1, gate.top1_float32) == (0.9, 0.5, 0.6)
    broken = Formula(lambda images: np.where(images[:, :1, 0, 0] == 9, np.float32(math.nan), answers(images)))
    with pytest.raises(GateError, match="some of its logits of val images are not finite"):
        evaluate(broken, EvalSet("val", images, labels, logits), None)  # type: ignore[arg-type]


def captured(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Base:
    """What an export makes its variants of."""
    bases: list[Base] = []
    monkeypatch.setattr(build, "build_variants", lambda base, wanted: bases.append(base) or [])
    assert main([str(run), "--out", str(tmp_path / "out"), *ARGUMENTS, "int8"]) == 0
    return bases[0]


def test_scales_are_chosen_by_training_images_and_judged_by_others(
    run: Path, image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = captured(run, tmp_path, monkeypatch)
    source = load_source(run)
    data = load_data(source, None)
    np.testing.assert_array_equal(base.calibration, data.train.images.numpy())
    assert base.eval_set is not None
    np.testing.assert_array_equal(base.eval_set.images, data.val.images.numpy())
    np.testing.assert_array_equal(base.eval_set.labels, data.val.labels.numpy())
    trained = TrainedModel(source.preprocess, source.model, source.temperature).eval()
    np.testing.assert_allclose(base.eval_set.logits, reference_logits(trained, base.eval_set.images))
    with pytest.raises(AssertionError):
        np.testing.assert_array_equal(base.calibration, base.eval_set.images)


def test_a_variants_tolerance_covers_all_images_and_it_is_timed_at_the_sizes_that_serve(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed: list[object] = []

    def fast(base: object, variant: object, batches: tuple[int, ...]) -> tuple[tuple[int, float], ...]:
        timed.append(batches)
        return ((1, 1.5),)

    monkeypatch.setattr(gate, "MIN_IMAGES", 20)
    monkeypatch.setattr(gate, "MIN_LABELS_EQUAL", 0.0)
    monkeypatch.setattr(gate, "MAX_TOP1_LOSS", 1.0)
    monkeypatch.setattr(gate, "measure_speedup", fast)
    base = captured(run, tmp_path, monkeypatch)
    variant = build_variant(base, "int8")
    assert variant is not None
    assert timed == [(1, 8, 32)]  # although --max-batch is 2
    path = tmp_path / "model.int8.onnx"
    path.write_bytes(variant.content)
    engine = OnnxEngine(path, provider="cpu", max_batch_size=32)
    differences = [np.abs(run_all(engine, base.golden.images) - base.golden.logits).max()]
    differences += [np.abs(engine.run(x) - base.reference(x)).max() for _, x in edge_batches((SIZE, SIZE), 32)]
    assert max(differences) > FLOAT32_TOLERANCE
    expected = TOLERANCE_FACTOR * max(differences)
    assert read_metadata(path).golden_tolerance == pytest.approx(expected, rel=0.01)


def test_a_variant_that_gives_no_numbers_is_not_written_even_of_random_weights(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base = captured(run, tmp_path, monkeypatch)
    spoilt = onnx.ModelProto()
    spoilt.CopyFrom(base.graph)
    weights = max(spoilt.graph.initializer, key=lambda tensor: len(tensor.raw_data))
    nothing = np.full_like(numpy_helper.to_array(weights), math.nan)
    weights.CopyFrom(numpy_helper.from_array(nothing, weights.name))
    monkeypatch.setattr(variants, "candidate_graphs", lambda *args: iter([("spoilt", spoilt)]))
    random = Base(base.graph, base.metadata, base.reference, base.golden, base.calibration, None, 2, untimed=True)
    assert build_variant(random, "float16") is None
    assert "spoilt: refused: some of its logits are not finite." in capsys.readouterr().out


def test_the_card_says_where_validation_images_may_have_leaked(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for flatters in (False, True):
        monkeypatch.setattr(build, "validation_overlaps", lambda *args, found=flatters, **kwargs: ["a run"] * found)
        out = tmp_path / str(flatters)
        assert main([str(run), "--out", str(out), *ARGUMENTS]) == 0
        assert (
            "makes the metrics on them too good" in " ".join((out / "1" / "README.md").read_text().split())
        ) == flatters
