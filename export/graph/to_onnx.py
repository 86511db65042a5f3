"""From a torch module to an ONNX file: dynamic batch, constants folded, metadata attached once."""

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
from service.engine.metadata import INPUT_NAME, OUTPUT_NAME

# The first that has Gelu, and the last for which every onnxruntime with CUDA has kernels for all operators used here:
# of opsets above, some have none for Conv or Reshape on CUDA, and would run those on the CPU without a word.
OPSET = 20
# Largest constant that is computed at export, in elements: every weight's transpose, no picture's tensor.
FOLDED_ELEMENTS = 1 << 24


@contextmanager
def quiet_exporter() -> Iterator[None]:
    """Keep away what torch's exporter says to its own developers: absent torchvision, its use of old names.

    Where it fails, also the whole graph, which it prints, and the traces that several of its loggers have.
    """
    logger, said = logging.getLogger("torch.onnx"), io.StringIO()
    level, disabled = logger.level, logging.root.manager.disable
    logger.setLevel(logging.ERROR)
    logging.disable(max(disabled, logging.ERROR))
    try:
        with warnings.catch_warnings(), redirect_stderr(said):
            warnings.simplefilter("ignore", FutureWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            yield
    finally:
        logging.disable(disabled)
        logger.setLevel(level)
    sys.stderr.write(said.getvalue())


def to_onnx(model: nn.Module, input_size: tuple[int, int]) -> ModelProto:
    """Translate a module that takes uint8 [B, H, W, 3] and returns float32 [B, K].

    Args:
        model: in evaluation mode.
        input_size: (H, W) in pixels.

    Raises:
        ExportError: torch can't translate it; the translation is no valid ONNX file, or has lost its dynamic batch.
    """
    try:
        proto = strip(translate(model, input_size))
    except OSError:  # of temporary files
        raise
    except Exception as error:  # of any kind: an architecture of one's own may be anything
        raise ExportError(
            f"torch can't translate this model to ONNX ({why(error)}): its forward must take any number of pictures, "
            "take no branch by what is in them, and use operators that ONNX has."
        ) from error
    check(proto)
    return proto


def why(error: BaseException) -> str:
    """Return the kind and the first line of the error that others were raised from."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0].rstrip('.')}"


def translate(model: nn.Module, input_size: tuple[int, int]) -> ModelProto:
    """Have torch translate; see `to_onnx`."""
    # Two pictures, since torch takes a dimension of one for a constant.
    example = torch.zeros(2, *input_size, 3, dtype=torch.uint8)
    with quiet_exporter(), torch.no_grad():
        # Strict, since otherwise Python's own len() of a tensor makes its batch a constant.
        batch = torch.export.Dim("batch", min=1)
        exported = torch.export.export(model, (example,), dynamic_shapes=({0: batch},), strict=True)
        program = torch.onnx.export(
            exported,
            dynamo=True,
            verbose=False,
            opset_version=OPSET,
            input_names=[INPUT_NAME],
            output_names=[OUTPUT_NAME],
        )
        assert program is not None
        onnxscript.optimizer.optimize(
            program.model, input_size_limit=FOLDED_ELEMENTS, output_size_limit=FOLDED_ELEMENTS
        )
    proto: ModelProto = program.model_proto
    return proto


def strip(proto: ModelProto) -> ModelProto:
    """Remove the exporter's notes for its developers (stack traces, with paths of this machine); name the batch."""
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
    """Hold the file against the ONNX specification and against the contract's dynamic batch.

    Raises:
        ExportError: what does not hold.
    """
    try:
        onnx.checker.check_model(proto, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(f"the translation is not valid ONNX: {error}") from error
    for value in (*proto.graph.input, *proto.graph.output):
        if not value.type.tensor_type.shape.dim[0].dim_param:
            raise ExportError(f"the translation has lost its dynamic batch: {value.name} is of a fixed one.")


def attach(proto: ModelProto, props: Mapping[str, str]) -> bytes:
    """Return the file with this metadata."""
    held = ModelProto()
    held.CopyFrom(proto)
    for key in sorted(props):
        held.metadata_props.add(key=key, value=props[key])
    content: bytes = held.SerializeToString(deterministic=True)
    return content
