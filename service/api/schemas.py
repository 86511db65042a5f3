"""The shapes of all answers, and what the OpenAPI document says of requests for inference beside them."""

from collections.abc import Iterable
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from pydantic.json_schema import models_json_schema

from service import errors
from service.engine.metadata import ModelMetadata


class Schema(BaseModel):
    """Base of the answers: what is not documented is not sent."""

    model_config = ConfigDict(extra="forbid")


class ClassProbability(Schema):
    """One class and how probable the model thinks it."""

    label: str = Field(examples=["apple"])
    index: int = Field(ge=0, description="Position of the label in the model's list.")
    probability: float = Field(ge=0, le=1)


class ImagePrediction(Schema):
    """The most probable classes of one image."""

    filename: str | None = Field(description="As the form sent it; null for other bodies.")
    top: list[ClassProbability] = Field(description="`top_k` classes, the most probable first.")
    unfamiliar: bool | None = Field(
        default=None,
        description="Whether the image is unlike those of the training, so that its classes mean little. Absent where "
        "the model can't tell, as `unfamiliarity`.",
    )
    unfamiliarity: float | None = Field(
        default=None,
        ge=0,
        description="How unlike: the distance to the nearest class. `GET /models` has the threshold.",
    )


class PredictResponse(Schema):
    """One entry for each image, in the order in which they were sent; one shape for one or many."""

    model: str = Field(examples=["perceiver-cifar100"])
    version: int = Field(ge=1, description="The model version that gave every prediction of this answer.")
    predictions: list[ImagePrediction]


class ImageExplanation(Schema):
    """Which regions of one image carry a label."""

    filename: str | None = Field(description="As the form sent it; null for other bodies.")
    label: str = Field(description="What is explained.", examples=["apple"])
    index: int = Field(ge=0, description="Position of the label in the model's list.")
    probability: float = Field(ge=0, le=1, description="Of the label, where nothing is covered.")
    size: list[int] = Field(min_length=2, max_length=2, description="Rows and columns of the map.")
    map: list[list[float]] = Field(
        description="Rows from the top, each from the left: how much more the label's probability falls where this "
        "cell is covered than where it is not. Below 0: it falls less."
    )


class ExplainResponse(Schema):
    """One entry for each image, in the order in which they were sent."""

    model: str = Field(examples=["perceiver-cifar100"])
    version: int = Field(ge=1, description="The model version that was asked.")
    method: Literal["rise"]
    model_runs: int = Field(ge=1, description="Images run, covered ones and those without a cover.")
    crop: Literal["center", "none"] = Field(
        description="What a map lies over. center: the largest centred region of the image that has the model's aspect "
        "ratio; none: the whole image."
    )
    input_size: list[int] = Field(min_length=2, max_length=2, description="Height and width that the model sees.")
    explanations: list[ImageExplanation]


class ImageEmbedding(Schema):
    """The features of one image."""

    filename: str | None = Field(description="As the form sent it; null for other bodies.")
    embedding: list[float] = Field(description="`dim` numbers.")


class EmbedResponse(Schema):
    """One entry for each image, in the order in which they were sent."""

    model: str = Field(examples=["perceiver-cifar100"])
    version: int = Field(ge=1, description="The model version that gave them: those of two versions do not compare.")
    dim: int = Field(ge=1)
    normalized: bool = Field(description="Whether each has length 1, so that a product of two is their cosine.")
    embeddings: list[ImageEmbedding]


class ErrorDetail(Schema):
    """What went wrong."""

    code: str = Field(description="Stable; compare with this.", examples=["truncated_image"])
    message: str = Field(description="A sentence for people; may change.")
    request_id: str = Field(description="Also in the X-Request-Id header.")


class ErrorResponse(Schema):
    """The body of every answer with a status of 400 and above, /health's own 503 excepted."""

    error: ErrorDetail


class V2Error(Schema):
    """The body of an error of the protocol v2."""

    error: str = Field(description="A sentence for people; may change.")


class QueueState(Schema):
    """How full the queue is."""

    waiting: int = Field(ge=0, description="Images waiting for a batch.")
    images: int = Field(ge=0, description="Images accepted and not yet answered.")
    max_images: int = Field(ge=1)
    bytes: int = Field(ge=0, description="Bytes of the request bodies of these.")
    max_bytes: int = Field(ge=1)


class HealthResponse(Schema):
    """Summary of the process; the status code is 200 when ready and 503 otherwise."""

    status: Literal["ready", "loading", "draining", "failed"]
    model: str | None
    version: int | None
    provider: str | None
    queue: QueueState


class StatusResponse(Schema):
    """A probe's answer."""

    status: Literal["live", "ready"]


class VersionResponse(Schema):
    """One version in the model folder."""

    version: int
    state: Literal["live", "available", "refused"] = Field(
        description="available: lower than the live one, or not the pinned one."
    )
    reason: str | None = Field(description="Why it is refused; the log has it with the full paths.")
    metadata: ModelMetadata | None = Field(description="null where the file can't be read.")


class ModelsResponse(Schema):
    """All versions in the model folder."""

    live: int | None
    versions: list[VersionResponse]


# What any route can answer before it is reached: see `service.server.protocol`.
CONNECTION_ERRORS: tuple[type[errors.ServiceError], ...] = (
    errors.BadRequest,
    errors.HeadersTimeout,
    errors.HeadersTooLarge,
    errors.UnsupportedTransferCoding,
    errors.Unavailable,
)

