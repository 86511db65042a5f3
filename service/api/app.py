"""The application: which request goes where, CORS, errors in one shape, and the lifespan."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import PackageNotFoundError, version
from time import perf_counter
from typing import Any, Final
from uuid import uuid4

from fastapi import FastAPI, Request, Response
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.api.embed import EmbedEndpoint
from service.api.endpoint import InferenceEndpoint
from service.api.explain import ExplainEndpoint
from service.api.keys import RequireKey
from service.api.paths import EMBED, EXPLAIN, MANAGEMENT, PATHS, PREDICT, is_infer, is_keyed_v2, known_path
from service.api.predict import PredictEndpoint
from service.api.request_log import RequestLog
from service.api.response import error_response
from service.api.routes import create_router
from service.api.schemas import SECURITY, SECURITY_SCHEMES, error_schemas
from service.api.v2.request import InferEndpoint
from service.api.v2.routes import create_v2_router
from service.api.web_page import page_routes
from service.errors import BadRequest, ClientDisconnected, MethodNotAllowed, NotFound, ServiceError
from service.lifecycle import Service

DESCRIPTION = "Send an image, get its label. Errors are one JSON shape with a stable code."
EXPOSED_HEADERS: Final = ["X-Request-Id", "Server-Timing", "Retry-After", "Inference-Header-Content-Length"]


class Cors(CORSMiddleware):
    """Starlette's, but what it refuses is an error like all others."""

    def preflight_response(self, request_headers: Headers) -> Response:
        """Answer a preflight."""
        response = super().preflight_response(request_headers)
        if response.status_code < 400:
            return response
        error = error_response(BadRequest(f"{bytes(response.body).decode()}."), uuid4().hex)
        headers = dict(response.headers) | {name.decode(): value.decode() for name, value in error.headers}
        return Response(error.body, error.status, headers)


