"""A model that costs nothing: one small matrix product. What is left of a request's cost is the service's own."""

from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from benchmarks.common import ModelPlace
from export.publish import new_version
from service.engine.metadata import (
    INPUT_NAME,
    MODEL_FILE,
    OUTPUT_NAME,
    SCHEMA_VERSION,
    ModelMetadata,
    Provenance,
    ResizePolicy,
    to_props,
)
from service.repository.folder import GOLDEN_FILE, Golden, save_golden

SIDE, CLASSES, GOLDEN_IMAGES = 32, 100, 8
INPUTS = SIDE * SIDE * 3


def make_tiny_model(folder: Path) -> ModelPlace:
    """Write version 1 of a model for 32 x 32 images and 100 classes into `folder`, with its golden images."""
    rng = np.random.default_rng(0)
    weights = rng.normal(0, 1e-3, (INPUTS, CLASSES)).astype(np.float32)
    images = rng.integers(0, 256, (GOLDEN_IMAGES, SIDE, SIDE, 3), dtype=np.uint8)
    logits = images.reshape(GOLDEN_IMAGES, INPUTS).astype(np.float32) @ weights
    with new_version(folder) as (_, temporary):
        onnx.save(_graph(weights), temporary / MODEL_FILE)
        save_golden(temporary / GOLDEN_FILE, Golden(images, logits.argmax(axis=1), logits))
    return ModelPlace(folder, 1, folder / "1")


def _graph(weights: np.ndarray) -> onnx.ModelProto:
    nodes = [
        helper.make_node("Cast", [INPUT_NAME], ["float"], to=TensorProto.FLOAT),
        helper.make_node("Reshape", ["float", "shape"], ["flat"]),
        helper.make_node("MatMul", ["flat", "weights"], [OUTPUT_NAME]),
    ]
    constants = [
        numpy_helper.from_array(weights, "weights"),
        numpy_helper.from_array(np.array([-1, INPUTS], dtype=np.int64), "shape"),
    ]
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info(INPUT_NAME, TensorProto.UINT8, ["batch", SIDE, SIDE, 3])],
        [helper.make_tensor_value_info(OUTPUT_NAME, TensorProto.FLOAT, ["batch", CLASSES])],
        constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    helper.set_model_props(model, to_props(_metadata()))
    return model


def _metadata() -> ModelMetadata:
    return ModelMetadata(
        schema_version=SCHEMA_VERSION,
        name="tiny",
        labels=tuple(f"class {index}" for index in range(CLASSES)),
        input_size=(SIDE, SIDE),
        resize=ResizePolicy(),
        dataset="noise",
        metrics=None,
        preset="tiny",
        parameters=INPUTS * CLASSES,
        precision="float32",
        golden_tolerance=1e-2,
        provenance=Provenance(
            git_commit=None,
            checkpoint_sha256="0" * 64,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            versions={"onnx": onnx.__version__},
        ),
    )
