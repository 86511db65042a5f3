"""Int8 layers: rounding, the graph, and that images of a batch do not change each other."""

import numpy as np
import onnx
import pytest
import torch
from onnx import ModelProto

from export.graph.fold import fold
from export.graph.to_onnx import to_onnx
from export.graph.trained import TrainedModel
from export.quantization import sensitivity
from export.quantization.int8 import (
    MAX_INT8,
    QuantizedLayer,
    choose_scale,
    collect_inputs,
    find_layers,
    largest_weight,
    open_session,
    quantize_layer,
    quantize_layers,
    replace_layers,
    round_weight,
)
from tests.export.conftest import SIZE, TINY, perturb
from training.model import Perceiver
from training.preprocessing import Preprocess


def noise(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, SIZE, SIZE, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def model() -> ModelProto:
    torch.manual_seed(0)
    perceiver = Perceiver(TINY)
    perturb(perceiver)
    return to_onnx(fold(TrainedModel(Preprocess(SIZE), perceiver).eval()), (SIZE, SIZE))


@pytest.fixture(scope="module")
def quantized(model: ModelProto) -> dict[str, QuantizedLayer]:
    return quantize_layers(model, noise(32))


def test_the_range_of_an_input_holds_zero_and_its_values() -> None:
    rows = np.random.default_rng(0).uniform(-1, 3, (500, 8)).astype(np.float32)
    scale, zero_point = choose_scale(rows)
    assert scale == pytest.approx(4 / 255, rel=0.1)
    assert zero_point == pytest.approx(64, abs=8)
    restored = (np.clip(np.round(rows / scale) + zero_point, 0, 255) - float(zero_point)) * scale
    assert np.abs(restored - rows).mean() < scale


def test_an_input_that_is_always_zero_has_a_scale() -> None:
    assert choose_scale(np.zeros((4, 2), dtype=np.float32)) == (1, 0)


def test_one_outlier_does_not_take_the_range() -> None:
    rows = np.random.default_rng(0).standard_normal((400_000, 1)).astype(np.float32)
    rows[0] = 12
    assert choose_scale(rows)[0] < 0.8 * np.ptp(rows) / 255


def test_errors_are_passed_on_where_inputs_are_correlated() -> None:
    rng = np.random.default_rng(0)
    rows = (rng.standard_normal((2000, 4)) @ rng.standard_normal((4, 32))).astype(np.float32)
    rows += rng.standard_normal(rows.shape).astype(np.float32) * 0.1
    weight = rng.standard_normal((32, 16)).astype(np.float32)
    rounded, scales = round_weight(weight, rows)
    assert rounded.dtype == np.int8
    nearest_scales = np.abs(weight).max(axis=0) / 127
    nearest = np.round(weight / nearest_scales) * nearest_scales

    def error(other: np.ndarray) -> float:
        return float(np.square(rows @ (other - weight)).mean())

    assert error(rounded * scales) < error(nearest) / 2
    assert np.abs(rounded * scales - weight).max() < 0.2


@pytest.mark.parametrize("limit", [63, 127])
def test_weights_are_rounded_to_what_the_processor_adds_without_saturation(
    limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("export.quantization.int8.largest_weight", lambda: limit)
    rng = np.random.default_rng(0)
    weight, rows = rng.standard_normal((32, 16)).astype(np.float32), rng.standard_normal((500, 32)).astype(np.float32)
    rounded, scales = round_weight(weight, rows)
    assert np.abs(rounded).max() == limit
    assert np.abs(rounded * scales - weight).max() < 16 / limit


def test_layers_of_constant_weights_are_found_and_no_others(model: ModelProto) -> None:
    layers = find_layers(model)
    weights = [layer.weight.shape for layer in layers]
    assert len(layers) == len({layer.name for layer in layers})
    assert (16, 32) in weights
    assert weights[-1] == (16, TINY.num_classes)
    both_vary = [n for n in model.graph.node if n.op_type == "MatMul" and n.input[1] not in initializers(model)]
    assert not {node.output[0] for node in both_vary} & {layer.name for layer in layers}


def initializers(model: ModelProto) -> set[str]:
    return {tensor.name for tensor in model.graph.initializer}


def test_inputs_of_layers_are_collected(model: ModelProto) -> None:
    layers = find_layers(model)
    rows = collect_inputs(model, layers, noise(5))
    assert set(rows) == {layer.source for layer in layers}
    for layer in layers:
        assert rows[layer.source].shape[1] == len(layer.weight)
        assert rows[layer.source].dtype == np.float32


@pytest.mark.parametrize(("rows_wanted", "kept"), [(10**6, 40), (9, 9), (8, 6), (1, 3)])
def test_of_each_batch_as_many_rows_are_kept_evenly_spread(
    model: ModelProto, monkeypatch: pytest.MonkeyPatch, rows_wanted: int, kept: int
) -> None:
    """Of batches of 16, 16 and 8 images; of a batch one row at least."""
    head = find_layers(model)[-1]  # whose input has one row an image
    images = noise(40)
    (whole,) = collect_inputs(model, [head], images).values()
    monkeypatch.setattr("export.quantization.int8.CALIBRATION_ROWS", rows_wanted)
    (rows,) = collect_inputs(model, [head], images).values()
    assert len(whole) == 40
    assert len(rows) == kept
    each = kept // 3
    indices = [start + -(-size // each) * i for start, size in ((0, 16), (16, 16), (32, 8)) for i in range(each)]
    np.testing.assert_array_equal(rows, whole if kept == 40 else whole[indices])


def test_a_shared_input_is_quantized_once(model: ModelProto, quantized: dict[str, QuantizedLayer]) -> None:
    graph = replace_layers(model, quantized).graph
    kinds = [node.op_type for node in graph.node]
    assert kinds.count("MatMulIntegerToFloat") == len(quantized)
    assert kinds.count("QuantizeLinear") == len({layer.source for layer in find_layers(model)}) < len(quantized)
    assert "Gemm" not in kinds
    used = {name for node in graph.node for name in node.input}
    assert {tensor.name for tensor in graph.initializer} <= used


def test_the_float32_graph_is_left_as_it_is(model: ModelProto, quantized: dict[str, QuantizedLayer]) -> None:
    before = model.SerializeToString(deterministic=True)
    replace_layers(model, quantized)
    assert model.SerializeToString(deterministic=True) == before


def test_the_runtime_computes_what_the_numbers_say(model: ModelProto) -> None:
    layer = next(layer for layer in find_layers(model) if layer.bias is not None)
    rows = collect_inputs(model, [layer], noise(8))[layer.source]
    values = quantize_layer(layer, rows)
    bias = onnx.numpy_helper.to_array(next(t for t in model.graph.initializer if t.name == layer.bias))
    integers = np.clip(np.round(rows / values.scale) + values.zero_point, 0, 255) - float(values.zero_point)
    expected = integers @ values.weight.astype(np.float64) * (values.scale * values.column_scales) + bias
    watched = replace_layers(model, {layer.name: values})
    watched.graph.output.append(onnx.helper.make_tensor_value_info(layer.name, onnx.TensorProto.FLOAT, None))
    (found,) = open_session(watched).run([layer.name], {"images": noise(8)})
    np.testing.assert_allclose(found.reshape(expected.shape), expected, atol=1e-4)


def test_logits_stay_close(model: ModelProto, quantized: dict[str, QuantizedLayer]) -> None:
    graphs = (model, replace_layers(model, quantized))
    expected, found = (sensitivity.run_graph(graph, noise(64, 1)) for graph in graphs)
    assert np.sqrt(np.square(found - expected).mean()) < 0.1 * expected.std()


@pytest.mark.parametrize("batch", [2, 7, 33])
def test_an_image_gets_the_same_logits_alone_and_in_any_batch(
    model: ModelProto, quantized: dict[str, QuantizedLayer], batch: int
) -> None:
    """Also beside far brighter images, where dynamic quantization fails."""
    session = open_session(replace_layers(model, quantized))
    images = noise(batch, batch) // 8
    images[-1] = 255
    together = session.run(None, {"images": images})[0]
    alone = np.concatenate([session.run(None, {"images": image[None]})[0] for image in images])
    np.testing.assert_allclose(together, alone, atol=1e-5)


def test_a_dense_layer_that_holds_its_matrix_transposed_is_quantized_as_well() -> None:
    torch.manual_seed(0)
    perceiver = Perceiver(TINY)
    perturb(perceiver)
    plain = to_onnx(TrainedModel(Preprocess(SIZE), perceiver).eval(), (SIZE, SIZE))
    images = noise(32)
    whole, rough = (
        sensitivity.run_graph(graph, images) for graph in (plain, replace_layers(plain, quantize_layers(plain, images)))
    )
    assert 0 < np.abs(whole - rough).max() < 0.2 * MAX_INT8 / largest_weight()
