"""What every request passes: its id, its count, its key, and the one place where errors become HTTP.

Pure ASGI: behind `@app.middleware("http")` a client's disconnect would never be seen.
"""

import asyncio
import itertools
import json
import logging
import math
import os
import re
from hmac import compare_digest
from time import perf_counter
from typing import Final

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.api.paths import PREDICT, known_path
from service.errors import (
    ClientDisconnected,
    Draining,
    NotFound,
    ReloadDisabled,
    ServiceError,
    Unauthorized,
    Unavailable,
)
from service.lifecycle import Service

logger = logging.getLogger(__name__)
access_logger = logging.getLogger("service.access")

# Bounded, because it becomes a header, a log field and an exemplar; OpenMetrics allows an exemplar 128 characters.
REQUEST_ID: Final = re.compile(rb"[A-Za-z0-9._-]{1,64}", re.ASCII)
RELOAD: Final = ("POST", "/models/reload")
KEYED: Final = frozenset({("POST", PREDICT), ("GET", "/models"), ("HEAD", "/models")})

Headers = list[tuple[bytes, bytes]]


class Observe:
    """The outermost layer: request ids, metrics, the access log, and errors to JSON."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self.app = app
        self.service = service
        self._prefix = os.urandom(6).hex()
        self._numbers = itertools.count(1)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = perf_counter()
        request_id = self.request_id(scope["headers"])
        scope["state"]["request_id"] = request_id
        status = 0
        path: str = scope["path"]

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"].append((b"x-request-id", request_id.encode()))
                if self.service.closes_connections:
                    message["headers"].append((b"connection", b"close"))
            await send(message)

        try:
            if (
                not path.isprintable()
            ):  # "/models\n" would match the route of "/models", but not the list of keyed paths
                path = ascii(path)
                raise NotFound()
            await self.app(scope, receive, send_with_id)
        except (Exception, asyncio.CancelledError) as error:
            told = self.told(error, request_id)
            if not status:  # FastAPI has answered, and counted, for its own routes
                self.service.metrics.rejected(told.code)
                await send_error(send_with_id, told, request_id)
            del told  # it may be `error`, whose traceback holds this frame: a cycle for the collector
        finally:
            seconds = perf_counter() - started
            self.service.metrics.request(known_path(path), status)
            if path == PREDICT:
                self.service.metrics.predicted(seconds, request_id)
            if self.service.settings.access_log:
                extra = {"request_id": request_id, "status": status, "milliseconds": round(seconds * 1000, 3)}
                access_logger.info("%s %s %d", scope["method"], path, status, extra=extra)

    def request_id(self, headers: Headers) -> str:
        """Return the id that a client gave its request, or a new one."""
        for name, value in headers:
            if name == b"x-request-id" and REQUEST_ID.fullmatch(value):
                return value.decode()
        return f"{self._prefix}-{next(self._numbers)}"

    def told(self, error: BaseException, request_id: str) -> ServiceError:
        """Return what a client is told of an error; log it where the service is to blame."""
        extra = {"request_id": request_id}
        if isinstance(error, asyncio.CancelledError) and self.service.draining:
            return Draining()
        if not isinstance(error, ServiceError):
            logger.error("request %s failed", request_id, exc_info=error, extra=extra)
            return ServiceError()
        if error.status == ServiceError.status:
            logger.error("request %s: %s", request_id, error.message, extra=extra)
        return error


class RequireKey:
    """Asks for a key where the settings have one: API keys for predictions and models, the admin key for reloading."""

    def __init__(self, app: ASGIApp, keys: tuple[str, ...], admin_keys: tuple[str, ...]) -> None:
        self.app = app
        self.keys = [key.encode() for key in keys]
        self.admin_keys = [key.encode() for key in admin_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or raise ReloadDisabled or Unauthorized."""
        if scope["type"] == "http":
            asked = (scope["method"], scope["path"])
            if asked == RELOAD:
                if not self.admin_keys:
                    raise ReloadDisabled()
                check_key(scope["headers"], self.admin_keys)
            elif self.keys and asked in KEYED:
                check_key(scope["headers"], self.keys)
        await self.app(scope, receive, send)


def check_key(headers: Headers, keys: list[bytes]) -> None:
    """Raise Unauthorized unless the headers hold one of the keys; every key is compared, in constant time."""
    given = [value for name, value in headers if name == b"x-api-key"]
    given += [
        value[7:].strip() for name, value in headers if name == b"authorization" and value[:7].lower() == b"bearer "
    ]
    if not sum(compare_digest(one, key) for one in given for key in keys):  # a sum looks at all of them
        raise Unauthorized()


def error_answer(error: ServiceError, request_id: str) -> tuple[Headers, bytes]:
    """Return the headers of an error's answer and its body, the JSON of `ErrorResponse`."""
    content = {"error": {"code": error.code, "message": error.message, "request_id": request_id}}
    body = json.dumps(content).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    if isinstance(error, Unavailable):
        headers.append((b"retry-after", b"%d" % max(1, math.ceil(error.retry_after))))
    if isinstance(error, Unauthorized):
        headers.append((b"www-authenticate", b"Bearer"))
    return headers, body


async def send_error(send: Send, error: ServiceError, request_id: str) -> None:
    """Answer with an error; a client that has left gets nothing, but is counted."""
    headers, body = error_answer(error, request_id)
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    if not isinstance(error, ClientDisconnected):
        await send({"type": "http.response.body", "body": body})
