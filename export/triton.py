"""`config.pbtxt`: Triton's configuration of a model folder, written from the metadata.

Triton derives names, types and shapes from the model file, but not that it may batch requests. See
https://docs.nvidia.com/deeplearning/triton-inference-server/user-guide/docs/user_guide/model_configuration.html
"""

from pathlib import Path

from service.engine.metadata import INPUT_NAME, ModelMetadata

CONFIG_FILE = "config.pbtxt"
MAX_BATCH_SIZE = 32
PREFERRED_BATCH_SIZES = (8, 16, 32)
MARKER = "# Written by `python -m export` from the metadata of the model"  # all releases write it
FIRST_LINE = f"{MARKER}; without this line it is left as it is."


def triton_config(metadata: ModelMetadata) -> str:
    """Return the text of the file. It has no name, since Triton accepts only that of the folder."""
    height, width = metadata.input_size
    output = ",\n".join(
        f'  {{ name: "{name}" data_type: TYPE_FP32 {dims(shape)} }}' for name, shape in metadata.output_shapes.items()
    )
    preferred = ", ".join(map(str, PREFERRED_BATCH_SIZES))
    return f"""{FIRST_LINE}
platform: "onnxruntime_onnx"
max_batch_size: {MAX_BATCH_SIZE}
input [
  {{ name: "{INPUT_NAME}" data_type: TYPE_UINT8 dims: [ {height}, {width}, 3 ] }}
]
output [
{output}
]
dynamic_batching {{ preferred_batch_size: [ {preferred} ] }}
instance_group [ {{ count: 1 kind: KIND_AUTO }} ]
"""


def dims(shape: list[int]) -> str:
    """Return the fields of an output's shape. Triton takes no empty one: a single number is reshaped from `[batch]`."""
    return f"dims: {shape}".replace("[", "[ ").replace("]", " ]") if shape else "dims: [ 1 ] reshape { shape: [ ] }"


def write_triton_config(folder: Path, metadata: ModelMetadata) -> str | None:
    """Write the file into a model folder atomically. A file without the marker is a user's own and stays.

    Returns:
        A warning if it was not written; the version is valid without it.
    """
    path, temporary = folder / CONFIG_FILE, folder / f".{CONFIG_FILE}"
    try:
        if path.exists() and not path.read_bytes().startswith(MARKER.encode()):
            return f"{path}: not changed, since its first line is not that of this command; compare it with the model."
        temporary.write_text(triton_config(metadata), encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        return f"{path}: not written ({error.strerror}); Triton needs it, the service does not."
    return None
