# ruff: noqa: N818 - these are answers of the API, named after what happened; the suffix would say "Error" of each twice
"""Everything that can go wrong with a request. A class owns its HTTP status, its stable code and its public words.

    ServiceError                     500  internal_error
    ├── BadRequest                   400  bad_request
    │   ├── InvalidTopK              400  invalid_top_k
    │   ├── InvalidTimeout           400  invalid_timeout
    │   ├── InvalidJson              400  invalid_json
    │   ├── InvalidBase64            400  invalid_base64
    │   ├── InvalidForm              400  invalid_form
    │   ├── NoImage                400  no_image
    │   ├── NotAnImage               400  not_an_image
    │   └── TruncatedImage           400  truncated_image
    ├── Unauthorized                 401  unauthorized
    ├── ReloadDisabled               403  reload_disabled
    ├── NotFound                     404  not_found
    ├── MethodNotAllowed             405  method_not_allowed
    ├── HeadersTimeout               408  headers_timeout
    ├── BodyTimeout                  408  body_timeout
    ├── BodyTooLarge                 413  body_too_large
    ├── TooManyPixels                413  too_many_pixels
    ├── ImageTooCostly               413  image_too_costly
    ├── TooManyImages              413  too_many_images
    ├── UnsupportedFormat            415  unsupported_format
    ├── UnsupportedMediaType         415  unsupported_media_type
    ├── UnsupportedEncoding          415  unsupported_encoding
    ├── HeadersTooLarge              431  headers_too_large
    ├── ClientDisconnected           499  client_disconnected (never sent: nobody is there to read it)
    ├── InferenceFailed              500  inference_failed
    ├── UnsupportedTransferCoding    501  unsupported_transfer_coding
    ├── Unavailable                  503  unavailable         (carries Retry-After)
    │   ├── Overloaded               503  overloaded
    │   ├── FolderUnavailable        503  folder_unavailable
    │   ├── NotReady                 503  not_ready
    │   └── Draining                 503  draining
    └── DeadlineExceeded             504  deadline_exceeded

The message of an instance is sent to the client: it says what was wrong and what would be right, and never contains
a path, a key or a traceback. Standard library only, so that the engine's side can raise these without a web framework.
"""

from typing import ClassVar


class ServiceError(Exception):
    """Base of all answers that are not a prediction.

    Attributes:
        status: HTTP status code.
        code: stable snake_case name that clients may compare with.
        message: public sentence; the class's own where the instance was given none.
    """

    status: ClassVar[int] = 500
    code: ClassVar[str] = "internal_error"
    default: ClassVar[str] = "The service failed to answer this request."

    def __init__(self, message: str | None = None) -> None:
        self.message = message or self.default
        super().__init__(self.message)


class BadRequest(ServiceError):
    """The request can't be understood as it is; sending it again won't help."""

    status, code, default = 400, "bad_request", "The request is not valid."


class InvalidTopK(BadRequest):
    """`top_k` is not an integer between 1 and the number of classes."""

    code, default = "invalid_top_k", "top_k must be an integer between 1 and the number of classes."


class InvalidTimeout(BadRequest):
    """`X-Request-Timeout-Ms` is no integer of 1 to 10 digits above 0; one above `request_timeout_ms` means that."""

    code, default = "invalid_timeout", "X-Request-Timeout-Ms must be an integer between 1 and 9999999999."


class InvalidJson(BadRequest):
    """The body says that it is JSON and is not, or not of the documented shape."""

    code = "invalid_json"
    default = 'The body must be JSON of the form {"image": "<base64>"} or {"images": ["<base64>", ...]}.'


class InvalidBase64(BadRequest):
    """An image in a JSON body is not base64."""

    code, default = "invalid_base64", "The image is not valid base64."


class InvalidForm(BadRequest):
    """The body says that it is multipart/form-data and can't be parsed as that."""

    code, default = "invalid_form", "The body is not valid multipart/form-data."


class NoImage(BadRequest):
    """The request holds no image."""

    code, default = "no_image", "The request holds no image."


class NotAnImage(BadRequest):
    """The bytes are in no image format that is known here."""

    code = "not_an_image"
    default = "The bytes are not an image; send a JPEG, PNG, WebP, BMP, GIF or TIFF file."


class TruncatedImage(BadRequest):
    """The image begins well and ends too early, or is damaged within."""

    code, default = "truncated_image", "The image is truncated or damaged."


class Unauthorized(ServiceError):
    """No key, or not the right one."""

    status, code = 401, "unauthorized"
    default = "A valid key is needed: send it as 'Authorization: Bearer <key>' or as 'X-API-Key: <key>'."


