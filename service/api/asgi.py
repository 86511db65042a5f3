"""The layers that every request passes where it arrives, and the short ways to `/predict`."""

from typing import Final
from uuid import uuid4

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from service.api.middleware import Observe, RequireKey, error_answer
from service.api.paths import MANAGEMENT, PREDICT
from service.api.predict import PredictEndpoint
from service.api.quick import Quick
from service.errors import BadRequest, NotFound
from service.lifecycle import Service

EXPOSED_HEADERS: Final = ["X-Request-Id", "Server-Timing", "Retry-After"]


class Cors(CORSMiddleware):
    """Starlette's, but what it refuses is an error like all others."""

    def preflight_response(self, request_headers: Headers) -> Response:
        """Answer a preflight."""
        response = super().preflight_response(request_headers)
        if response.status_code < 400:
            return response
        request_id = uuid4().hex
        headers, body = error_answer(BadRequest(f"{bytes(response.body).decode()}."), request_id)
        own = dict(response.headers) | {name.decode(): value.decode() for name, value in headers}
        return Response(body, response.status_code, own | {"x-request-id": request_id})


class Entry:
    """The application behind a socket.

    Args:
        front: the service.
        predict: answers POST /predict.
        others: answers all other requests, and asks for their keys.

    Attributes:
        quick: for the connections; None where every request has to pass the layers.
    """

    def __init__(self, front: Service, predict: PredictEndpoint, others: ASGIApp) -> None:
        settings = front.settings
        self._has_management_port = settings.management_port is not None
        keys = settings.client_keys()
        self._predict = RequireKey(predict, keys, ()) if keys else predict
        self._others = others
        observe = Observe(self._dispatch, front)
        self._app: ASGIApp = observe
        if settings.cors_origins:  # outermost: a browser must be able to read errors too
            self._app = Cors(
                observe,
                allow_origins=settings.cors_origins,
                allow_methods=["GET", "POST"],
                allow_headers=["*"],
                expose_headers=EXPOSED_HEADERS,
            )
        is_seen = bool(settings.cors_origins) or settings.access_log
        self.quick = None if is_seen else Quick(front, predict, observe)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request, or the lifespan."""
        await self._app(scope, receive, send)

    async def _dispatch(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._has_management_port and scope["type"] == "http":
            check_port(scope["path"], is_management=scope["state"]["is_management"])
        if scope["type"] == "http" and scope["path"] == PREDICT and scope["method"] == "POST":
            await self._predict(scope, receive, send)
        else:
            await self._others(scope, receive, send)


def check_port(path: str, *, is_management: bool) -> None:
    """Raise NotFound where a path is asked for on the other port."""
    if (path in MANAGEMENT) != is_management:
        there = "client" if is_management else "management"
        raise NotFound(f"There is nothing at this path of this port; the {there} port may have it.")
