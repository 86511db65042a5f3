"""The metadata of a model file, which export writes and the service reads. See docs/models.md.

Shape letters: H and W the input size in pixels, C classes.
"""

import json
from collections import Counter
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, field_validator

Precision = Literal["float32", "float16", "int8"]
Split = Annotated[str, Field(min_length=1)]
Fraction = Annotated[float, Field(ge=0, le=1)]

SCHEMA_VERSION = 1
MODEL_FILE = "model.onnx"
# A version folder may hold variants of the same model beside the float32 one; each carries its own metadata.
MODEL_FILES: Mapping[Precision, str] = {"float32": MODEL_FILE, "float16": "model.fp16.onnx", "int8": "model.int8.onnx"}

INPUT_NAME = "images"
OUTPUT_NAME = "logits"
FEATURES_NAME = "features"
UNFAMILIARITY_NAME = "unfamiliarity"
KEY_PREFIX = "perceiver."
# The ONNX specification's keys for image inputs ("Image Category Definition" in MetadataProps.md).
IMAGE_PROPS = {
    "Image.BitmapPixelFormat": "Rgb8",
    "Image.ColorSpaceGamma": "SRGB",
    "Image.NominalPixelRange": "NominalRange_0_255",
}


class ArtifactError(Exception):
    """A model folder breaks the contract. The message names the file, what is wrong and what would be right."""


class _Contract(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ResizePolicy(_Contract):
    """How an image of another size is resized to the model's input size.

    Attributes:
        crop: "center" takes the largest centred region of the target's aspect ratio, "none" stretches.
        filter: Pillow's resampling filter; all of them antialias when shrinking.
    """

    crop: Literal["center", "none"] = "center"
    filter: Literal["bilinear", "bicubic", "lanczos", "box"] = "bicubic"


class EvalMetrics(_Contract):
    """Measured on `n` images of `split`; all but `loss` are fractions in 0..1, `ece` with 15 bins."""

    split: Split
    n: Annotated[int, Field(ge=1)]
    top1: Fraction
    top5: Fraction
    loss: Annotated[float, Field(ge=0)]
    ece: Fraction


class Provenance(_Contract):
    """Origin of the weights: commit, SHA-256 of the checkpoint, ISO 8601 time in UTC, library versions."""

    git_commit: str | None
    checkpoint_sha256: str
    created: str
    versions: dict[str, str]

    @field_validator("created")
    @classmethod
    def _is_iso_8601(cls, value: str) -> str:
        TypeAdapter(AwareDatetime).validate_python(value)
        return value


class VariantGate(_Contract):
    """Accuracy and speed of a float16 or int8 file against float32, measured at the export.

    Attributes:
        provider: where it ran.
        split: the split that the images are from.
        n: number of images.
        labels_equal: share of images whose top class is torch's in float32, 0..1.
        top1: top-1 accuracy, 0..1.
        top1_float32: top-1 accuracy of torch in float32, 0..1.
        speed: pairs of batch size and speed relative to the float32 file, measured in turn; None: not measured.
    """

    provider: Annotated[str, Field(min_length=1)]
    split: Split
    n: Annotated[int, Field(ge=1)]
    labels_equal: Fraction
    top1: Fraction
    top1_float32: Fraction
    speed: tuple[tuple[Annotated[int, Field(ge=1)], Annotated[float, Field(gt=0)]], ...] | None


class Unfamiliarity(_Contract):
    """From which score on an image counts as unfamiliar.

    Attributes:
        threshold: an image with a larger score is unfamiliar; a float32, as scores are.
        split: the split that the threshold was fitted on.
        n: number of its images.
        flagged: share of these that are unfamiliar, 0..1.
        training_images: number of training images that class means and covariance were fitted on.
    """

    threshold: Annotated[float, Field(gt=0)]
    split: Split
    n: Annotated[int, Field(ge=1)]
    flagged: Fraction
    training_images: Annotated[int, Field(ge=1)]


class ModelMetadata(_Contract):
    """Metadata of a model, stored in the ONNX file.

    Attributes:
        labels: class names by index, C of them.
        input_size: (H, W) in pixels, the size of the graph's input.
        golden_tolerance: largest allowed absolute difference of a logit on the golden images.
        temperature: divisor that calibrates the logits; the graph applies it already.
        parameters: number of trained parameters.
        feature_dim: width D of the output `features`; None where the graph has no such output.
        unfamiliarity: threshold of the output `unfamiliarity`; None where the graph has no such output.
        gate: of a float16 or int8 file; None for the float32 file, and for random weights.
    """

    schema_version: Literal[1]
    name: Annotated[str, Field(min_length=1)]
    labels: Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(min_length=2)]
    input_size: tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]]
    resize: ResizePolicy
    dataset: str
    metrics: EvalMetrics | None
    preset: str
    parameters: Annotated[int, Field(ge=0)]
    precision: Precision
    golden_tolerance: Annotated[float, Field(gt=0)]
    temperature: Annotated[float, Field(gt=0)] = 1.0
    provenance: Provenance
    feature_dim: Annotated[int, Field(ge=1)] | None = None
    unfamiliarity: Unfamiliarity | None = None
    gate: VariantGate | None = None

    @field_validator("labels")
    @classmethod
    def _are_unique(cls, labels: tuple[str, ...]) -> tuple[str, ...]:
        repeated = [label for label, count in Counter(labels).items() if count > 1]
        if repeated:
            raise ValueError(f"every label must be unique; repeated: {', '.join(repeated)}")
        return labels

    @property
    def output_shapes(self) -> dict[str, list[int]]:
        """The graph's outputs in its order, with their shapes behind the batch."""
        shapes = {OUTPUT_NAME: [len(self.labels)]}
        if self.feature_dim is not None:
            shapes[FEATURES_NAME] = [self.feature_dim]
        if self.unfamiliarity is not None:
            shapes[UNFAMILIARITY_NAME] = []
        return shapes


def to_props(metadata: ModelMetadata) -> dict[str, str]:
    """Return ONNX metadata_props: one JSON string for each field, and the ONNX specification's image keys."""
    absent = {name for name in ("feature_dim", "unfamiliarity", "gate") if getattr(metadata, name) is None}
    fields = metadata.model_dump(mode="json", exclude=absent)
    return {f"{KEY_PREFIX}{name}": json.dumps(value) for name, value in fields.items()} | IMAGE_PROPS


def from_props(props: Mapping[str, str]) -> ModelMetadata:
    """Read and validate the result of `to_props`; keys of other tools are ignored.

    Raises:
        ArtifactError: a field is missing, unknown, not JSON, or out of its bounds.
    """
    fields: dict[str, Any] = {}
    for key, text in props.items():
        if key.startswith(KEY_PREFIX):
            try:
                fields[key.removeprefix(KEY_PREFIX)] = json.loads(text)
            except ValueError as error:
                raise ArtifactError(f"metadata: {key} must be JSON, and is not: {error}") from error
    if not fields:
        raise ArtifactError(
            f"metadata: there is no {KEY_PREFIX}* entry; the file must be written by `python -m export`"
        )
    try:
        # Strict refuses a string for a number; only JSON mode turns lists into tuples.
        return ModelMetadata.model_validate_json(json.dumps(fields), strict=True)
    except ValidationError as error:
        raise ArtifactError(f"metadata: {_in_words(error)}") from error


def _in_words(error: ValidationError) -> str:
    return "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors(include_url=False))