class PerceiverApp(FastAPI):
    """FastAPI for all routes but those for inference, which its router only describes.

    FastAPI's layers and routing cost as much CPU a request as the decoding of a small image, and do nothing for an
    endpoint that is an ASGI application itself.

    Attributes:
        predict: answers POST /predict; the server gives it small requests without ASGI.
    """

    def __init__(self, service: Service) -> None:
        self._log = RequestLog(service)
        self.predict = PredictEndpoint(service, self._log)
        self._document: tuple[int | None, bytes] | None = None
        self._infer = InferEndpoint(service, self._log)
        self._inference: dict[str, InferenceEndpoint] = {
            PREDICT: self.predict,
            EXPLAIN: ExplainEndpoint(service, self._log),
            EMBED: EmbedEndpoint(service, self._log),
        }
        super().__init__(
            title="Perceiver image classifier",
            description=DESCRIPTION,
            version=package_version(),
            lifespan=lifespan,
            routes=[
                # FastAPI's own route to the document encodes it anew for each request.
                Route("/openapi.json", self._answer_openapi),
                *(page_routes() if service.settings.web_page else ()),
            ],
            exception_handlers={HTTPException: answer_error, ServiceError: answer_error, Exception: answer_error},
            telemetry={"tracing": False, "metrics": False, "logs": False},
            redirect_slashes=False,
            docs_url=None,
            redoc_url=None,
        )
        self.state.service = service
        self.include_router(create_router(service))
        self.include_router(create_v2_router(service, package_version()))
        settings = service.settings
        keys, admin_keys = settings.client_keys(), settings.administrator_keys()
        self._asks_clients, self._asks_administrators = bool(keys), bool(admin_keys)
        self._routes = RequireKey(super().__call__, keys, admin_keys)
        self._has_management_port = settings.management_port is not None
        self._entry: ASGIApp = self._dispatch
        if settings.cors_origins:  # outermost: a browser must be able to read errors too
            self._entry = Cors(
                self._dispatch,
                allow_origins=settings.cors_origins,
                allow_methods=["GET", "POST"],
                allow_headers=["*"],
                expose_headers=EXPOSED_HEADERS,
            )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection's request, or the lifespan."""
        await self._entry(scope, receive, send)

    async def _dispatch(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._routes(scope, receive, send)
        elif scope["method"] != "POST" or scope["state"]["is_management"]:
            await self._observed(scope, receive, send)
        elif (endpoint := self._inference.get(scope["path"])) is not None:
            await endpoint(scope, receive, send)
        elif is_infer(scope["path"]):
            await self._infer(scope, receive, send)
        else:
            await self._observed(scope, receive, send)

    async def _observed(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request with an id, a count, and errors in one shape."""
        began = perf_counter()
        scope["state"]["request_id"] = request_id = self._log.request_id(scope["headers"])
        status = 0
        method: str = scope["method"]
        path: str = scope["path"]

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if not any(name == b"x-request-id" for name, _ in message["headers"]):
                    message["headers"].append((b"x-request-id", request_id.encode()))
            await send(message)

        try:
            if not path.isprintable():  # "/models\n" would match the route "/models", but no keyed path
                path = ascii(path)
                raise NotFound()
            if self._has_management_port:
                check_port(path, is_management=scope["state"]["is_management"])
            if method == "HEAD":  # as some load balancers probe; the connection sends no body then
                scope = {**scope, "method": "GET"}
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
            self._log.finished(method, path, status, perf_counter() - began, request_id)

    def openapi(self) -> dict[str, Any]:
        """Return the OpenAPI document."""
        document = super().openapi()
        settings = self.state.service.settings
        classes = self._classes()
        max_top_k = settings.max_top_k if classes is None else min(classes, settings.max_top_k)
        operation = document["paths"][PREDICT]["post"]
        (top_k,) = [one for one in operation["parameters"] if one["name"] == "top_k"]
        top_k["schema"] |= {"maximum": max_top_k, "default": min(5, max_top_k)}
        document["components"]["securitySchemes"] = SECURITY_SCHEMES
        document["components"]["schemas"] |= error_schemas()
        if self._asks_clients:
            keyed = [
                path for path in document["paths"] if path in (PREDICT, EXPLAIN, EMBED, "/models") or is_keyed_v2(path)
            ]
            for operation in (one for path in keyed for one in document["paths"][path].values()):
                operation["security"] = SECURITY
        if self._asks_administrators:
            document["paths"]["/models/reload"]["post"]["security"] = SECURITY
        return document

    def _classes(self) -> int | None:
        live = self.state.service.store.live
        return None if live is None else len(live.metadata.labels)

    async def _answer_openapi(self, request: Request) -> Response:
        """Answer with the document, which is written once for each number of classes."""
        classes = self._classes()
        if self._document is None or self._document[0] != classes:
            self._document = (classes, json.dumps(self.openapi()).encode())
        return Response(self._document[1], media_type="application/json")


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Run the service as long as the server runs."""
    app.state.service.start()
    try:
        yield
    finally:
        await app.state.service.stop()


async def answer_error(request: Request, exception: Exception) -> Response:
    """Bring what FastAPI's routes and router raise into the shape of all errors."""
    headers = {}
    if isinstance(exception, ServiceError):
        error = exception
    elif isinstance(exception, HTTPException):
        error = router_error(exception.status_code, request.scope["path"])
        headers = dict(exception.headers or {})
        if "GET" in headers.get("Allow", ""):  # where a path has GET, HEAD is answered too
            headers["Allow"] = "GET, HEAD"
    else:
        error = ServiceError()
    request.app.state.service.metrics.rejected(error.code)
    response = error_response(error, request.state.request_id, request.scope["path"])
    headers |= {name.decode(): value.decode() for name, value in response.headers}
    return Response(response.body, response.status, headers)


def router_error(status: int, path: str) -> ServiceError:
    """Return what is said of a request that no route takes."""
    if status == 405:
        return MethodNotAllowed()
    if status != 404:
        return BadRequest()
    if (meant := "/" + path.strip("/").lower()) in PATHS and meant != path:  # a page that is off has its path
        return NotFound(f"There is nothing at {path[:80]}; the path is {meant}.")
    return NotFound()


def package_version() -> str:
    """Return the installed version; a checkout that was never installed has none."""
    try:
        return version("perceiver-service")
    except PackageNotFoundError:
        return "0"


def check_port(path: str, *, is_management: bool) -> None:
    """Raise NotFound where a path is asked for on the other port."""
    if (known_path(path) in MANAGEMENT) != is_management:
        there = "client" if is_management else "management"
        raise NotFound(f"There is nothing at this path of this port; the {there} port may have it.")
