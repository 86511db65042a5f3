"""The messages between processes, made of what each works with, and made into it again."""

import asyncio
import logging
from collections.abc import Iterable, Iterator
from itertools import groupby
from operator import attrgetter

import numpy as np
from starlette.types import Message as AsgiMessage
from starlette.types import Scope

from service import errors
from service.errors import ServiceError, Unavailable
from service.fair_queue import Prediction
from service.messages import Answered, Call, Headers, Refused
from service.outputs import Outputs

logger = logging.getLogger(__name__)


def call_of(number: int, scope: Scope) -> Call:
    """Put a request into a message."""
    return Call(
        number,
        request_id=scope["state"]["request_id"],
        method=scope["method"],
        path=scope["path"],
        raw_path=scope["raw_path"],
        query=scope["query_string"],
        headers=scope["headers"],
    )


def scope_of(message: Call) -> Scope:
    """Return the ASGI scope of a request."""
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "scheme": "http",
        "server": None,
        "client": None,
        "root_path": "",
        "method": message.method,
        "path": message.path,
        "raw_path": message.raw_path,
        "query_string": message.query,
        "headers": message.headers,
        "state": {"request_id": message.request_id},
    }


def pack(answers: Iterable[tuple[int, list[Prediction]]]) -> Answered:
    """Put the answers to some requests, of models with the same number of classes, into a message."""
    message = Answered()
    together: list[Prediction] = []
    for number, predictions in answers:
        message.numbers.append(number)
        message.pictures.append(len(predictions))
        together += predictions
    message.queue_seconds = [prediction.queue_seconds for prediction in together]
    for outputs, grouped in groupby(together, key=attrgetter("outputs")):
        run = list(grouped)
        message.runs.append((len(run), run[0].inference_seconds, run[0].batch_size))
        message.logits.append(outputs.logits[[prediction.row for prediction in run]].tobytes())
    return message


def unpack(message: Answered) -> Iterator[tuple[int, list[Prediction]]]:
    """Yield the answers in a message, each with the number of its request."""
    queued = message.queue_seconds
    logits = np.frombuffer(b"".join(message.logits), dtype=np.float32)
    outputs = Outputs(logits.reshape(len(queued), -1))
    predictions: list[Prediction] = []
    for pictures, seconds, size in message.runs:
        row = len(predictions)
        predictions += [Prediction(outputs, i, queued[i], seconds, size) for i in range(row, row + pictures)]
    start = 0
    for number, count in zip(message.numbers, message.pictures, strict=True):
        yield number, predictions[start : start + count]
        start += count


def refusal(number: int, error: Exception) -> Refused:
    """Say in a message what went wrong; of what is no answer of the API, only that."""
    if not isinstance(error, ServiceError):
        logger.error("a request failed", exc_info=error)
        error = ServiceError()
    retry_after = error.retry_after if isinstance(error, Unavailable) else 0.0
    return Refused(number, type(error).__name__, error.message, retry_after)


def error_of(message: Refused) -> ServiceError:
    """Return the error that was raised in the other process."""
    kind: type[ServiceError] = getattr(errors, message.error)
    error = kind(message.message)
    if isinstance(error, Unavailable):
        error.retry_after = message.retry_after
    return error


class Recorded:
    """The ASGI channels of a request without a body, and what was answered.

    Attributes:
        status: 0 until the answer begins.
        headers: of the answer.
        body: of the answer, in pieces.
    """

    def __init__(self) -> None:
        self.status = 0
        self.headers: Headers = []
        self.body: list[bytes] = []
        self._is_read = False

    async def receive(self) -> AsgiMessage:
        """Give the empty body; after that, nothing comes."""
        if self._is_read:
            await asyncio.Event().wait()
        self._is_read = True
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(self, message: AsgiMessage) -> None:
        """Keep a part of the answer."""
        if message["type"] == "http.response.start":
            self.status, self.headers = message["status"], list(message["headers"])
        else:
            self.body.append(message.get("body", b""))