# Errors of one path for inference alone, of other paths, and the one that is never sent.
OTHER_ERRORS = frozenset(
    {errors.InvalidTopK, errors.InvalidLabel, errors.ExplainDisabled, errors.FeaturesUnavailable}
    | {errors.ReloadDisabled, errors.FolderUnavailable, errors.NotFound, errors.MethodNotAllowed}
    | {errors.ClientDisconnected}
)
INFERENCE_ERRORS = tuple(kind for kind in errors.ERRORS if kind not in OTHER_ERRORS)
PREDICT_ERRORS = (*INFERENCE_ERRORS, errors.InvalidTopK)
EXPLAIN_ERRORS = (*INFERENCE_ERRORS, errors.InvalidLabel, errors.ExplainDisabled)
EMBED_ERRORS = (*INFERENCE_ERRORS, errors.FeaturesUnavailable)

# Declared for an operation where the settings hold a key for it.
SECURITY_SCHEMES = {
    "bearer": {"type": "http", "scheme": "bearer"},
    "header": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
}
SECURITY: list[dict[str, list[str]]] = [{"bearer": []}, {"header": []}]

BASE64 = {
    "type": "string",
    "contentEncoding": "base64",
    "contentMediaType": "image/*",
    "minLength": 4,
    "description": "Of either alphabet, padded or not, bare or as a data: URL.",
}
BINARY = {"schema": {"type": "string", "format": "binary"}}


REFERENCE = "#/components/schemas/{model}"


def content_of(*models: type[Schema]) -> dict[str, Any]:
    """Refer to the schemas of one of these bodies. FastAPI would compile a validator of them for each route and status.

    `error_schemas` and the routes' own responses have what is referred to.
    """
    references = [{"$ref": REFERENCE.format(model=model.__name__)} for model in models]
    return {"application/json": {"schema": {"anyOf": references} if len(references) > 1 else references[0]}}


def error_schemas() -> dict[str, Any]:
    """Return the schemas of all bodies of errors, by their names."""
    models: list[tuple[type[BaseModel], Literal["serialization"]]] = [
        (ErrorResponse, "serialization"),
        (V2Error, "serialization"),
    ]
    schemas: dict[str, Any] = models_json_schema(models, ref_template=REFERENCE)[1]["$defs"]
    return schemas


def error_responses(
    kinds: Iterable[type[errors.ServiceError]], *models: type[Schema]
) -> dict[int | str, dict[str, Any]]:
    """Describe errors for OpenAPI, by status; each description lists the codes. The body is an `ErrorResponse`.

    Args:
        kinds: the errors.
        models: bodies that it may be instead.
    """
    described: dict[int | str, dict[str, Any]] = {}
    for kind in kinds:
        entry = described.setdefault(kind.status, {"description": "", "content": content_of(*models, ErrorResponse)})
        entry["description"] = f"{entry['description']}`{kind.code}`: {kind.default} ".lstrip()
        if kind.status == errors.Unavailable.status:
            entry["headers"] = {"Retry-After": {"description": "Seconds.", "schema": {"type": "integer", "minimum": 1}}}
    return described


def inference_bodies(max_images: int, parameter: str) -> dict[str, Any]:
    """Return the OpenAPI content of a request with images; the query parameter may be a form's text field too."""
    fields = f"a text field {parameter} counts where the query has none; other text fields are ignored."
    several = {"type": "array", "minItems": 1, "maxItems": max_images}
    files = several | {"items": {"type": "string", "format": "binary"}}
    return {
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "description": f"One or several files, under any field names; {max_images} at most together; {fields}",
                "properties": {"file": files},
                "minProperties": 1,
                "additionalProperties": True,
            }
        },
        "application/json": {
            "schema": {
                "oneOf": [
                    {
                        "type": "object",
                        "properties": {name: schema},
                        "required": [name],
                        "additionalProperties": False,
                    }
                    for name, schema in {"image": BASE64, "images": several | {"items": BASE64}}.items()
                ]
            }
        },
        "image/*": BINARY,
        "application/octet-stream": BINARY,
    }


INFERENCE_HEADERS: dict[str, Any] = {
    "Server-Timing": {"description": "Milliseconds: decode, queue, inference, total.", "schema": {"type": "string"}},
    "X-Request-Id": {"schema": {"type": "string"}},
}
PREDICTED: dict[int | str, dict[str, Any]] = {
    200: {"description": "The most probable classes of each image.", "headers": INFERENCE_HEADERS}
}
EXPLAINED: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "A heat map of each image; where Accept names image/png, one image with its map laid over.",
        "headers": INFERENCE_HEADERS,
        "content": {"image/png": BINARY},
    }
}
EMBEDDED: dict[int | str, dict[str, Any]] = {
    200: {"description": "The features of each image.", "headers": INFERENCE_HEADERS}
}
TOP_K: dict[str, Any] = {
    "name": "top_k",
    "in": "query",
    "description": "Classes an image, 1 to the number of classes, within the service's own limit.",
    "schema": {"type": "integer", "minimum": 1, "default": 5},
}
LABEL: dict[str, Any] = {
    "name": "label",
    "in": "query",
    "description": "What to explain, one of the model's labels; left out: the most probable one of each image.",
    "schema": {"type": "string"},
}
NORMALIZE: dict[str, Any] = {
    "name": "normalize",
    "in": "query",
    "description": "Whether each vector is divided by its length.",
    "schema": {"type": "boolean", "default": True},
}
INFERENCE_PARAMETERS: list[dict[str, Any]] = [
    {
        "name": "X-Request-Timeout-Ms",
        "in": "header",
        "description": "Milliseconds from the body's last byte in which the run must have begun; "
        "capped by the service's own limit.",
        "schema": {"type": "integer", "minimum": 1, "maximum": 9_999_999_999},
    },
    {
        "name": "X-Request-Id",
        "in": "header",
        "description": "1 to 64 of A-Z a-z 0-9 . _ -; anything else is replaced. Comes back in the answer.",
        "schema": {"type": "string"},
    },
]
