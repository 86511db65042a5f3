"""The output `unfamiliarity`: against the distance computed from scratch, in the graph, in a folder, in the card."""

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import ModelProto

from export.__main__ import main
from export.errors import ExportError, GateError
from export.graph.fold import fold
from export.graph.to_onnx import serialize, to_onnx
from export.graph.trained import WithFeatures
from export.quantization.float16 import to_float16
from export.quantization.int8 import quantize_layers, replace_layers
from export.unfamiliarity import PREFIX, Mahalanobis, per_class
from export.verify import verify
from service.engine.metadata import MODEL_FILE, from_props, to_props
from service.engine.onnx_engine import OnnxEngine
from service.repository.folder import GOLDEN_FILE, load_golden, save_golden
from service.repository.golden_check import check_golden
from tests.export.conftest import SIZE, TINY, write_images, write_run
from tests.export.test_fold import random_images, trained_model
from tests.fakes import tiny_metadata, tiny_unfamiliarity

pytestmark = pytest.mark.usefixtures("translated_once")
DIM, CLASSES = 6, 3


def known(n: int = 90, seed: int = 0) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Features of CLASSES clouds of different shape: float32 [n, DIM], and their classes."""
    random = np.random.default_rng(seed)
    labels = np.arange(n) % CLASSES
    centres = random.normal(0, 3, (CLASSES, DIM))
    return (centres[labels] + random.normal(size=(n, DIM)) * np.arange(1, DIM + 1)).astype(np.float32), labels


def from_scratch(features: NDArray[np.float32], labels: NDArray[np.int64], point: NDArray[np.float32]) -> float:
    """Shrink, invert, and take the least distance, one number after the other."""
    n, p = features.shape
    means = [features[labels == label].astype(float).mean(axis=0) for label in sorted(set(labels.tolist()))]
    covariance = np.zeros((p, p))
    for row, label in zip(features.astype(float), labels, strict=True):
        covariance += np.outer(row - means[label], row - means[label]) / n
    trace, square = np.trace(covariance), np.trace(covariance @ covariance)
    rho = min(1, ((1 - 2 / p) * square + trace**2) / ((n + 1 - 2 / p) * (square - trace**2 / p)))
    inverse = np.linalg.inv((1 - rho) * covariance + rho * trace / p * np.eye(p))
    return float(min(np.sqrt((point - mean) @ inverse @ (point - mean)) for mean in means))


def test_distance_is_that_computed_from_scratch() -> None:
    features, labels = known()
    others = np.concatenate([known(9, seed=1)[0], features[:3], np.full((1, DIM), 1e3, np.float32)])
    expected = [from_scratch(features, labels, other) for other in others]
    np.testing.assert_allclose(Mahalanobis(features, labels).distance(others), expected, rtol=1e-9)


def test_distance_does_not_depend_on_where_the_origin_is_nor_on_the_axes() -> None:
    features, labels = known()
    turn, _ = np.linalg.qr(np.random.default_rng(2).normal(size=(DIM, DIM)))
    moved = Mahalanobis(features @ turn * 5 + 7, labels)
    expected = Mahalanobis(features, labels).distance(features)
    np.testing.assert_allclose(moved.distance(features @ turn * 5 + 7), expected, rtol=1e-6)


def test_a_class_mean_is_at_no_distance_and_what_is_far_is_farther() -> None:
    features, labels = known()
    distance = Mahalanobis(features, labels)
    mean = features[labels == 1].astype(np.float64).mean(axis=0)
    steps = distance.distance(mean + np.outer([0, 50, 100, 200], np.ones(DIM)))
    assert steps[0] == pytest.approx(0, abs=1e-9)
    assert (np.diff(steps) > 0).all()


@pytest.mark.parametrize("n", [4, 8])
def test_fewer_images_than_dimensions_give_finite_distances(n: int) -> None:
    assert np.isfinite(Mahalanobis(*known(n)).distance(known(5, seed=3)[0])).all()


def test_one_image_a_class_is_refused() -> None:
    with pytest.raises(ExportError, match="do not vary within any class"):
        Mahalanobis(*known(CLASSES))


def test_images_are_taken_evenly_of_all_classes() -> None:
    labels = np.repeat([0, 1, 2, 5], [100, 10, 3, 1])
    chosen = per_class(labels, 40)
    assert np.bincount(labels[chosen]).tolist() == [10, 10, 3, 0, 0, 1]
    assert len(set(chosen.tolist())) == len(chosen)


# In the graph


@pytest.fixture(scope="module")
def graph() -> ModelProto:
    return to_onnx(WithFeatures(fold(trained_model(TINY.model_copy(update={"test_time_flip": True})))), (SIZE, SIZE))


@pytest.fixture
def distance() -> Mahalanobis:
    random = np.random.default_rng(0)
    return Mahalanobis(random.normal(size=(80, TINY.dim)).astype(np.float32), np.arange(80) % 4)


def open_graph(folder: Path, graph: ModelProto, **metadata: object) -> OnnxEngine:
    labels = tuple(f"class {index}" for index in range(TINY.num_classes))
    fields = {"labels": labels, "input_size": (SIZE, SIZE), "feature_dim": TINY.dim}
    fields["unfamiliarity"] = tiny_unfamiliarity(3)
    path = folder / MODEL_FILE
    path.write_bytes(serialize(graph, to_props(tiny_metadata(**fields | metadata))))
    return OnnxEngine(path, provider="cpu", intra_op_threads=1, max_batch_size=8)


@pytest.mark.parametrize("precision", ["float32", "float16", "int8"])
def test_graph_gives_the_distance_of_its_features(
    tmp_path: Path, graph: ModelProto, distance: Mahalanobis, precision: str
) -> None:
    images = random_images(TINY, 7).numpy()
    before = graph.SerializeToString(deterministic=True)
    variant = {
        "float32": lambda: graph,
        "float16": lambda: to_float16(graph),
        "int8": lambda: replace_layers(graph, quantize_layers(graph, images)),
    }[precision]()
    whole = distance.append_to(variant)
    onnx.checker.check_model(whole) if precision != "int8" else None  # it has operators of onnxruntime's own
    engine = open_graph(tmp_path, whole)
    outputs = engine.run_outputs(images, with_features=True)
    assert outputs.features is not None
    assert outputs.unfamiliarity is not None
    assert (outputs.unfamiliarity.dtype, outputs.unfamiliarity.shape) == (np.float32, (7,))
    np.testing.assert_allclose(outputs.unfamiliarity, distance.distance(outputs.features), rtol=1e-4)
    np.testing.assert_array_equal(engine.run_outputs(images).unfamiliarity, outputs.unfamiliarity)
    alone = [engine.run_outputs(image[None]).unfamiliarity for image in images]
    np.testing.assert_allclose(np.concatenate(alone), outputs.unfamiliarity, rtol=1e-4)  # type: ignore[arg-type]
    mirrored = engine.run_outputs(np.ascontiguousarray(images[:, :, ::-1])).unfamiliarity
    np.testing.assert_allclose(mirrored, outputs.unfamiliarity, rtol=0.02 if precision == "float16" else 1e-3)
    assert distance.append_to(variant).SerializeToString(deterministic=True) == whole.SerializeToString(
        deterministic=True
    )
    assert graph.SerializeToString(deterministic=True) == before
    constants = [tensor for tensor in whole.graph.initializer if tensor.name.startswith(PREFIX)]
    assert {tensor.data_type for tensor in constants} == {onnx.TensorProto.FLOAT, onnx.TensorProto.INT64}


# In a folder


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A version whose run has validation images enough."""
    folder = tmp_path_factory.mktemp("many")
    run = write_run(folder / "run", write_images(folder / "images", count=25))
    assert main([str(run), "--out", str(folder / "things"), "--golden", "6", "--max-batch", "3", "--variants"]) == 0
    return folder / "things" / "1"


