"""The output `features`: of the graph, of the folded form, in metadata and golden images, against torch."""

from pathlib import Path

import numpy as np
import pytest
import torch

from export.graph.fold import fold
from export.graph.to_onnx import serialize, to_onnx
from export.graph.trained import WithFeatures
from service.engine.metadata import MODEL_FILE, to_props
from service.engine.onnx_engine import EngineError, OnnxEngine
from service.repository.folder import Golden, load_golden, save_golden
from service.repository.golden_check import GoldenMismatchError, check_golden
from tests.export.conftest import SIZE, TINY
from tests.export.test_fold import random_images, trained_model
from tests.fakes import tiny_metadata

KINDS = [
    {},
    {"test_time_flip": True},
    {"test_time_flip": True, "head_hidden": True},
    {"head_norm": not TINY.head_norm, "test_time_flip": True},
]


@pytest.mark.parametrize("kind", KINDS)
def test_features_are_what_the_head_classifies(kind: dict[str, bool]) -> None:
    config = TINY.model_copy(update=kind)
    trained, images = trained_model(config), random_images(config)
    with torch.inference_mode():
        logits, features = trained.with_features(images)
        torch.testing.assert_close(logits, trained(images))
        assert features.shape == (len(images), config.dim)
        if not config.head_hidden:
            torch.testing.assert_close(trained.model.head(features) / trained.temperature, logits)
        for got, expected in zip(fold(trained).with_features(images), (logits, features), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Golden]:
    folder = tmp_path_factory.mktemp("features")
    config = TINY.model_copy(update={"test_time_flip": True})
    trained, images = trained_model(config), random_images(config, 5)
    with torch.inference_mode():
        logits, features = (each.numpy() for each in trained.with_features(images))
    labels = tuple(f"class {index}" for index in range(config.num_classes))
    metadata = tiny_metadata(labels=labels, input_size=(SIZE, SIZE), feature_dim=config.dim, golden_tolerance=1e-3)
    graph = to_onnx(WithFeatures(fold(trained)), (SIZE, SIZE))
    (folder / MODEL_FILE).write_bytes(serialize(graph, to_props(metadata)))
    golden = Golden(images.numpy(), logits.argmax(axis=1), logits, features)
    save_golden(folder / "golden.npz", golden)
    return folder / MODEL_FILE, load_golden(folder / "golden.npz")


def test_the_engine_gives_torchs_features_and_the_same_logits(exported: tuple[Path, Golden]) -> None:
    path, golden = exported
    engine = OnnxEngine(path, provider="cpu", intra_op_threads=1, max_batch_size=8)
    logits, _, features = engine.run_outputs(golden.images, with_features=True)
    assert features is not None
    np.testing.assert_array_equal(logits, engine.run(golden.images))
    np.testing.assert_allclose(features, golden.features, rtol=1e-4, atol=1e-4)
    assert logits.dtype == features.dtype == np.float32
    check_golden(engine, golden)


def test_other_features_fail_the_golden_check(exported: tuple[Path, Golden]) -> None:
    path, golden = exported
    engine = OnnxEngine(path, provider="cpu", intra_op_threads=1, max_batch_size=2)
    assert golden.features is not None
    turned = Golden(golden.images, golden.labels, golden.logits, golden.features[:, ::-1].copy())
    with pytest.raises(GoldenMismatchError, match="other features"):
        check_golden(engine, turned)
    without = Golden(golden.images, golden.labels, golden.logits)
    with pytest.raises(EngineError, match="must have features of width 16"):
        check_golden(engine, without)


def test_a_graph_without_features_says_so(tmp_path: Path) -> None:
    graph = to_onnx(fold(trained_model(TINY)), (SIZE, SIZE))
    labels = tuple(f"class {index}" for index in range(TINY.num_classes))
    path = tmp_path / MODEL_FILE
    path.write_bytes(serialize(graph, to_props(tiny_metadata(labels=labels, input_size=(SIZE, SIZE)))))
    engine = OnnxEngine(path, provider="cpu", intra_op_threads=1)
    with pytest.raises(EngineError, match="no output features"):
        engine.run_outputs(np.zeros((1, SIZE, SIZE, 3), np.uint8), with_features=True)
    props = to_props(tiny_metadata(labels=labels, input_size=(SIZE, SIZE), feature_dim=16))
    path.write_bytes(serialize(graph, props))
    with pytest.raises(EngineError, match=r"must be logits.* features tensor\(float\) \['batch', 16\]"):
        OnnxEngine(path, provider="cpu", intra_op_threads=1)
