"""Bodies of the protocol v2: JSON, behind which tensors may follow in binary.

Every length is checked against the bytes that are there before anything is made of them. Shape letters: N images,
H and W the model's input size, C classes.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Final, NamedTuple, TypeVar

import msgspec
import numpy as np
from msgspec import Meta, Raw
from numpy.typing import NDArray

from service.api.payload import SPARE_STRINGS, check_count, check_not_empty, decode_base64
from service.batching.logits import softmax
from service.batching.queue import Prediction
from service.decoding.decoder import Pixels
from service.decoding.upload import Upload
from service.engine.metadata import ModelMetadata
from service.errors import BadRequest, InferenceFailed, InvalidJson, NoImage

T = TypeVar("T")

IMAGES: Final = "images"
IMAGE_BYTES: Final = "image_bytes"
DATATYPES: Final[Mapping[str, str]] = {IMAGES: "UINT8", IMAGE_BYTES: "BYTES"}
DEFAULT_OUTPUT: Final = "logits"
FEATURES: Final = "features"
UNFAMILIARITY: Final = "unfamiliarity"
MAX_SHAPE_BYTES: Final = 200  # of JSON; a shape of four numbers needs fewer
LENGTH_BYTES: Final = 4  # before each element of a BYTES tensor, little-endian

Size = Annotated[int, Meta(ge=0)]
Output = NDArray[np.float32]


class InputParameters(msgspec.Struct):
    """Parameters of an input."""

    binary_data_size: Size | None = None


class Input(msgspec.Struct):
    """An input tensor; its data stay JSON until its shape is known to be right."""

    name: str
    datatype: str
    shape: Raw
    parameters: InputParameters | None = None
    data: Raw = msgspec.field(default_factory=Raw)


class OutputParameters(msgspec.Struct):
    """Parameters of an output."""

    binary_data: bool | None = None
    classification: Size | None = None


class RequestedOutput(msgspec.Struct):
    """An output that is asked for."""

    name: str
    parameters: OutputParameters | None = None


class RequestParameters(msgspec.Struct):
    """Parameters of a request; `timeout` is in microseconds, 0 for none."""

    binary_data_output: bool | None = None
    timeout: Size | None = None


class InferBody(msgspec.Struct):
    """The JSON of a request; what it has beside these fields is ignored."""

    inputs: list[Input]
    id: str | None = None
    parameters: RequestParameters | None = None
    outputs: list[RequestedOutput] | None = None


class OutputFormat(NamedTuple):
    """How an output is written: its name, in binary or JSON, and of how many classes; 0 for the tensor itself."""

    name: str
    is_binary: bool
    classes: int


BODY: Final = msgspec.json.Decoder(InferBody)
SHAPE: Final = msgspec.json.Decoder(list[Annotated[int, Meta(ge=0, lt=2**31)]])
STRINGS: Final = msgspec.json.Decoder(list[str])
Byte = Annotated[int, Meta(ge=0, le=255)]
FLAT_BYTES: Final = msgspec.json.Decoder(list[Byte])
NESTED: Final = re.compile(rb"\s*\[\s*\[")
NESTED_BYTES: Final = msgspec.json.Decoder(list[list[list[list[Byte]]]])


def read_json(decoder: msgspec.json.Decoder[T], text: bytes | memoryview | Raw, what: str) -> T:
    """Decode JSON of a known shape.

    Raises:
        InvalidJson
    """
    try:
        return decoder.decode(text)
    except (ValueError, RecursionError) as error:
        raise InvalidJson(f"{what} can't be read: {str(error)[:200]}.") from error


def read_body(body: bytes, json_bytes: int | None, max_images: int) -> tuple[InferBody, memoryview]:
    """Read a request's JSON, and return what follows it.

    Args:
        body: all of it.
        json_bytes: by the header Inference-Header-Content-Length; None: all are.
        max_images: most images that a request may hold.

    Raises:
        BadRequest, InvalidJson
    """
    size = len(body) if json_bytes is None else json_bytes
    if size > len(body):
        raise BadRequest(f"Inference-Header-Content-Length is {size}, and the body has {len(body)} bytes.")
    if body.count(b'"', 0, size) > 2 * (max_images + SPARE_STRINGS):
        raise InvalidJson(f"The JSON holds more strings than {max_images} images need.")
    whole = memoryview(body)
    return read_json(BODY, whole[:size], "The JSON of the request"), whole[size:]


def read_images(
    content: InferBody, binary: memoryview, metadata: ModelMetadata, max_images: int
) -> list[Upload] | Pixels:
    """Return the one input's files, or its pixels, uint8 [N, H, W, 3].

    Args:
        content: the JSON.
        binary: what follows it.
        metadata: of the model.
        max_images: most images that a request may hold.

    Raises:
        BadRequest, InvalidJson, InvalidBase64, NoImage, TooManyImages
    """
    if len(content.inputs) != 1:
        raise BadRequest(f"The request has {len(content.inputs)} inputs; send one, {IMAGES} or {IMAGE_BYTES}.")
    (tensor,) = content.inputs
    name = tensor.name
    if (datatype := DATATYPES.get(name)) is None:
        raise BadRequest(f"The model has no input {name[:40]!r}; send {IMAGES} or {IMAGE_BYTES}.")
    if tensor.datatype != datatype:
        raise BadRequest(f"{name} has the datatype {tensor.datatype[:20]!r}, and must have {datatype}.")
    image = [*metadata.input_size, 3] if name == IMAGES else []
    shape = read_shape(tensor)
    if len(shape) != 1 + len(image) or shape[1:] != image:
        hint = "; send image_bytes, whole files, for other sizes" if image else ""
        raise BadRequest(f"{name} has the shape {shape}, and must have [N{''.join(f', {n}' for n in image)}]{hint}.")
    count = shape[0]
    if not count:
        raise NoImage(f"{name} holds no image.")
    check_count(count, max_images)
    size = tensor.parameters.binary_data_size if tensor.parameters else None
    if size is not None and tensor.data:
        raise BadRequest(f"{name} has both data and a binary_data_size; send one of them.")
    if len(binary) != (size or 0):
        raise BadRequest(f"{name} has a binary_data_size of {size}, and {len(binary)} bytes follow the JSON.")
    if size is None and not tensor.data:
        raise BadRequest(f"{name} has no data; send them in JSON, or as bytes behind it with a binary_data_size.")
    if name == IMAGE_BYTES:
        files = read_strings(tensor, count) if size is None else split_elements(binary, count)
        uploads = [Upload(data) for data in files]
        check_not_empty(uploads)
        return uploads
    return read_pixels(tensor, None if size is None else binary, shape)


def read_shape(tensor: Input) -> list[int]:
    """Return an input's shape."""
    if len(memoryview(tensor.shape)) > MAX_SHAPE_BYTES:
        raise BadRequest(f"The shape of {tensor.name} has more than {MAX_SHAPE_BYTES} characters.")
    return read_json(SHAPE, tensor.shape, f"The shape of {tensor.name}")


