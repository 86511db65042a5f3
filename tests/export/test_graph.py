"""What the exported graph is made of, and what onnxruntime's optimiser makes of it on a CPU."""

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from torch import nn

from export.errors import ExportError
from export.graph.fold import fold
from export.graph.to_onnx import OPSET, check, to_onnx
from export.graph.trained import TrainedModel
from tests.export.conftest import SIZE, TINY, perturb
from training.config import ModelConfig
from training.model import Perceiver
from training.preprocessing import Preprocess

# Attention with projected heads throughout, no resize; then merged heads throughout, and a resize.
NARROW = TINY.model_copy(update={"num_latents": 16, "self_head_dim": 2, "cross_position_bias": True, "head_norm": True})
WIDE = TINY.model_copy(
    update={
        "image_size": 2 * SIZE,
        "patch_overlap": 0,
        "cross_heads": 1,
        "cross_head_dim": 16,
        "cross_output": False,
        "self_head_dim": 16,
        "residual": "normalised",
    }
)


def folded(config: ModelConfig) -> nn.Module:
    torch.manual_seed(0)
    model = Perceiver(config)
    perturb(model)
    return fold(TrainedModel(Preprocess(config.image_size), model).eval())


@pytest.fixture(scope="module", params=[NARROW, WIDE], ids=["narrow", "wide"])
def graph(request: pytest.FixtureRequest) -> tuple[ModelConfig, onnx.ModelProto]:
    return request.param, to_onnx(folded(request.param), (SIZE, SIZE))


def operators(model: onnx.ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.node)


def optimised(model: onnx.ModelProto, path: Path) -> onnx.ModelProto:
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(path)
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return onnx.load(path)


def attentions(config: ModelConfig) -> int:
    return config.num_iterations * (1 + config.num_blocks)


def layer_norms(config: ModelConfig) -> int:
    """One of the tokens; two in each module, of which the first iteration's first is constant; one before the head."""
    return 1 + 2 * attentions(config) - 1 + config.head_norm


def gelus(config: ModelConfig) -> int:
    return attentions(config) + config.head_hidden


def test_the_graph_is_as_small_as_the_algebra_says(graph: tuple[ModelConfig, onnx.ModelProto]) -> None:
    config, model = graph
    found = operators(model)
    assert found["LayerNormalization"] == layer_norms(config)
    assert found["Gelu"] == gelus(config)
    assert found["Softmax"] == attentions(config)
    assert found["Cast"] == 1
    assert found["Conv"] == 1
    assert found["ReduceMean"] == (1 if config.head_norm else 2)
    kinds = {"Add", "Cast", "Conv", "Gelu", "Gemm", "LayerNormalization", "MatMul", "ReduceMean", "Reshape", "Softmax"}
    assert set(found) == kinds | {"Transpose"}


def test_only_narrow_heads_are_moved_about(graph: tuple[ModelConfig, onnx.ModelProto]) -> None:
    config, model = graph
    of_images = 2  # pixels to channels first, patches to rows
    moved = operators(model)["Transpose"] - of_images
    blocks = config.num_iterations * config.num_blocks
    if config is NARROW:
        # Queries, keys, values and back; the tokens' keys and values once, and the first queries are constant.
        assert moved == 4 * blocks + 2 + 2 * config.num_iterations - 1
    else:
        assert moved == blocks + 1  # what scores are taken with; the tokens' once


def test_layer_norm_and_gelu_stay_single_operators(graph: tuple[ModelConfig, onnx.ModelProto], tmp_path: Path) -> None:
    config, model = graph
    found = operators(optimised(model, tmp_path / "optimised.onnx"))
    assert found["LayerNormalization"] + found["SkipLayerNormalization"] == layer_norms(config)
    assert found["Gelu"] + found["BiasGelu"] == gelus(config)
    assert found["Softmax"] == attentions(config)
    for kind in ("Erf", "Sqrt", "Pow", "Div", "Sub", "Identity", "Shape", "Gather", "Slice", "Concat", "Expand"):
        assert found[kind] == 0, kind
    # A transpose that swaps the last two axes goes into its product.
    if config is WIDE:
        assert found["FusedMatMul"] == attentions(config)
        assert found["Transpose"] <= 3


