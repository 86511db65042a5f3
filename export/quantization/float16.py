"""Float16 for CUDA: half precision except where it would lose accuracy."""

from onnx import ModelProto
from onnxruntime.transformers.float16 import DEFAULT_OP_BLOCK_LIST, convert_float_to_float16
from onnxruntime.transformers.onnx_model import OnnxModel

# Kept in float32: the convolution of the pixels, whose weights are about 0.01 (half precision would lose the mean that
# is subtracted next), and the mean over the latents. Softmax and layer norm run in half precision, since CUDA's kernels
# sum in float32 anyway, and casts around them would launch half as many kernels again.
FLOAT32_OPERATORS = ("Cast", "Conv", "ReduceMean")


def to_float16(model: ModelProto) -> ModelProto:
    """Return a copy of a float32 graph in float16; its input stays uint8, its output float32."""
    copied = ModelProto()
    copied.CopyFrom(model)
    converted: ModelProto = convert_float_to_float16(
        copied, keep_io_types=True, op_block_list=[*DEFAULT_OP_BLOCK_LIST, *FLOAT32_OPERATORS]
    )
    OnnxModel(converted).topological_sort()  # ONNX requires it, and the converter appends its casts
    return converted
