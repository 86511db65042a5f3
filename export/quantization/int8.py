"""Int8 for CPUs: static quantization of linear layers, in the graph of model.onnx.

A layer x W + b becomes QuantizeLinear (uint8, one scale and zero point for x, fixed at export) and MatMulIntegerToFloat
(int8 weights, one scale a column). onnxruntime's dynamic quantization takes one scale over the whole batch instead,
which lets images change each other's logits.

Weights are rounded one input channel after the other, and each error is passed on to the remaining channels (GPTQ,
Frantar et al. 2022, arXiv:2210.17323): about a third of the noise of rounding to nearest.
`export.quantization.sensitivity` chooses the layers that are worth their noise.

Shape letters: N images, H and W the input size in pixels, R rows of a calibration set, I and O input and output
channels.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from export.graph.trained import Images
from service.engine.metadata import INPUT_NAME

Floats = NDArray[np.float32]

CONTRIB_DOMAIN = "com.microsoft"  # of onnxruntime's own operators
CALIBRATION_BATCH = 16
CALIBRATION_ROWS = 16_384  # of each input; more do not change the scales
# Largest rounded weights; symmetric, so that a column needs no zero point. The second is for processors that add pairs
# of products in 16 bits, which 255 * 127 * 2 exceeds (onnxruntime's own quantization calls it reduce_range).
MAX_INT8, MAX_INT8_IN_PAIRS = 127, 63
WEIGHT_RANGES = np.linspace(0.75, 1.0, 11)  # shares of a column's largest weight that are tried as its range
INPUT_RANGES = np.linspace(0.5, 1.0, 21)  # shares of an input's extremes that are tried as its range
DAMPING = 0.01  # added to the diagonal of the inputs' second moments, as a share of its mean


@dataclass(frozen=True)
class LinearLayer:
    """A matrix product with constant weights.

    Attributes:
        name: of its output in the graph; unique.
        source: name of its input.
        weight: float32 [I, O].
        bias: name of its bias, or None.
    """

    name: str
    source: str
    weight: Floats
    bias: str | None


@dataclass(frozen=True)
class QuantizedLayer:
    """A layer on integers: x W is about scale * column_scales * ((q(x) - zero_point) weight).

    Attributes:
        scale: of the input.
        zero_point: of the input, uint8.
        weight: int8 [I, O].
        column_scales: float32 [O].
    """

    scale: np.float32
    zero_point: np.uint8
    weight: NDArray[np.int8]
    column_scales: Floats


def find_layers(model: ModelProto) -> list[LinearLayer]:
    """List the linear layers of a graph, in its order."""
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    return [
        LinearLayer(
            name=node.output[0],
            source=node.input[0],
            weight=_weight(node, numpy_helper.to_array(constants[node.input[1]])),
            bias=node.input[2] if len(node.input) > 2 else None,
        )
        for node in model.graph.node
        if node.op_type in ("MatMul", "Gemm") and node.input[1] in constants and node.input[0] not in constants
    ]


def _weight(node: NodeProto, constant: Floats) -> Floats:
    """Return a node's weight as [I, O]; a Gemm may hold it transposed, as torch's linear layers do."""
    transposed = any(attribute.name == "transB" and attribute.i for attribute in node.attribute)
    return np.ascontiguousarray(constant.T) if transposed else constant


def open_session(model: ModelProto) -> Any:
    """Open a graph as an onnxruntime InferenceSession on the CPU."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def collect_inputs(model: ModelProto, layers: Sequence[LinearLayer], images: Images) -> dict[str, Floats]:
    """Run calibration images, uint8 [N, H, W, 3], and keep evenly spaced rows of each layer's input.

    Returns:
        float32 [R, I] by name of the input.
    """
    names = sorted({layer.source for layer in layers})
    probe = ModelProto()
    probe.CopyFrom(model)
    probe.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names)
    batches = [images[at : at + CALIBRATION_BATCH] for at in range(0, len(images), CALIBRATION_BATCH)]
    rows_per_batch = max(1, CALIBRATION_ROWS // len(batches))
    session = open_session(probe)
    kept: dict[str, list[Floats]] = {name: [] for name in names}
    for batch in batches:
        for name, values in zip(names, session.run(names, {INPUT_NAME: batch}), strict=True):
            rows = values.reshape(-1, values.shape[-1])
            kept[name].append(rows[:: -(-len(rows) // rows_per_batch)])
    return {name: np.concatenate(parts) for name, parts in kept.items()}


def choose_scale(rows: Floats) -> tuple[np.float32, np.uint8]:
    """Choose uint8 scale and zero point for float32 [R, I], from the range with the least mean square error."""
    low, high = min(float(rows.min()), 0.0), max(float(rows.max()), 0.0)
    if high == low:
        return np.float32(1), np.uint8(0)

    def error(share: float) -> float:
        scale, zero = _scale_of(low * share, high * share)
        values = (np.clip(np.round(rows / scale) + zero, 0, 255) - zero) * scale
        return float(np.square(values - rows).mean())

    share = float(min(INPUT_RANGES, key=error))
    scale, zero = _scale_of(low * share, high * share)
    return np.float32(scale), np.uint8(zero)


def _scale_of(low: float, high: float) -> tuple[float, float]:
    scale = (high - low) / 255
    return scale, float(np.clip(np.round(-low / scale), 0, 255))


@cache
def largest_weight() -> int:
    """The largest rounded weight whose products this processor adds without saturation."""
    inputs = [helper.make_tensor_value_info("rows", TensorProto.UINT8, [1, 64])]
    outputs = [helper.make_tensor_value_info("sums", TensorProto.FLOAT, [1, 16])]
    constants = [
        numpy_helper.from_array(np.full((64, 16), MAX_INT8, dtype=np.int8), "weight"),
        numpy_helper.from_array(np.ones((), dtype=np.float32), "scale"),
    ]
    names = ["rows", "weight", "scale", "scale"]
    node = helper.make_node("MatMulIntegerToFloat", names, ["sums"], domain=CONTRIB_DOMAIN)
    graph = helper.make_graph([node], "saturation", inputs, outputs, constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid(CONTRIB_DOMAIN, 1)], ir_version=10)
    (sums,) = open_session(model).run(None, {"rows": np.full((1, 64), 255, dtype=np.uint8)})
    return MAX_INT8 if (sums == 64 * 255 * MAX_INT8).all() else MAX_INT8_IN_PAIRS


def round_weight(weight: Floats, rows: Floats) -> tuple[NDArray[np.int8], Floats]:
    """Round a weight by GPTQ, so that its product with the calibration rows changes least.

    Args:
        weight: float32 [I, O].
        rows: float32 [R, I].

    Returns:
        int8 [I, O] and one scale a column, float32 [O].
    """
    matrix = weight.astype(np.float64)
    inputs = rows.astype(np.float64)
    moments = inputs.T @ inputs / len(inputs)
    mean = float(np.diag(moments).mean())
    moments += np.eye(len(moments)) * (DAMPING * mean if mean > 0 else 1.0)
    limit = largest_weight()
    scales = _column_scales(matrix, moments, limit)
    # The largest inputs first: all others can still compensate their errors.
    order = np.argsort(-np.diag(moments), kind="stable")
    upper = np.linalg.cholesky(np.linalg.inv(moments[np.ix_(order, order)])).T
    left = matrix[order]
    rounded = np.zeros_like(left)
    for channel in range(len(left)):
        rounded[channel] = np.clip(np.round(left[channel] / scales), -limit, limit)
        error = (left[channel] - rounded[channel] * scales) / upper[channel, channel]
        left[channel + 1 :] -= np.outer(upper[channel, channel + 1 :], error)
    return rounded[np.argsort(order)].astype(np.int8), scales.astype(np.float32)


def _column_scales(matrix: NDArray[np.float64], moments: NDArray[np.float64], limit: int) -> NDArray[np.float64]:
    """Choose for each column the range whose rounding to nearest changes the product least; float64 [O]."""
    largest = np.maximum(np.abs(matrix).max(axis=0), 1e-12)
    candidates = [largest * share / limit for share in WEIGHT_RANGES]
    errors = []
    for scales in candidates:
        error = np.clip(np.round(matrix / scales), -limit, limit) * scales - matrix
        errors.append(np.einsum("io,io->o", error, moments @ error))
    best: NDArray[np.float64] = np.choose(np.argmin(errors, axis=0), candidates)
    return best


def quantize_layer(layer: LinearLayer, rows: Floats) -> QuantizedLayer:
    """Quantize a layer by rows of its input, float32 [R, I]."""
    scale, zero_point = choose_scale(rows)
    weight, column_scales = round_weight(layer.weight, rows)
    return QuantizedLayer(scale, zero_point, weight, column_scales)


def quantize_layers(model: ModelProto, images: Images) -> dict[str, QuantizedLayer]:
    """Quantize every linear layer by calibration images, uint8 [N, H, W, 3]; by name."""
    layers = find_layers(model)
    rows = collect_inputs(model, layers, images)
    return {layer.name: quantize_layer(layer, rows[layer.source]) for layer in layers}


def replace_layers(model: ModelProto, quantized: Mapping[str, QuantizedLayer]) -> ModelProto:
    """Return a copy of the graph with these layers, by name, on integers; a shared input is quantized once."""
    result = ModelProto()
    result.CopyFrom(model)
    layers = {layer.name: layer for layer in find_layers(model)}
    nodes: list[NodeProto] = []
    sources: set[str] = set()
    for node in model.graph.node:
        name = node.output[0]
        if name not in quantized:
            nodes.append(node)
            continue
        source, values = layers[name].source, quantized[name]
        if source not in sources:
            sources.add(source)
            _add_constants(result, source, scale=values.scale, zero_point=values.zero_point)
            inputs = [source, f"{source}.scale", f"{source}.zero_point"]
            nodes.append(helper.make_node("QuantizeLinear", inputs, [f"{source}.quantized"]))
        _add_constants(result, name, weight=values.weight, column_scales=values.column_scales)
        nodes.append(_integer_node(layers[name]))
    del result.graph.node[:]
    result.graph.node.extend(nodes)
    _drop_unused_constants(result)
    if quantized:
        result.opset_import.append(helper.make_opsetid(CONTRIB_DOMAIN, 1))
    return result


def _integer_node(layer: LinearLayer) -> NodeProto:
    inputs = [
        f"{layer.source}.quantized",
        f"{layer.name}.weight",
        f"{layer.source}.scale",
        f"{layer.name}.column_scales",
        f"{layer.source}.zero_point",
        "",  # weights are symmetric: no zero point
        *([layer.bias] if layer.bias is not None else []),
    ]
    return helper.make_node("MatMulIntegerToFloat", inputs, [layer.name], domain=CONTRIB_DOMAIN)


def _add_constants(model: ModelProto, prefix: str, **values: np.generic | NDArray[np.generic]) -> None:
    model.graph.initializer.extend(
        numpy_helper.from_array(np.asarray(value), f"{prefix}.{name}") for name, value in values.items()
    )


def _drop_unused_constants(model: ModelProto) -> None:
    used = {name for node in model.graph.node for name in node.input}
    kept = [tensor for tensor in model.graph.initializer if tensor.name in used]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
