"""Everything that can go wrong with a request: one table of statuses, stable codes and public sentences.

The message of an error is sent to the client: it says what was wrong and what would be right, and never contains a
path, a key or a traceback. Standard library only, so that the engine's side can raise these without a web framework.
"""

from typing import ClassVar, Final


def printable(text: str) -> str:
    """Return a text with its control characters, and all that can't be seen, escaped as Python's literals."""
    if text.isprintable():
        return text
    return "".join([each if each.isprintable() else ascii(each)[1:-1] for each in text])


class ServiceError(Exception):
    """Any answer that is not a prediction; by itself, a fault of this program.

    Attributes:
        status: HTTP status code.
        code: stable snake_case name that clients may compare with.
        default: public sentence where the instance was given none.
        when: when it is the answer, for operators.
        message: public sentence of this instance.
        retry_after: seconds, > 0, after which a client should try again; with status 503 it is sent as `Retry-After`.
    """

    status: ClassVar[int] = 500
    code: ClassVar[str] = "internal_error"
    default: ClassVar[str] = "The service failed to answer this request."
    when: ClassVar[str] = "A fault of this program; the log has the traceback under the request's id."

    def __init__(self, message: str | None = None, *, retry_after: float = 1.0) -> None:
        self.message = printable(message or self.default)  # it may quote what a client has sent
        self.retry_after = retry_after
        super().__init__(self.message)


def _error(status: int, code: str, default: str, when: str = "") -> type[ServiceError]:
    """Return the error of a code, named as the code; its sentence says when it is the answer, unless `when` does."""

    class Error(ServiceError):
        pass

    Error.__name__ = Error.__qualname__ = code.title().replace("_", "")
    Error.status, Error.code, Error.default, Error.when = status, code, default, when or default
    return Error


