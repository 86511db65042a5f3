"""Int8 for CPUs: products of constant weights computed on 8-bit integers by a static scale, in the graph of model.onnx.

A product x W becomes QuantizeLinear (uint8, one scale and zero point for x, fixed at export) and MatMulIntegerToFloat
(int8 weights, one scale a column). Scales that are fixed are the point: onnxruntime's dynamic quantisation takes one
scale over the whole batch, and so lets pictures change each other's answers.

Weights are rounded one input channel after the other, each error passed on to the channels that are still to come
(GPTQ, Frantar et al. 2022, arXiv:2210.17323): about a third of the noise of rounding to nearest. Which products are
worth their noise is searched for in `export.quantization.sensitivity`.

Shape letters: R rows of a calibration set, I and O input and output channels of a product.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from service.engine.metadata import INPUT_NAME

Images = NDArray[np.uint8]
Floats = NDArray[np.float32]

CONTRIB = "com.microsoft"  # the domain of onnxruntime's own operators
CALIBRATION_BATCH = 16
CALIBRATION_ROWS = 16_384  # of each input; more change the scales no further
LARGEST = 127  # of an int8 weight; symmetric, so that a column needs no zero point
SHRINK = np.linspace(0.75, 1.0, 11)  # shares of the largest weight or activation that are tried as the range
DAMPING = 0.01  # added to the diagonal of the inputs' second moments, as a share of its mean


@dataclass(frozen=True)
class Product:
    """A product with constant weights.

    Attributes:
        name: of its output in the graph; unique.
        source: name of its input.
        weight: float32 [I, O].
        bias: name of its bias, None where it has none.
    """

    name: str
    source: str
    weight: Floats
    bias: str | None


@dataclass(frozen=True)
class Quantised:
    """A product on integers: x W is about scale * column_scales * ((q(x) - zero_point) weight).

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


def find_products(model: ModelProto) -> list[Product]:
    """List the products of a graph whose right side is a constant matrix, in order."""
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    return [
        Product(
            name=node.output[0],
            source=node.input[0],
            weight=_right_side(node, numpy_helper.to_array(constants[node.input[1]])),
            bias=node.input[2] if len(node.input) > 2 else None,
        )
        for node in model.graph.node
        if node.op_type in ("MatMul", "Gemm") and node.input[1] in constants and node.input[0] not in constants
    ]


def _right_side(node: NodeProto, constant: Floats) -> Floats:
    """Return the matrix [I, O] of a product; a Gemm may hold it transposed, as torch's dense layers do."""
    transposed = any(attribute.name == "transB" and attribute.i for attribute in node.attribute)
    return np.ascontiguousarray(constant.T) if transposed else constant


