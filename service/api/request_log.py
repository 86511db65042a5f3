"""What is recorded of every request: its id, its count, its line in the access log, and its error."""

import itertools
import logging
import os
import re
from asyncio import CancelledError
from typing import Final

from service.api.paths import INFERENCE, known_path
from service.api.response import Headers
from service.errors import Draining, ServiceError
from service.lifecycle import Service

logger = logging.getLogger(__name__)
access_logger = logging.getLogger("service.access")

# Bounded, because it becomes a header, a log field and an exemplar; OpenMetrics allows an exemplar 128 characters.
REQUEST_ID: Final = re.compile(rb"[A-Za-z0-9._-]{1,64}", re.ASCII)


class RequestLog:
    """Records the requests of one process."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._has_access_log = service.settings.access_log
        self._prefix = os.urandom(6).hex()
        self._numbers = itertools.count(1)

    def request_id(self, headers: Headers) -> str:
        """Return the id that a client gave its request, or a new one."""
        for name, value in headers:
            if name == b"x-request-id" and REQUEST_ID.fullmatch(value):
                return value.decode()
        return f"{self._prefix}-{next(self._numbers)}"

    def public_error(self, error: BaseException, request_id: str, *, is_counted: bool = False) -> ServiceError:
        """Return what a client is told of an error; log it where the service is to blame, and count it unless it is."""
        extra = {"request_id": request_id}
        public = error if isinstance(error, ServiceError) else ServiceError()
        if isinstance(error, CancelledError) and self._service.draining:
            public = Draining()
        elif not isinstance(error, ServiceError):
            logger.error("request %s failed", request_id, exc_info=error, extra=extra)
        elif error.status == ServiceError.status:
            logger.error("request %s: %s", request_id, error.message, extra=extra)
        if not is_counted:
            self._service.metrics.rejected(public.code)
        return public

    def finished(self, method: str, path: str, status: int, seconds: float, request_id: str) -> None:
        """Count a request, and write its line."""
        metrics = self._service.metrics
        route = known_path(path)
        metrics.request(route, status)
        if route in INFERENCE:
            metrics.predicted(seconds, request_id)
        if self._has_access_log:
            extra = {"request_id": request_id, "status": status, "milliseconds": round(seconds * 1000, 3)}
            access_logger.info("%s %s %d", method, path, status, extra=extra)
