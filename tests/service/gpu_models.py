"""Tiny model folders for what only a GPU does: a float16 file, and a model that needs much memory for each image."""

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from service.engine.metadata import MODEL_FILE, MODEL_FILES, to_props
from service.repository.folder import GOLDEN_FILE, Golden, save_golden
from tests.fakes import CLASSES, HEIGHT, WIDTH, make_model_folder, tiny_images, tiny_logits, tiny_metadata

INPUTS = HEIGHT * WIDTH * 3
OPSET = 18


def weights() -> np.ndarray:
    """Those of the tiny model of version 1: float32 [INPUTS, CLASSES], one row a call of it."""
    return tiny_logits(np.eye(INPUTS, dtype=np.uint8).reshape(INPUTS, HEIGHT, WIDTH, 3), 1)


def make_half_folder(folder: Path) -> Path:
    """Version 1 with model.onnx and a file that does the product in float16; the golden check allows for it."""
    version = make_model_folder(folder, golden_tolerance=0.1)
    nodes = [
        helper.make_node("Cast", ["images"], ["half"], to=TensorProto.FLOAT16),
        helper.make_node("Reshape", ["half", "rows"], ["flat"]),
        helper.make_node("MatMul", ["flat", "weights"], ["product"]),
        helper.make_node("Cast", ["product"], ["logits"], to=TensorProto.FLOAT),
    ]
    constants = [
        numpy_helper.from_array(weights().astype(np.float16), "weights"),
        numpy_helper.from_array(np.array([-1, INPUTS]), "rows"),
    ]
    model = make_model(nodes, constants, precision="float16", golden_tolerance=0.1)
    (version / MODEL_FILES["float16"]).write_bytes(model.SerializeToString())
    return version


def make_hungry_folder(folder: Path, bytes_per_image: int) -> Path:
    """Version 1 answers as the tiny model does, and lays every image out in so much memory to do so."""
    version = folder / "1"
    version.mkdir(parents=True)
    copies = bytes_per_image // (INPUTS * 4)
    nodes = [
        helper.make_node("Cast", ["images"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("Reshape", ["float", "rows"], ["flat"]),
        helper.make_node("Expand", ["flat", "copies"], ["laid_out"]),
        helper.make_node("ReduceMax", ["laid_out", "second"], ["same"], keepdims=0),  # of equal values: exact
        helper.make_node("MatMul", ["same", "weights"], ["logits"]),
    ]
    constants = [
        numpy_helper.from_array(weights(), "weights"),
        numpy_helper.from_array(np.array([-1, 1, INPUTS]), "rows"),
        numpy_helper.from_array(np.array([1, copies, INPUTS]), "copies"),
        numpy_helper.from_array(np.array([1]), "second"),
    ]
    (version / MODEL_FILE).write_bytes(make_model(nodes, constants).SerializeToString())
    images = tiny_images(2)
    logits = tiny_logits(images, 1)
    save_golden(version / GOLDEN_FILE, Golden(images, logits.argmax(axis=1), logits))
    return version


def make_model(nodes: list[onnx.NodeProto], constants: list[onnx.TensorProto], **metadata: object) -> onnx.ModelProto:
    """A model of the tiny one's form."""
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("images", TensorProto.UINT8, ["batch", HEIGHT, WIDTH, 3])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", CLASSES])],
        constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10)
    helper.set_model_props(model, to_props(tiny_metadata(**metadata)))
    onnx.checker.check_model(model)
    return model