def test_a_version_has_threshold_golden_scores_and_the_shares_in_its_card(exported: Path) -> None:
    engine = OnnxEngine(exported / MODEL_FILE, provider="cpu", intra_op_threads=1)
    fit, golden = engine.metadata.unfamiliarity, load_golden(exported / GOLDEN_FILE)
    assert fit is not None
    assert (fit.split, fit.n, fit.training_images) == ("val", 100, 100)
    assert fit.flagged == pytest.approx(0.05, abs=0.011)
    assert golden.unfamiliarity is not None
    outputs = engine.run_outputs(golden.images)
    np.testing.assert_allclose(outputs.unfamiliarity, golden.unfamiliarity, rtol=1e-3)  # type: ignore[arg-type]
    assert check_golden(engine, golden).score_ratio < 1e-3
    card = (exported / "README.md").read_text(encoding="utf-8")
    flagged = json.loads((exported / "metrics.json").read_text())["unfamiliar"]
    assert [(each["images"], each["n"]) for each in flagged] == [
        (kind, 64) for kind in ("noise", "one colour", "stripes", "text")
    ]
    for each in flagged:
        assert f"| drawn: {each['images']} | 64 | {each['share']:.1%} |" in card
    assert f"`unfamiliar` above {fit.threshold:.4g}" in " ".join(card.split())
    config = (exported.parent / "config.pbtxt").read_text()
    assert '{ name: "unfamiliarity" data_type: TYPE_FP32 dims: [ 1 ] reshape { shape: [ ] } }' in config


def test_verify_refuses_another_unfamiliarity(exported: Path, tmp_path: Path) -> None:
    for result in verify(exported, "cpu", 3, None):
        result.require()
    for path in exported.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    golden = load_golden(exported / GOLDEN_FILE)
    assert golden.unfamiliarity is not None
    golden.unfamiliarity[2] *= 1.01
    save_golden(tmp_path / GOLDEN_FILE, golden)
    with pytest.raises(GateError, match=r"refuses the output unfamiliarity: on golden images it differs .* 9\.9e-03"):
        verify(tmp_path, "cpu", 3, None)


def test_too_few_validation_images_give_none_and_say_so(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(run), "--out", str(tmp_path / "things"), "--golden", "2", "--max-batch", "1", "--variants"]
    assert main(arguments) == 0
    reason = "20 validation images are too few for a threshold; at least 100 are needed."
    assert [line for line in capsys.readouterr().out.splitlines() if "unfamiliar" in line] == [
        f"no output unfamiliarity, so no answer says that an image is unlike the training images: {reason}"
    ]
    model = onnx.load(tmp_path / "things" / "1" / MODEL_FILE)
    assert from_props({prop.key: prop.value for prop in model.metadata_props}).unfamiliarity is None
    assert [output.name for output in model.graph.output] == ["logits", "features"]
    assert "Unfamiliar" not in (tmp_path / "things" / "1" / "README.md").read_text(encoding="utf-8")
