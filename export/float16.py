"""Float16 for CUDA: products in half precision, what sums many numbers in single precision."""

from onnx import ModelProto
from onnxruntime.transformers.float16 import DEFAULT_OP_BLOCK_LIST, convert_float_to_float16

# Kept in float32: means over hundreds of channels or latents, exponentials and their sums. The pixels are cast once and
# convolved with weights of a hundredth: half precision would lose the mean that is subtracted behind.
FLOAT32_OPERATORS = ("Cast", "Conv", "LayerNormalization", "ReduceMean", "Softmax")


def to_float16(model: ModelProto) -> ModelProto:
    """Return the graph in float16, with its input and output as they are."""
    copied = ModelProto()
    copied.CopyFrom(model)
    converted: ModelProto = convert_float_to_float16(
        copied, keep_io_types=True, op_block_list=[*DEFAULT_OP_BLOCK_LIST, *FLOAT32_OPERATORS]
    )
    return converted