def test_opset_and_batch(graph: tuple[ModelConfig, onnx.ModelProto]) -> None:
    config, model = graph
    assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", OPSET)]
    shapes = [value.type.tensor_type.shape.dim for value in (*model.graph.input, *model.graph.output)]
    assert [dim[0].dim_param for dim in shapes] == ["batch", "batch"]
    assert [[d.dim_value for d in dim[1:]] for dim in shapes] == [[SIZE, SIZE, 3], [config.num_classes]]


@pytest.mark.parametrize("batch", [1, 2, 7])
def test_the_graph_computes_what_torch_computes(graph: tuple[ModelConfig, onnx.ModelProto], batch: int) -> None:
    config, model = graph
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    images = np.random.default_rng(batch).integers(0, 256, (batch, SIZE, SIZE, 3), dtype=np.uint8)
    with torch.inference_mode():
        expected = folded(config)(torch.from_numpy(images)).numpy()
    np.testing.assert_allclose(session.run(None, {"images": images})[0], expected, rtol=1e-4, atol=1e-5)


def test_a_graph_that_flips_has_the_same_products_for_any_batch(graph: tuple[ModelConfig, onnx.ModelProto]) -> None:
    config = graph[0].model_copy(update={"test_time_flip": True})
    module = folded(config)
    model = to_onnx(module, (SIZE, SIZE))
    more = operators(model) - operators(graph[1])
    # The columns backwards; both images side by side; the mean of both logits.
    assert more == {"Slice": 1, "Unsqueeze": 2, "Concat": 1, "Reshape": 2, "ReduceMean": 1}
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    for batch in (1, 2, 7):
        images = np.random.default_rng(batch).integers(0, 256, (batch, SIZE, SIZE, 3), dtype=np.uint8)
        with torch.inference_mode():
            expected = module(torch.from_numpy(images)).numpy()
        found = session.run(None, {"images": images})[0]
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
        mirrored = session.run(None, {"images": np.ascontiguousarray(images[:, :, ::-1])})[0]
        np.testing.assert_allclose(mirrored, found, rtol=1e-4, atol=1e-5)


class Branch(nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        means = images.float().mean(dim=(1, 2))
        return means * 2 if means.sum() > 0 else means


class Halves(nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        straight, mirrored = torch.cat([images, images.flip(2)]).float().mean(dim=(1, 2)).chunk(2)
        return straight + mirrored


class Operator(nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.linalg.svdvals(images.float().mean(dim=3))


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (Branch(), "Data-dependent branching"),
        (Halves(), "Constraints violated"),
        (Operator(), "No ONNX function found for .*svd"),
    ],
    ids=["branch", "halves", "operator"],
)
def test_what_torch_can_not_translate_is_told_in_a_sentence(
    module: nn.Module, reason: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """And not in the hundreds of lines that torch has for its own developers."""
    with pytest.raises(ExportError, match=rf"^torch can't translate this model to ONNX \(.*{reason}[^\n]*$"):
        to_onnx(module, (SIZE, SIZE))
    assert capfd.readouterr() == ("", "")


def test_a_batch_of_one_size_is_refused(graph: tuple[ModelConfig, onnx.ModelProto]) -> None:
    fixed = onnx.ModelProto()
    fixed.CopyFrom(graph[1])
    fixed.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 2
    with pytest.raises(ExportError, match="no dynamic batch: the batch size of images is fixed"):
        check(fixed)


def test_a_graph_that_is_not_onnx_is_refused(graph: tuple[ModelConfig, onnx.ModelProto]) -> None:
    broken = onnx.ModelProto()
    broken.CopyFrom(graph[1])
    broken.graph.node[0].input[0] = "nothing"
    with pytest.raises(ExportError, match="not valid ONNX"):
        check(broken)