class ReloadDisabled(ServiceError):
    """`POST /models/reload` without an admin key in the settings."""

    status, code, default = 403, "reload_disabled", "Reloading over HTTP is off; set an admin key to turn it on."


class NotFound(ServiceError):
    """No such route."""

    status, code, default = 404, "not_found", "There is nothing at this path; /docs lists what there is."


class MethodNotAllowed(ServiceError):
    """The route exists and does not take this method."""

    status, code, default = 405, "method_not_allowed", "This path does not take this method."


class HeadersTimeout(ServiceError):
    """The headers came too slowly."""

    status, code, default = 408, "headers_timeout", "The request's headers did not arrive in time."


class BodyTimeout(ServiceError):
    """The body came too slowly."""

    status, code, default = 408, "body_timeout", "The body did not arrive in time."


class BodyTooLarge(ServiceError):
    """More bytes than `max_body_bytes`; found while reading, not after."""

    status, code, default = 413, "body_too_large", "The body is too large."


class TooManyPixels(ServiceError):
    """An image of more than `max_pixels` by its header, or images of more than `max_request_pixels` together."""

    status, code, default = 413, "too_many_pixels", "The image has too many pixels."


class ImageTooCostly(ServiceError):
    """An image of few pixels whose file is made so that decoding it takes seconds or gigabytes."""

    status, code, default = 413, "image_too_costly", "The image would take too much work to decode."


class TooManyImages(ServiceError):
    """More images than `max_images`, or than the whole queue can hold."""

    status, code, default = 413, "too_many_images", "The request holds too many images."


class UnsupportedFormat(ServiceError):
    """An image format, or a variant of one, that is not decoded here."""

    status, code = 415, "unsupported_format"
    default = "This image format is not supported; send a JPEG, PNG, WebP, BMP, GIF or TIFF file."


class UnsupportedMediaType(ServiceError):
    """A Content-Type that `POST /predict` does not take."""

    status, code = 415, "unsupported_media_type"
    default = (
        "Send the image as multipart/form-data (curl -F file=@image.jpg), or its bytes with a Content-Type of "
        "image/* or application/octet-stream, or as application/json."
    )


class UnsupportedEncoding(ServiceError):
    """`Content-Encoding` other than identity."""

    status, code = 415, "unsupported_encoding"
    default = "The body is compressed (Content-Encoding); send it as it is, images are compressed already."


class HeadersTooLarge(ServiceError):
    """More bytes or lines of headers than any sensible client sends."""

    status, code, default = 431, "headers_too_large", "The request's headers are too large."


class ClientDisconnected(ServiceError):
    """The client left before its answer; counted under 499 as proxies do."""

    status, code, default = 499, "client_disconnected", "The client closed the connection."


class InferenceFailed(ServiceError):
    """The model failed on the batch this image was in; the next batch is served."""

    code, default = "inference_failed", "The model failed on this batch; the request may be sent again."


class UnsupportedTransferCoding(ServiceError):
    """`Transfer-Encoding` with more than `chunked`; the connection is closed, for nobody knows where the body ends."""

    status, code = 501, "unsupported_transfer_coding"
    default = "The body has a transfer coding that is not known here; chunked is."


class Unavailable(ServiceError):
    """As many connections are open as `max_connections` allows; this one is closed, but for probes and metrics.

    Its kinds are other reasons for which a client should try again after `retry_after` seconds.

    Attributes:
        retry_after: seconds, > 0; sent rounded up to whole seconds in `Retry-After`.
    """

    status, code, default = 503, "unavailable", "The service can't take this request now."

    def __init__(self, message: str | None = None, *, retry_after: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class Overloaded(Unavailable):
    """Admission is full, in images or in bytes."""

    code, default = "overloaded", "The queue is full; try again later."


class FolderUnavailable(Unavailable):
    """`POST /models/reload` while the model folder can't be looked into; what serves goes on."""

    code, default = "folder_unavailable", "The model folder can't be looked into."


class NotReady(Unavailable):
    """No model has passed its golden check yet, the batcher has failed, or the process that runs the model hangs."""

    code, default = "not_ready", "No model is ready to serve."


class Draining(Unavailable):
    """The process was told to stop: accepted requests finish, new ones go elsewhere."""

    code, default = "draining", "The service is shutting down."


class DeadlineExceeded(ServiceError):
    """The deadline passed before the image's turn came; it was not run."""

    status, code, default = 504, "deadline_exceeded", "The deadline passed before the image could be classified."