BadRequest = _error(
    400, "bad_request", "The request is not valid.", "Not understood as it is; sending it again won't help."
)
InvalidTopK = _error(
    400,
    "invalid_top_k",
    "top_k must be an integer between 1 and the number of classes.",
    "`top_k` is not an integer between 1 and the number of classes, or above `max_top_k`.",
)
InvalidLabel = _error(400, "invalid_label", "label must be one of the model's labels.")
InvalidTimeout = _error(
    400,
    "invalid_timeout",
    "X-Request-Timeout-Ms must be an integer between 1 and 9999999999.",
    "`X-Request-Timeout-Ms` is no integer of 1 to 10 digits above 0; one above `request_timeout_ms` means that.",
)
InvalidJson = _error(
    400,
    "invalid_json",
    'The body must be JSON of the form {"image": "<base64>"} or {"images": ["<base64>", ...]}.',
    "The body says that it is JSON and is not, or not of the documented shape.",
)
InvalidBase64 = _error(
    400,
    "invalid_base64",
    "The image is not valid base64.",
    "An image in JSON, or a part of a form that says so, is not base64.",
)
InvalidForm = _error(400, "invalid_form", "The body is not valid multipart/form-data.")
NoImage = _error(400, "no_image", "The request holds no image.")
NotAnImage = _error(400, "not_an_image", "The bytes are not an image; send a JPEG, PNG, WebP, BMP, GIF or TIFF file.")
TruncatedImage = _error(400, "truncated_image", "The image is truncated or damaged.")
Unauthorized = _error(
    401,
    "unauthorized",
    "A valid key is needed: send it as 'Authorization: Bearer <key>' or as 'X-API-Key: <key>'.",
    "No key, or not the right one.",
)
ReloadDisabled = _error(403, "reload_disabled", "Reloading over HTTP is off; set an admin key to turn it on.")
ExplainDisabled = _error(403, "explain_disabled", "Explanations are off; set explain_max_runs to turn them on.")
NotFound = _error(404, "not_found", "There is nothing at this path; /openapi.json lists what there is.")
MethodNotAllowed = _error(405, "method_not_allowed", "This path does not take this method.")
HeadersTimeout = _error(408, "headers_timeout", "The request's headers did not arrive in time.")
BodyTimeout = _error(408, "body_timeout", "The body did not arrive in time.")
LengthRequired = _error(
    411,
    "length_required",
    "The request announces no body: send Content-Length, or Transfer-Encoding: chunked.",
    "A request with images that does not announce its body, of which HTTP says then that there is none.",
)
BodyTooLarge = _error(
    413, "body_too_large", "The body is too large.", "More bytes than `max_body_bytes`; found while reading, not after."
)
TooManyPixels = _error(
    413,
    "too_many_pixels",
    "The image has too many pixels.",
    "An image of more than `max_pixels` by its header, or images of more than `max_request_pixels` together.",
)
ImageTooCostly = _error(
    413,
    "image_too_costly",
    "The image would take too much work to decode.",
    "Decoding the image takes more memory or time than one may have, or its structure says that it would.",
)
TooManyImages = _error(
    413,
    "too_many_images",
    "The request holds too many images.",
    "More images than `max_images`, or than the whole queue can hold.",
)
UnsupportedFormat = _error(
    415,
    "unsupported_format",
    "This image format is not supported; send a JPEG, PNG, WebP, BMP, GIF or TIFF file.",
    "An image format, or a variant of one, that is not decoded here.",
)
UnsupportedMediaType = _error(
    415,
    "unsupported_media_type",
    "Send the image as multipart/form-data (curl -F file=@image.jpg), or its bytes with a Content-Type of image/* or "
    "application/octet-stream, or as application/json.",
    "A Content-Type that no request with images has, but for the protocol v2, which takes any.",
)
UnsupportedEncoding = _error(
    415,
    "unsupported_encoding",
    "The body is compressed (Content-Encoding); send it as it is, images are compressed already.",
)
HeadersTooLarge = _error(431, "headers_too_large", "The request's headers are too large.")
ClientDisconnected = _error(
    499,
    "client_disconnected",
    "The client closed the connection.",
    "The client left before its answer, which is never sent; counted under 499 as proxies do.",
)
DecodingFailed = _error(
    500,
    "decoding_failed",
    "The process that decoded this image has ended; the request may be sent again.",
    "The process that decoded the image was killed, or crashed; another one takes its place.",
)
InferenceFailed = _error(
    500,
    "inference_failed",
    "The model failed on this batch; the request may be sent again.",
    "The model failed on the batch this image was in; the next batch is served.",
)
UnsupportedTransferCoding = _error(
    501,
    "unsupported_transfer_coding",
    "The body has a transfer coding that is not known here; chunked is.",
    "`Transfer-Encoding` with more than `chunked`; the connection is closed, for nobody knows where the body ends.",
)
FeaturesUnavailable = _error(
    501,
    "features_unavailable",
    "This model's graph has no output features; export its checkpoint again to have it.",
    "`POST /embed`, and the model was exported before its graph had the output `features`.",
)
Unavailable = _error(
    503,
    "unavailable",
    "The service can't take this request now.",
    "As many connections to this port are open as `max_connections` allows; this one is closed, a probe's too.",
)
Overloaded = _error(
    503,
    "overloaded",
    "The queue is full; try again later.",
    "Admission is full, in images or in bytes, or what is in flight takes longer than the deadline allows.",
)
FolderUnavailable = _error(
    503,
    "folder_unavailable",
    "The model folder can't be looked into.",
    "`POST /models/reload` while the model folder can't be looked into; what serves goes on.",
)
NotReady = _error(
    503,
    "not_ready",
    "No model is ready to serve.",
    "No model has passed its golden check yet, the batcher has failed, or the process that runs the model hangs.",
)
Draining = _error(
    503,
    "draining",
    "The service is shutting down.",
    "The process was told to stop: accepted requests finish, new ones go elsewhere.",
)
DeadlineExceeded = _error(504, "deadline_exceeded", "The deadline passed before the image could be classified.")

ERRORS: Final[tuple[type[ServiceError], ...]] = (ServiceError, *ServiceError.__subclasses__())
