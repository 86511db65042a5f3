"""uvicorn, run from here: supervision of the service, and a drain that tells the load balancer first.

uvicorn alone stops listening at SIGTERM: a probe sees a refused connection and not `draining`. Here new requests
are told 503 and accepted ones finish; then uvicorn stops, and only then the lifespan ends.
"""

import gc
import logging
import math
import time
from types import FrameType

import uvicorn
from fastapi import FastAPI
from prometheus_client import disable_created_metrics

from service.app import create_app
from service.protocol import BoundedConfig, BoundedProtocol, ConnectionClock
from service.settings import Settings
from service.state import Service

logger = logging.getLogger(__name__)

YOUNG_OBJECTS = 20_000


class Server(uvicorn.Server):
    """Serves until it is told to stop or the service has failed.

    Attributes:
        failed: whether it ended because the service can't go on.
    """

    def __init__(self, config: BoundedConfig) -> None:
        super().__init__(config)
        self.service: Service = config.service
        self.failed = False
        self._drain_until = math.inf
        self._settled = False

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Start to drain; at a second signal, stop at once."""
        if self.service.draining:
            self.force_exit = True
            super().handle_exit(sig, frame)
        else:
            self.service.draining = True
            self._drain_until = time.monotonic() + self.service.settings.drain_timeout_s
            logger.info("draining: %d requests are being answered", self.service.in_flight)

    async def startup(self, sockets: object = None) -> None:
        """Listen, and say where."""
        await super().startup()
        scheme = "https" if self.config.is_ssl else "http"
        for server in self.servers:
            for socket in server.sockets:
                host, port = socket.getsockname()[:2]
                logger.info("listening on %s://%s:%d", scheme, f"[{host}]" if ":" in host else host, port)

    async def on_tick(self, counter: int) -> bool:
        """Look ten times a second whether it is time to end."""
        if await super().on_tick(counter):
            return True
        if self.service.failure:
            logger.critical("%s", self.service.failure)
            self.failed = True
            self.config.timeout_graceful_shutdown = 1
            return True
        if not self._settled and self.service.status == "ready":
            self._settled = True
            # What was loaded stays: collections look at requests alone, and seldom, since those free themselves.
            gc.collect()
            gc.freeze()
            gc.set_threshold(YOUNG_OBJECTS)
        if not self.service.draining:
            return False
        left = self._drain_until - time.monotonic()
        self.config.timeout_graceful_shutdown = max(1, math.ceil(left))
        return self.service.in_flight == 0 or left <= 0


def configuration(app: FastAPI, service: Service) -> BoundedConfig:
    """Return uvicorn's configuration."""
    settings = service.settings
    config = BoundedConfig(
        app,
        host=settings.host,
        port=settings.port,
        http=BoundedProtocol,
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=settings.keep_alive_s,
        ssl_certfile=settings.tls_cert,
        ssl_keyfile=settings.tls_key,
    )
    config.service = service
    config.clock = ConnectionClock()
    return config


def run(settings: Settings) -> int:
    """Serve until the end; return the process's exit status."""
    # A second series for each counter and histogram, which nobody queries.
    disable_created_metrics()  # type: ignore[no-untyped-call]
    app = create_app(settings)
    config = configuration(app, app.state.service)
    try:
        config.load()
    except OSError as error:  # ssl.SSLError is one
        logger.critical("the TLS files can't be used: %s", error)
        return 1
    server = Server(config)
    try:
        server.run()
    except SystemExit:  # uvicorn could not listen, and has said why
        return 1
    except KeyboardInterrupt:  # a second Ctrl-C
        return 130
    return 1 if server.failed else 0
