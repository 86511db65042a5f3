"""From a torch module to an ONNX file: dynamic batch, constants folded, metadata attached.

Shape letters: B images, H and W the input size in pixels, K classes.
"""

import io
import logging
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr

import onnx
import onnxscript.optimizer
import torch
from onnx import ModelProto
from torch import nn

from export.errors import ExportError
from service.engine.metadata import FEATURES_NAME, INPUT_NAME, OUTPUT_NAME

# The first opset with Gelu, and the last whose operators all have CUDA kernels in every onnxruntime. With later opsets
# some releases silently run Conv or Reshape on the CPU.
OPSET = 20
MAX_FOLDED_ELEMENTS = 1 << 24  # of a constant that is computed at export: covers the transpose of every weight


@contextmanager
def quiet_exporter() -> Iterator[None]:
    """Silence what torch's exporter prints for its own developers: missing torchvision, deprecated names.

    On an error this includes the whole graph on stderr and the tracebacks of several loggers.
    """
    logger, stderr = logging.getLogger("torch.onnx"), io.StringIO()
    level, disabled = logger.level, logging.root.manager.disable
    logger.setLevel(logging.ERROR)
    logging.disable(max(disabled, logging.ERROR))
    try:
        with warnings.catch_warnings(), redirect_stderr(stderr):
            warnings.simplefilter("ignore", FutureWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            yield
    finally:
        logging.disable(disabled)
        logger.setLevel(level)
    sys.stderr.write(stderr.getvalue())


def to_onnx(model: nn.Module, input_size: tuple[int, int]) -> ModelProto:
    """Translate a module that maps uint8 [B, H, W, 3] to float32 [B, K], or to that and features, float32 [B, C].

    Args:
        model: in evaluation mode.
        input_size: (H, W) in pixels.

    Raises:
        ExportError: torch can't translate it, the result is not valid ONNX, or its batch is not dynamic.
    """
    try:
        proto = strip_debug_info(translate(model, input_size))
    except OSError:  # of temporary files
        raise
    except Exception as error:  # a user's own architecture may fail in any way
        raise ExportError(
            f"torch can't translate this model to ONNX ({root_cause(error)}): its forward must take any number of "
            "images, must not branch on their values, and must use operators that ONNX has."
        ) from error
    check(proto)
    return proto


def root_cause(error: BaseException) -> str:
    """Return type and first line of the innermost cause of an error."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0].rstrip('.')}"


def translate(model: nn.Module, input_size: tuple[int, int]) -> ModelProto:
    """Run torch's exporter; see `to_onnx`."""
    example = torch.zeros(2, *input_size, 3, dtype=torch.uint8)  # 2, since torch treats a dimension of 1 as a constant
    with quiet_exporter(), torch.no_grad():
        # Strict, since otherwise Python's len() of a tensor makes its batch a constant.
        batch = torch.export.Dim("batch", min=1)
        exported = torch.export.export(model, (example,), dynamic_shapes=({0: batch},), strict=True)
        program = torch.onnx.export(
            exported,
            dynamo=True,
            verbose=False,
            opset_version=OPSET,
            input_names=[INPUT_NAME],
            output_names=[OUTPUT_NAME, FEATURES_NAME][: len(exported.graph_signature.user_outputs)],
        )
        assert program is not None
        onnxscript.optimizer.optimize(
            program.model, input_size_limit=MAX_FOLDED_ELEMENTS, output_size_limit=MAX_FOLDED_ELEMENTS
        )
    proto: ModelProto = program.model_proto
    return proto


def strip_debug_info(proto: ModelProto) -> ModelProto:
    """Remove the exporter's stack traces, which hold paths of this machine, and name the batch dimension."""
    del proto.metadata_props[:]
    del proto.graph.metadata_props[:]
    del proto.graph.value_info[:]
    for item in (*proto.graph.node, *proto.graph.input, *proto.graph.output, *proto.graph.initializer):
        del item.metadata_props[:]
        item.doc_string = ""
    for value in (*proto.graph.input, *proto.graph.output):
        batch = value.type.tensor_type.shape.dim[0]
        if batch.dim_param:
            batch.dim_param = "batch"
    return proto


def check(proto: ModelProto) -> None:
    """Check a graph against the ONNX specification and for a dynamic batch.

    Raises:
        ExportError: says what does not hold.
    """
    try:
        onnx.checker.check_model(proto, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(f"the translation is not valid ONNX: {error}") from error
    for value in (*proto.graph.input, *proto.graph.output):
        if not value.type.tensor_type.shape.dim[0].dim_param:
            raise ExportError(f"the translation has no dynamic batch: the batch size of {value.name} is fixed.")


def serialize(proto: ModelProto, props: Mapping[str, str]) -> bytes:
    """Return the content of a model file with these metadata_props; the same for equal inputs."""
    model = ModelProto()
    model.CopyFrom(proto)
    for key in sorted(props):
        model.metadata_props.add(key=key, value=props[key])
    content: bytes = model.SerializeToString(deterministic=True)
    return content
