"""The heads of requests: how they are bounded, what HTTP wants of them, and what the application is told of them."""

import re
from collections.abc import Iterable
from functools import lru_cache
from typing import Any, Final
from urllib.parse import unquote

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from service.errors import BadRequest, HeadersTooLarge, ServiceError, UnsupportedTransferCoding

MAX_HEADER_BYTES: Final = 64 * 1024
MAX_HEADER_LINES: Final = 128  # each takes some 150 bytes of memory beside its own, however short it is
NAME: Final = rb"(?:[A-Za-z0-9._~!$&'()*+,;=-]|%[0-9A-Fa-f]{2})*"  # RFC 3986, section 3.2.2; it may be empty
LITERAL: Final = rb"\[[A-Za-z0-9._~!$&'()*+,;=:%-]+\]"  # an IPv6 address, as a rule
HOST: Final = re.compile(rb"(?:%b|%b)(?::[0-9]*)?" % (NAME, LITERAL))


def fault_of(version: str, headers: Iterable[tuple[bytes, bytes]]) -> ServiceError | None:
    """Return what HTTP forbids of a head that its parser lets pass; None where there is nothing.

    A proxy in front of this service may read such a request otherwise than this service does.
    """
    if version not in ("1.0", "1.1"):
        return BadRequest("The service speaks HTTP/1.1 and HTTP/1.0.")
    hosts, codings = [], []
    for name, value in headers:
        if name == b"host":
            hosts.append(value)
        elif name == b"transfer-encoding":
            codings += value.split(b",")
    if len(hosts) != 1 and (hosts or version != "1.0"):  # RFC 9112, section 3.2
        return BadRequest(f"The request has {len(hosts)} headers Host; it must have one.")
    if hosts and not is_host(hosts[0]):
        return BadRequest("The header Host must be a name or an address, and may have a port.")
    if len(codings) > 1:  # a single one that is not chunked is the parser's affair, as one behind chunked is
        return UnsupportedTransferCoding()
    return None


@lru_cache(maxsize=128)  # clients send the same few
def is_host(value: bytes) -> bool:
    """Whether a Host header is a name or an address, with or without a port."""
    return HOST.fullmatch(value) is not None


def size_of_head(url: bytes, headers: Iterable[tuple[bytes, bytes]]) -> int:
    """Return the bytes of a head that its client chose."""
    return len(url) + sum(len(name) + len(value) for name, value in headers)


def too_large() -> ServiceError:
    """Return what is said of a head beyond the limits."""
    return HeadersTooLarge(f"The headers are larger than {MAX_HEADER_BYTES} bytes, or more than {MAX_HEADER_LINES}.")


def request_scope(connection: HttpToolsProtocol, headers: list[tuple[bytes, bytes]]) -> dict[str, Any]:
    """Return the ASGI scope of the request whose head a connection has just read, as uvicorn makes it.

    Raises:
        httptools.HttpParserError: its URL is none.
    """
    url = httptools.parse_url(connection.url)
    raw_path = url.path or b"/"  # http://host and http://host?query have none
    path = raw_path.decode("ascii")
    return {
        "type": "http",
        "asgi": {"version": connection.asgi_version, "spec_version": "2.3"},
        "http_version": connection.parser.get_http_version(),
        "server": connection.server,
        "client": connection.client,
        "scheme": connection.scheme,
        "root_path": connection.root_path,
        "headers": headers,
        "state": connection.app_state.copy(),
        "method": connection.parser.get_method().decode("ascii"),
        "path": unquote(path) if "%" in path else path,
        "raw_path": raw_path,
        "query_string": url.query or b"",
    }


def head_without_upgrade(method: bytes, url: bytes, version: str, headers: Iterable[tuple[bytes, bytes]]) -> bytes:
    """Return the head of a request that asked for another protocol, without the asking.

    A server may ignore it (RFC 9110, section 7.8), and must read the body then. The parser does not: for it, HTTP ends
    with such a head.
    """
    lines = [b"%b %b HTTP/%b" % (method, url, version.encode())]
    lines += [b"%b: %b" % header for header in headers if header[0] != b"upgrade"]
    return b"\r\n".join(lines) + b"\r\n\r\n"