def read_pixels(tensor: Input, binary: memoryview | None, shape: list[int]) -> Pixels:
    """Return the tensor of a checked shape, without a copy where it is binary."""
    count = math.prod(shape)
    if binary is not None:
        if len(binary) != count:
            raise BadRequest(f"{tensor.name} has a binary_data_size of {len(binary)}, and its shape makes {count}.")
        return np.frombuffer(binary, np.uint8).reshape(shape)
    text = bytes(tensor.data)
    numbers = text.count(b",") + 1  # as many in a flat list as in a nested one
    if numbers != count:
        raise BadRequest(f"The data of {tensor.name} are {numbers} numbers, and its shape makes {count}.")
    decoder: msgspec.json.Decoder[Any] = NESTED_BYTES if NESTED.match(text) else FLAT_BYTES
    values = read_json(decoder, text, f"The data of {tensor.name}")
    try:
        return np.array(values, np.uint8).reshape(shape)
    except ValueError as error:  # nested lists of unequal lengths
        raise BadRequest(f"The data of {tensor.name} are not of its shape {shape}.") from error


def read_strings(tensor: Input, count: int) -> list[bytes]:
    """Return the files that JSON has in base64."""
    texts = read_json(STRINGS, tensor.data, f"The data of {tensor.name}")
    if len(texts) != count:
        raise BadRequest(f"The data of {tensor.name} are {len(texts)} strings, and its shape makes {count}.")
    return [decode_base64(text, f"{tensor.name}[{index}]") for index, text in enumerate(texts)]


def split_elements(binary: memoryview, count: int) -> list[bytes]:
    """Return the elements of a BYTES tensor, each of which stands behind its length."""
    elements, at = [], 0
    for index in range(count):
        begin = at + LENGTH_BYTES
        at = begin + int.from_bytes(binary[at:begin], "little")
        if begin > len(binary) or at > len(binary):
            raise BadRequest(f"{IMAGE_BYTES}[{index}] ends beyond the {len(binary)} bytes of the tensor.")
        elements.append(bytes(binary[begin:at]))
    if at != len(binary):
        raise BadRequest(f"{IMAGE_BYTES} has {len(binary) - at} bytes behind the last of its {count} elements.")
    return elements


# Outputs


def logits_of(predictions: Sequence[Prediction]) -> Output:
    """Return float32 [N, C]."""
    logits = np.stack([prediction.logits for prediction in predictions])
    if not np.isfinite(logits).all():
        raise InferenceFailed("A logit of the model is not a number.")
    return logits


