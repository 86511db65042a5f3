"""A response as bytes and headers, and the one function that makes one of an error."""

import json
import math
from dataclasses import dataclass

from service.api.paths import is_v2
from service.errors import ServiceError, Unauthorized, Unavailable

Headers = list[tuple[bytes, bytes]]


@dataclass(slots=True)  # not frozen: that costs a microsecond a field
class Response:
    """What is sent for one request; whether its connection stays open is the connection's affair."""

    status: int
    headers: Headers
    body: bytes


def json_response(status: int, body: bytes, request_id: str) -> Response:
    """Return a response of a JSON body, with the headers that every response has."""
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", b"%d" % len(body)),
        (b"x-request-id", request_id.encode()),
    ]
    return Response(status, headers, body)


def png_response(body: bytes, request_id: str) -> Response:
    """Return a response of a PNG file, with the headers that every response has."""
    response = json_response(200, body, request_id)
    response.headers[0] = (b"content-type", b"image/png")
    return response


def error_response(error: ServiceError, request_id: str, path: str = "") -> Response:
    """Return an error's response; its body is the JSON of `ErrorResponse`, for a path below /v2 of `V2Error`."""
    content: dict[str, object] = {"code": error.code, "message": error.message, "request_id": request_id}
    content = {"error": error.message if is_v2(path) else content}
    response = json_response(error.status, json.dumps(content).encode(), request_id)
    if error.status == Unavailable.status:
        response.headers.append((b"retry-after", b"%d" % max(1, math.ceil(error.retry_after))))
    if error.status == Unauthorized.status:
        response.headers.append((b"www-authenticate", b"Bearer"))
    return response
