"""Float16 for CUDA: all in half precision but what would lose by it."""

from onnx import ModelProto
from onnxruntime.transformers.float16 import DEFAULT_OP_BLOCK_LIST, convert_float_to_float16
from onnxruntime.transformers.onnx_model import OnnxModel

# Kept in float32: the mean over the latents. The pixels are cast once and convolved with weights of a hundredth: half
# precision would lose the mean that is subtracted behind. Softmax and layer norm take and give half precision, and sum
# in float32 in CUDA's kernels: with a cast before and after each, a run would launch half as many kernels again.
FLOAT32_OPERATORS = ("Cast", "Conv", "ReduceMean")


def to_float16(model: ModelProto) -> ModelProto:
    """Return the graph in float16, with its input and output as they are."""
    copied = ModelProto()
    copied.CopyFrom(model)
    converted: ModelProto = convert_float_to_float16(
        copied, keep_io_types=True, op_block_list=[*DEFAULT_OP_BLOCK_LIST, *FLOAT32_OPERATORS]
    )
    OnnxModel(converted).topological_sort()  # the format wants it; casts are appended
    return converted
