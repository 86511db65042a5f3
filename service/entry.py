"""The layers that every request passes where it arrives, and the short way to `/predict`."""

from typing import Final

from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from service.front import Front
from service.middleware import Observe, RequireKey
from service.predict import PredictEndpoint

PREDICT: Final = "/predict"
EXPOSED_HEADERS: Final = ["X-Request-Id", "Server-Timing", "Retry-After"]


def entry(front: Front, predict: PredictEndpoint, others: ASGIApp) -> ASGIApp:
    """Return the application behind a socket.

    Args:
        front: the service.
        predict: answers POST /predict.
        others: answers all other requests, and asks for their keys.
    """
    settings = front.settings
    keys = settings.client_keys()
    keyed = RequireKey(predict, keys, None) if keys else predict

    async def dispatch(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] == PREDICT and scope["method"] == "POST":
            await keyed(scope, receive, send)
        else:
            await others(scope, receive, send)

    app: ASGIApp = Observe(dispatch, front)
    if settings.cors_origins:  # outermost: a browser must be able to read errors too
        app = CORSMiddleware(
            app,
            allow_origins=settings.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=EXPOSED_HEADERS,
        )
    return app
