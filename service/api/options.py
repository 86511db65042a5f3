"""What the head of a request for inference asks for."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Final
from urllib.parse import parse_qsl

from service.errors import BadRequest, InvalidTimeout, InvalidTopK, LengthRequired, ServiceError, UnsupportedEncoding

DEFAULT_TOP_K: Final = 5
MAX_QUERY_BYTES: Final = 1000
MAX_DIGITS: Final = 10  # of a number in a header or query; more are no sensible number, and slow to convert


@dataclass(slots=True)  # not frozen: that costs a microsecond a field
class RequestOptions:
    """What the head of a request asks for.

    Attributes:
        content_length: bytes; None where the length is not announced.
        timeout: seconds from the body's last byte.
    """

    content_type: str
    content_length: int | None
    timeout: float


def read_options(lines: Sequence[tuple[bytes, bytes]], max_timeout_ms: int) -> RequestOptions:
    """Read the headers of a request; of a header that is given twice, the last.

    Content-Encoding is the exception: each names one more coding of the body.

    Raises:
        InvalidTimeout: not an integer, or below 1.
        LengthRequired: no body is announced.
        UnsupportedEncoding: the body is compressed.
    """
    headers = dict(lines)
    if b"content-encoding" in headers:
        codings = b",".join([value.lower() for name, value in lines if name == b"content-encoding"]).split(b",")
        if any(coding.strip() not in (b"", b"identity") for coding in codings):  # a list may have empty places
            raise UnsupportedEncoding()
    length = headers.get(b"content-length")
    if length is None and b"transfer-encoding" not in headers:
        raise LengthRequired()
    timeout_ms = max_timeout_ms
    if (asked := headers.get(b"x-request-timeout-ms")) is not None:
        timeout_ms = min(max_timeout_ms, positive(asked.decode("latin-1"), InvalidTimeout()))
    return RequestOptions(
        content_type=headers.get(b"content-type", b"").decode("latin-1"),
        # HTTP allows any number of leading zeros, and the parser has bounded the rest; int() takes 4,300 digits alone.
        content_length=None if length is None else int(length.lstrip(b"0") or b"0"),
        timeout=timeout_ms / 1000,
    )


def read_top_k(query: bytes) -> int | None:
    """Read the query string of `/predict`, which has one parameter; None where the default is wanted.

    Raises:
        InvalidTopK: not an integer, or below 1.
        BadRequest: an unknown parameter, which may be a misspelt one.
    """
    if not query:
        return None
    if len(query) > MAX_QUERY_BYTES:
        raise InvalidTopK(f"The query is longer than {MAX_QUERY_BYTES} bytes; there is one parameter, top_k.")
    return _read_top_k(query)


@lru_cache(maxsize=128)  # a client sends the same query each time, and errors are not kept
def _read_top_k(query: bytes) -> int | None:
    top_k = None
    for name, value in parse_qsl(query.decode("latin-1"), keep_blank_values=True):
        if name != "top_k":
            raise BadRequest(f"There is no query parameter {name[:40]!r}; there is top_k.")
        if top_k is not None:
            raise InvalidTopK("top_k is given twice.")
        top_k = positive(value, InvalidTopK())
    return top_k


def read_label(query: bytes) -> str | None:
    """Read the query string of `/explain`, which has one parameter; None where the first label is wanted.

    Raises:
        BadRequest: another parameter, one given twice, or no UTF-8.
    """
    return _only_parameter(query, "label")


def read_normalize(query: bytes) -> bool:
    """Read the query string of `/embed`, which has one parameter; true where it is absent.

    Raises:
        BadRequest: another parameter, one given twice, or neither true nor false.
    """
    value = _only_parameter(query, "normalize")
    return value is None or checked_normalize(value)


def checked_normalize(value: str) -> bool:
    """Read true or false, or raise BadRequest."""
    if value not in ("true", "false"):
        raise BadRequest("normalize must be true or false.")
    return value == "true"


def _only_parameter(query: bytes, name: str) -> str | None:
    try:
        # Of a thousand the parser would hold up the event loop; of two, the answer says what is wrong.
        parameters = parse_qsl(query.decode("latin-1"), keep_blank_values=True, errors="strict", max_num_fields=2)
    except UnicodeDecodeError as error:
        raise BadRequest("The query is not UTF-8.") from error
    except ValueError as error:
        raise BadRequest(f"The query has more than one parameter; there is {name}.") from error
    other = next((given for given, _ in parameters if given != name), None)
    if other is not None:
        raise BadRequest(f"There is no query parameter {other[:40]!r}; there is {name}.")
    if len(parameters) > 1:
        raise BadRequest(f"{name} is given twice.")
    return parameters[0][1] if parameters else None


def positive(text: str, otherwise: ServiceError) -> int:
    """Read an integer of at least 1, or raise."""
    if not (text.isascii() and text.isdigit() and len(text) <= MAX_DIGITS and int(text) >= 1):
        raise otherwise
    return int(text)


def checked_top_k(top_k: int | None, classes: int, max_top_k: int) -> int:
    """Return how many classes to name; the default is 5, or all of fewer."""
    if top_k is None:
        return min(DEFAULT_TOP_K, classes, max_top_k)
    if top_k > classes:
        raise InvalidTopK(f"top_k is {top_k}, and this model has {classes} classes.")
    if top_k > max_top_k:
        raise InvalidTopK(f"top_k is {top_k}, and this service allows at most {max_top_k}.")
    return top_k
