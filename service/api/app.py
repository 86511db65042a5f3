"""The application: lifespan and wiring, nothing else."""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from service.api.asgi import Asgi
from service.api.keys import RequireKey
from service.api.paths import PATHS, PREDICT, is_keyed_v2
from service.api.predict import PredictEndpoint
from service.api.request_log import RequestLog
from service.api.response import error_response
from service.api.routes import create_router
from service.api.schemas import SECURITY, SECURITY_SCHEMES
from service.api.v2.request import InferEndpoint
from service.api.v2.routes import create_v2_router
from service.errors import BadRequest, MethodNotAllowed, NotFound, ServiceError
from service.lifecycle import Service

DESCRIPTION = "Send an image, get its label. Errors are one JSON shape with a stable code."


class PerceiverApp(FastAPI):
    """FastAPI for all routes but `/predict`, which its router only describes.

    Attributes:
        predict: answers POST /predict; the server gives it small requests without ASGI.
    """

    def __init__(self, service: Service) -> None:
        log = RequestLog(service)
        self.predict = PredictEndpoint(service, log)
        self._document: tuple[int | None, bytes] | None = None
        infer = InferEndpoint(service, log)
        super().__init__(
            title="Perceiver image classifier",
            description=DESCRIPTION,
            version=package_version(),
            lifespan=lifespan,
            # FastAPI's own route to the document encodes it anew for each request.
            routes=[Route("/openapi.json", self._answer_openapi)],
            exception_handlers={HTTPException: answer_error, ServiceError: answer_error, Exception: answer_error},
            telemetry={"tracing": False, "metrics": False, "logs": False},
            redirect_slashes=False,
            redoc_url=None,
            swagger_ui_oauth2_redirect_url=None,
        )
        self.state.service = service
        self.include_router(create_router(service))
        self.include_router(create_v2_router(service, package_version()))
        settings = service.settings
        keys, admin_keys = settings.client_keys(), settings.administrator_keys()  # files are read once
        self._asks_clients, self._asks_administrators = bool(keys), bool(admin_keys)
        routes = RequireKey(super().__call__, keys, admin_keys)
        self._asgi = Asgi(settings, self.predict, infer, routes, log)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection's request, or the lifespan."""
        await self._asgi(scope, receive, send)

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
        if self._asks_clients:
            keyed = [path for path in document["paths"] if path in (PREDICT, "/models") or is_keyed_v2(path)]
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
        if "GET" in headers.get("Allow", ""):  # the router names the methods of one route; HEAD has its own at a path
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
    if (meant := "/" + path.strip("/").lower()) in PATHS:
        return NotFound(f"There is nothing at {path[:80]}; the path is {meant}.")
    return NotFound()


def package_version() -> str:
    """Return the installed version; a checkout that was never installed has none."""
    try:
        return version("perceiver-service")
    except PackageNotFoundError:
        return "0"