def open_session(model: ModelProto) -> Any:
    """Open a graph as an onnxruntime InferenceSession on the CPU."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def collect_inputs(model: ModelProto, products: Sequence[Product], images: Images) -> dict[str, Floats]:
    """Run the calibration pictures and keep rows of each product's input, evenly spread: float32 [R, I] by name."""
    names = sorted({product.source for product in products})
    watched = ModelProto()
    watched.CopyFrom(model)
    watched.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names)
    batches = [images[at : at + CALIBRATION_BATCH] for at in range(0, len(images), CALIBRATION_BATCH)]
    wanted = max(1, CALIBRATION_ROWS // len(batches))
    session = open_session(watched)
    kept: dict[str, list[Floats]] = {name: [] for name in names}
    for batch in batches:
        for name, values in zip(names, session.run(names, {INPUT_NAME: batch}), strict=True):
            rows = values.reshape(-1, values.shape[-1])
            kept[name].append(rows[:: -(-len(rows) // wanted)])
    return {name: np.concatenate(parts) for name, parts in kept.items()}


def input_scale(rows: Floats) -> tuple[np.float32, np.uint8]:
    """Choose scale and zero point of uint8 for float32 [R, I]: the range with the least mean square error."""
    low, high = min(float(rows.min()), 0.0), max(float(rows.max()), 0.0)
    if high == low:
        return np.float32(1), np.uint8(0)

    def error(share: float) -> float:
        scale, zero = _scale_of(low * share, high * share)
        values = (np.clip(np.round(rows / scale) + zero, 0, 255) - zero) * scale
        return float(np.square(values - rows).mean())

    share = float(min(np.linspace(0.5, 1.0, 21), key=error))
    scale, zero = _scale_of(low * share, high * share)
    return np.float32(scale), np.uint8(zero)


def _scale_of(low: float, high: float) -> tuple[float, float]:
    scale = (high - low) / 255
    return scale, float(np.clip(np.round(-low / scale), 0, 255))


def round_weight(weight: Floats, rows: Floats) -> tuple[NDArray[np.int8], Floats]:
    """Round float32 [I, O] to int8 with one scale a column, so that the product with float32 [R, I] moves least."""
    matrix = weight.astype(np.float64)
    inputs = rows.astype(np.float64)
    moments = inputs.T @ inputs / len(inputs)
    mean = float(np.diag(moments).mean())
    moments += np.eye(len(moments)) * (DAMPING * mean if mean > 0 else 1.0)
    scales = _column_scales(matrix, moments)
    # The largest inputs first: their errors can still be made good by all others.
    order = np.argsort(-np.diag(moments), kind="stable")
    upper = np.linalg.cholesky(np.linalg.inv(moments[np.ix_(order, order)])).T
    left = matrix[order]
    rounded = np.zeros_like(left)
    for channel in range(len(left)):
        rounded[channel] = np.clip(np.round(left[channel] / scales), -LARGEST, LARGEST)
        error = (left[channel] - rounded[channel] * scales) / upper[channel, channel]
        left[channel + 1 :] -= np.outer(upper[channel, channel + 1 :], error)
    return rounded[np.argsort(order)].astype(np.int8), scales.astype(np.float32)


def _column_scales(matrix: NDArray[np.float64], moments: NDArray[np.float64]) -> NDArray[np.float64]:
    """Take for each column the range whose rounding to nearest moves the product least; float64 [O]."""
    largest = np.maximum(np.abs(matrix).max(axis=0), 1e-12)
    candidates = [largest * share / LARGEST for share in SHRINK]
    errors = []
    for scales in candidates:
        error = np.clip(np.round(matrix / scales), -LARGEST, LARGEST) * scales - matrix
        errors.append(np.einsum("io,io->o", error, moments @ error))
    best: NDArray[np.float64] = np.choose(np.argmin(errors, axis=0), candidates)
    return best


def quantise_product(product: Product, rows: Floats) -> Quantised:
    """Quantise a product by rows of its input, float32 [R, I]."""
    scale, zero_point = input_scale(rows)
    weight, column_scales = round_weight(product.weight, rows)
    return Quantised(scale, zero_point, weight, column_scales)


def quantise(model: ModelProto, quantised: Mapping[str, Quantised]) -> ModelProto:
    """Return the graph with these products, by name, on integers; an input of several is quantised once."""
    result = ModelProto()
    result.CopyFrom(model)
    by_name = {product.name: product for product in find_products(model)}
    nodes: list[NodeProto] = []
    done: set[str] = set()
    for node in model.graph.node:
        name = node.output[0]
        if name not in quantised:
            nodes.append(node)
            continue
        product, values = by_name[name], quantised[name]
        if product.source not in done:
            done.add(product.source)
            _add_constants(result, product.source, scale=values.scale, zero_point=values.zero_point)
            source = product.source
            inputs = [source, f"{source}.scale", f"{source}.zero_point"]
            nodes.append(helper.make_node("QuantizeLinear", inputs, [f"{source}.quantised"]))
        nodes.append(_integer_product(result, product, values))
    del result.graph.node[:]
    result.graph.node.extend(nodes)
    _drop_unused(result)
    if quantised:
        result.opset_import.append(helper.make_opsetid(CONTRIB, 1))
    return result


def _integer_product(result: ModelProto, product: Product, values: Quantised) -> NodeProto:
    _add_constants(result, product.name, weight=values.weight, column_scales=values.column_scales)
    source, name = product.source, product.name
    inputs = [
        f"{source}.quantised",
        f"{name}.weight",
        f"{source}.scale",
        f"{name}.column_scales",
        f"{source}.zero_point",
        "",  # weights are symmetric: no zero point
    ]
    if product.bias is not None:
        inputs.append(product.bias)
    return helper.make_node("MatMulIntegerToFloat", inputs, [name], domain=CONTRIB)


def _add_constants(model: ModelProto, prefix: str, **values: np.generic | NDArray[np.generic]) -> None:
    model.graph.initializer.extend(
        numpy_helper.from_array(np.asarray(value), f"{prefix}.{name}") for name, value in values.items()
    )


def _drop_unused(model: ModelProto) -> None:
    used = {name for node in model.graph.node for name in node.input}
    kept = [tensor for tensor in model.graph.initializer if tensor.name in used]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
