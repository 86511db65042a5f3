"""uvicorn, run from here: supervision of the service, and a drain that tells the load balancer first.

uvicorn alone stops listening at SIGTERM: a probe sees a refused connection and not `draining`. Here probes are told
first, for as long as the settings say; then new requests are told 503 and accepted ones finish; then uvicorn stops, and
only then the lifespan ends.
"""

import asyncio
import gc
import logging
import math
import os
import signal
import socket
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from types import FrameType

import uvicorn
from uvicorn.config import STARTUP_FAILURE

from service.api.app import PerceiverApp
from service.lifecycle import Service
from service.server.connections import ConnectionClock, Listener, ServerConfig
from service.server.handshake import TlsHandshake
from service.server.protocol import HttpProtocol
from service.settings import Settings

logger = logging.getLogger(__name__)

YOUNG_OBJECTS = 20_000
NO_PASS_PHRASE = "none"  # noqa: S105 - of a TLS key that has one: OpenSSL would ask for it on the terminal
SAMPLE = "docs/apple.png"  # in the repository, where `make serve` runs


class Server(uvicorn.Server):
    """Serves until it is told to stop or the service has failed.

    Attributes:
        management_sockets: that already listen, for the management port; none where the main port has all.
        failed: whether it ended because the service can't go on.
        was_ready: whether the service was ready before.
        listens_when_ready: whether others listen on the same sockets, and serve clients until this one is ready.
        last_tick: when the event loop last looked whether to end (`time.monotonic`).
    """

    def __init__(self, config: ServerConfig) -> None:
        super().__init__(config)
        self.service: Service = config.service
        self.management_sockets: list[socket.socket] = []
        self.listens_when_ready = False
        self._address = ""
        self._not_listening: list[socket.socket] = []
        self.last_tick = time.monotonic()
        self.failed = self.was_ready = self._was_interrupted = False
        self._drain_from = self._drain_until = math.inf

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Leave: tell the probes, and then drain; at a second signal, stop at once.

        SIGTERM behind Ctrl-C is none: a supervisor passes on what the terminal has sent to every worker.
        """
        if self.service.leaving:
            if sig != signal.SIGTERM or not self._was_interrupted:
                self.force_exit = self.should_exit = True
            return
        self._was_interrupted = sig == signal.SIGINT
        delay = self.service.settings.drain_delay_s if self.service.status == "ready" else 0.0  # nobody is served yet
        self.service.leaving = True
        if not delay:
            self.drain()
            return
        self._drain_from = time.monotonic() + delay
        logger.info("leaving: probes are told, and requests are still accepted for %g s", delay)

    def drain(self) -> None:
        """Refuse what comes, and end when what was accepted has been answered, or after `drain_timeout_s`."""
        logger.info("draining: %d requests are being answered", len(self.service.in_flight))
        self.service.draining = True
        self._drain_until = time.monotonic() + self.service.settings.drain_timeout_s

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and say so.

        As uvicorn does, which knows no limits for TLS but the loop's: a minute for the handshake, and half a minute for
        what is not sent yet when a connection is closed.

        Raises:
            OSError: another service listens there.
            SystemExit: the lifespan could not begin.
        """
        assert sockets is not None
        await self.lifespan.startup()
        if self.lifespan.should_exit:
            raise SystemExit(STARTUP_FAILURE)
        settings = self.service.settings
        self.servers, self._not_listening = [], sockets
        if not self.listens_when_ready:
            await self._listen_to_clients()
        management = Listener(is_management=True)
        self.servers += [await self._listen(one, management) for one in self.management_sockets]
        self.started = True
        self._address = address(sockets[0], settings)
        if settings.workers == 1:  # else the supervisor has said it
            log_addresses(sockets, settings)
        for one in self.management_sockets:
            logger.info("management on %s", address(one, settings))

    async def _listen_to_clients(self) -> None:
        clients = Listener(is_management=False)
        self.servers += [await self._listen(one, clients) for one in self._not_listening]
        self._not_listening = []

    async def _listen(self, sock: socket.socket, listener: Listener) -> asyncio.Server:
        make: Callable[[], asyncio.Protocol] = partial(self._connection, listener)
        if self.config.ssl is not None:
            make = partial(TlsHandshake, listener, self.config.ssl, self.service.settings, make)
        return await asyncio.get_running_loop().create_server(make, sock=sock, backlog=self.config.backlog)

    def _connection(self, listener: Listener) -> HttpProtocol:
        assert isinstance(self.config, ServerConfig)
        state = {**self.lifespan.state, "is_management": listener.is_management}
        protocol = HttpProtocol(self.config, self.server_state, state)
        protocol.listener = listener
        return protocol

    async def on_tick(self, counter: int) -> bool:
        """Look ten times a second whether it is time to end."""
        self.last_tick = time.monotonic()
        if await super().on_tick(counter):
            if self.force_exit:
                self.service.abort()
            return True
        if self.service.failure:
            logger.critical("%s", self.service.failure)
            self.failed = True
            self.config.timeout_graceful_shutdown = 1
            return True
        if not self.was_ready and self.service.status == "ready":
            self.was_ready = True
            settle()
            await self._listen_to_clients()
            log_ready(self._address, self.service.settings)
        if not self.service.draining:
            if time.monotonic() >= self._drain_from:
                self.drain()
            return False
        left = self._drain_until - time.monotonic()
        if left <= 0:
            self.service.abort()  # while there still are connections to respond on
        self.config.timeout_graceful_shutdown = max(1, math.ceil(left))
        return not self.service.in_flight or left <= 0


def settle() -> None:
    """Tell the collector that what was loaded stays."""
    gc.collect()
    gc.freeze()
    # It looks at requests alone, and seldom, since those free themselves.
    gc.set_threshold(YOUNG_OBJECTS)


def address(one: socket.socket, settings: Settings) -> str:
    """Return the URL at which a socket listens."""
    scheme = "http" if settings.tls_cert is None else "https"
    host, port = one.getsockname()[:2]
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"


def log_addresses(sockets: Iterable[socket.socket], settings: Settings) -> None:
    """Log where probes are answered while the model is loaded."""
    for one in sockets:
        logger.info("starting on %s, not ready yet", address(one, settings))


def log_ready(url: str, settings: Settings) -> None:
    """Log that images are classified, and a command that shows it where that would do."""
    # Nobody connects to the address that stands for all.
    url = url.replace("//0.0.0.0:", "//127.0.0.1:").replace("//[::]:", "//[::1]:")
    if settings.workers > 1:
        logger.info("Ready: %s, worker %d", url, os.getpid())
    elif settings.tls_cert or settings.client_keys() or not Path(SAMPLE).is_file():
        logger.info("Ready: %s", url)
    else:
        logger.info("Ready: %s - try: curl -F file=@%s %s/predict", url, SAMPLE, url)


def configuration(app: PerceiverApp) -> ServerConfig:
    """Return uvicorn's configuration."""
    service: Service = app.state.service
    settings = service.settings
    config = ServerConfig(
        app,
        host=settings.host,
        port=settings.port,
        http=HttpProtocol,
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=settings.keep_alive_s,
        ssl_certfile=settings.tls_cert,
        ssl_keyfile=settings.tls_key,
        ssl_keyfile_password=NO_PASS_PHRASE,
    )
    config.service = service
    config.predict = app.predict
    config.clock = ConnectionClock()
    return config