def probabilities_of(predictions: Sequence[Prediction]) -> Output:
    """Return the softmax of the logits, float32 [N, C]."""
    return softmax(logits_of(predictions))


def features_of(predictions: Sequence[Prediction]) -> Output:
    """Return float32 [N, D]."""
    features = np.stack([prediction.features for prediction in predictions])
    if not np.isfinite(features).all():
        raise InferenceFailed("A feature of the model is not a number.")
    return features


def unfamiliarity_of(predictions: Sequence[Prediction]) -> Output:
    """Return float32 [N, 1]."""
    return np.array([[prediction.unfamiliarity] for prediction in predictions], dtype=np.float32)


OUTPUTS: Final[Mapping[str, Callable[[Sequence[Prediction]], Output]]] = {
    DEFAULT_OUTPUT: logits_of,
    "probabilities": probabilities_of,
    FEATURES: features_of,
    UNFAMILIARITY: unfamiliarity_of,
}


def output_widths(metadata: ModelMetadata) -> dict[str, int]:
    """Return the outputs of a model with their widths; an old one has no features, and no unfamiliarity."""
    others = {FEATURES: metadata.feature_dim or 0, UNFAMILIARITY: int(metadata.unfamiliarity is not None)}
    widths = dict.fromkeys(OUTPUTS, len(metadata.labels)) | others
    return {name: width for name, width in widths.items() if width}


def read_outputs(content: InferBody, metadata: ModelMetadata, max_classes: int) -> list[OutputFormat]:
    """Return the outputs that a request asks for.

    Args:
        content: the JSON.
        metadata: of the model.
        max_classes: most classes that an output may name.

    Raises:
        BadRequest: one that the model has not, that is asked for twice, with too many classes, or as classes in vain.
    """
    known = output_widths(metadata)
    is_binary = bool(content.parameters and content.parameters.binary_data_output)
    formats: dict[str, OutputFormat] = {}
    for output in content.outputs or [RequestedOutput(DEFAULT_OUTPUT)]:
        name, parameters = output.name, output.parameters or OutputParameters()
        if name not in known:
            raise BadRequest(f"The model has no output {name[:40]}; it has {' and '.join(known)}.")
        if name in (FEATURES, UNFAMILIARITY) and parameters.classification:
            raise BadRequest(f"The output {name} has no classes; leave out its classification.")
        classes = min(parameters.classification or 0, len(metadata.labels))
        if classes > max_classes:
            raise BadRequest(f"The output {name} is asked for {classes} classes; this service allows {max_classes}.")
        if name in formats:
            raise BadRequest(f"The output {name} is asked for twice.")
        formats[name] = OutputFormat(
            name,
            is_binary if parameters.binary_data is None else parameters.binary_data,
            classes,
        )
    return list(formats.values())


def write_body(
    predictions: Sequence[Prediction], formats: Sequence[OutputFormat], metadata: ModelMetadata, head: dict[str, Any]
) -> tuple[bytes, int | None]:
    """Return a response's body, and how many bytes of it are JSON; None: all.

    Args:
        predictions: N.
        formats: the outputs that were asked for.
        metadata: of the model.
        head: what the JSON has beside its outputs.

    Raises:
        InferenceFailed: a logit is not a number, so that no answer would be one.
    """
    outputs, parts = [], []
    for name, is_binary, classes in formats:
        values = OUTPUTS[name](predictions)
        count, width = values.shape
        output: dict[str, Any] = {"name": name, "datatype": "FP32", "shape": [count, width]}
        texts = None
        if classes:
            output |= {"datatype": "BYTES", "shape": [count, classes]}
            texts = classified(predictions, values, classes, metadata.labels)
        if is_binary:
            part = values.astype("<f4", copy=False).tobytes() if texts is None else join_elements(texts)
            parts.append(part)
            output["parameters"] = {"binary_data_size": len(part)}
        else:
            output["data"] = values.ravel().tolist() if texts is None else texts
        outputs.append(output)
    text = msgspec.json.encode(head | {"outputs": outputs})
    return b"".join([text, *parts]), len(text) if parts else None


def classified(predictions: Sequence[Prediction], values: Output, k: int, labels: Sequence[str]) -> list[str]:
    """Return `value:index:label` of the `k` most probable classes of each image."""
    return [
        f"{row[index]:.6f}:{index}:{labels[index]}"
        for prediction, row in zip(predictions, values, strict=True)
        for index in prediction.top(k)[0]
    ]


def join_elements(texts: Sequence[str]) -> bytes:
    """Return a BYTES tensor of texts."""
    elements = [text.encode() for text in texts]
    return b"".join([len(element).to_bytes(LENGTH_BYTES, "little") + element for element in elements])
