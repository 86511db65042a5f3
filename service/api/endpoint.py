"""What the endpoints for inference share: keys, the log, and ASGI as a driver of their requests."""

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, Final

from starlette.types import Receive, Scope, Send

from service.api.request import InferenceRequest, Respond
from service.api.request_log import RequestLog
from service.api.response import Headers, Response
from service.errors import Draining
from service.lifecycle import Service

FAULT: Final = "perceiver.fault"  # in a message of type http.disconnect: the client is there, and this is wrong


class InferenceEndpoint(ABC):
    """Makes and drives the requests of one kind.

    Attributes:
        service: of this process.
        log: records the requests.
        keys: one of which a request must have; none: open to all.
    """

    def __init__(self, service: Service, log: RequestLog) -> None:
        self.service = service
        self.log = log
        self.keys = [key.encode() for key in service.settings.client_keys()]

    @abstractmethod
    def request(self, path: str, headers: Headers, query: bytes, respond: Respond) -> InferenceRequest:
        """Return the request of a POST's head."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Drive one request by ASGI."""
        answered = asyncio.Event()
        responses: list[Response | None] = []

        def respond(response: Response | None) -> None:
            responses.append(response)
            answered.set()

        request = self.request(scope["path"], scope["headers"], scope["query_string"], respond)
        request.start()
        reading = None if responses else asyncio.create_task(read(request, receive))
        try:
            await answered.wait()
        except asyncio.CancelledError:
            request.fail(Draining())
        finally:
            if reading is not None:
                reading.cancel()
        if (response := responses.pop()) is not None:
            await send({"type": "http.response.start", "status": response.status, "headers": response.headers})
            await send({"type": "http.response.body", "body": response.body})


async def read(request: InferenceRequest, receive: Callable[[], Awaitable[MutableMapping[str, Any]]]) -> None:
    """Give a request its body as it comes; then watch whether its client leaves."""
    is_whole = False
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            fault = message.get(FAULT)
            request.cancel() if fault is None else request.fail(fault)
            return
        if not is_whole:
            request.receive(message.get("body", b""))
            if not message.get("more_body", False):
                is_whole = True
                request.run()
