"""The ASGI application: which request goes where, CORS, and what every other route's request passes."""

import asyncio
from time import perf_counter
from typing import Final
from uuid import uuid4

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response as StarletteResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.api.paths import MANAGEMENT, PREDICT, is_infer
from service.api.predict import PredictEndpoint
from service.api.request_log import RequestLog
from service.api.response import error_response
from service.api.v2.request import InferEndpoint
from service.errors import BadRequest, ClientDisconnected, NotFound
from service.settings import Settings

EXPOSED_HEADERS: Final = ["X-Request-Id", "Server-Timing", "Retry-After"]


class Cors(CORSMiddleware):
    """Starlette's, but what it refuses is an error like all others."""

    def preflight_response(self, request_headers: Headers) -> StarletteResponse:
        """Answer a preflight."""
        response = super().preflight_response(request_headers)
        if response.status_code < 400:
            return response
        error = error_response(BadRequest(f"{bytes(response.body).decode()}."), uuid4().hex)
        headers = dict(response.headers) | {name.decode(): value.decode() for name, value in error.headers}
        return StarletteResponse(error.body, error.status, headers)


class Asgi:
    """Sends requests for inference to their endpoints and the rest to FastAPI.

    FastAPI's layers and routing cost as much CPU a request as the decoding of a small image, and do nothing for an
    endpoint that is an ASGI application itself.

    Args:
        settings: of the service.
        predict: answers POST /predict.
        infer: answers requests for inference by the protocol v2.
        routes: answers all other requests.
        log: records these.
    """

    def __init__(
        self, settings: Settings, predict: PredictEndpoint, infer: InferEndpoint, routes: ASGIApp, log: RequestLog
    ) -> None:
        self._has_management_port = settings.management_port is not None
        self._predict = predict
        self._infer = infer
        self._routes = routes
        self._log = log
        self._app: ASGIApp = self._dispatch
        if settings.cors_origins:  # outermost: a browser must be able to read errors too
            self._app = Cors(
                self._dispatch,
                allow_origins=settings.cors_origins,
                allow_methods=["GET", "POST"],
                allow_headers=["*"],
                expose_headers=EXPOSED_HEADERS,
            )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request, or the lifespan."""
        await self._app(scope, receive, send)

    async def _dispatch(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._routes(scope, receive, send)
        elif scope["path"] == PREDICT and scope["method"] == "POST" and not scope["state"]["is_management"]:
            await self._predict(scope, receive, send)
        elif is_infer(scope["path"]) and scope["method"] == "POST" and not scope["state"]["is_management"]:
            await self._infer(scope, receive, send)
        else:
            await self._observed(scope, receive, send)

    async def _observed(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request with an id, a count, and errors in one shape."""
        began = perf_counter()
        scope["state"]["request_id"] = request_id = self._log.request_id(scope["headers"])
        status = 0
        path: str = scope["path"]

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if not any(name == b"x-request-id" for name, _ in message["headers"]):
                    message["headers"].append((b"x-request-id", request_id.encode()))
            await send(message)

        try:
            if (
                not path.isprintable()
            ):  # "/models\n" would match the route of "/models", but not the list of keyed paths
                path = ascii(path)
                raise NotFound()
            if self._has_management_port:
                check_port(path, is_management=scope["state"]["is_management"])
            await self._routes(scope, receive, send_with_id)
        except (Exception, asyncio.CancelledError) as error:
            # FastAPI has answered, and counted, what its own routes raise.
            public = self._log.public_error(error, request_id, is_counted=bool(status))
            if not status:
                response = error_response(public, request_id, path)
                head = {"type": "http.response.start", "status": response.status, "headers": response.headers}
                await send_with_id(head)
                if not isinstance(error, ClientDisconnected):
                    await send({"type": "http.response.body", "body": response.body})
        finally:
            self._log.finished(scope["method"], path, status, perf_counter() - began, request_id)


def check_port(path: str, *, is_management: bool) -> None:
    """Raise NotFound where a path is asked for on the other port."""
    if (path in MANAGEMENT) != is_management:
        there = "client" if is_management else "management"
        raise NotFound(f"There is nothing at this path of this port; the {there} port may have it.")
