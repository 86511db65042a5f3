"""Start the service in one process, or with processes of their own for HTTP; end it; say how it went."""

import asyncio
import logging
import signal
import socket
import time

from prometheus_client import disable_created_metrics

from service.app import PerceiverApp
from service.front_processes import FrontProcesses
from service.server import Server, configuration, leave, log_addresses, log_drain, settle
from service.settings import Settings
from service.sockets import alone, reserve
from service.state import STOP_SECONDS, Service

logger = logging.getLogger(__name__)

TICK_SECONDS = 0.02


def run(settings: Settings) -> int:
    """Serve until the end; return the process's exit status."""
    # A second series for each counter and histogram, which nobody queries.
    disable_created_metrics()  # type: ignore[no-untyped-call]
    service = Service(settings)
    app = PerceiverApp(service)
    config = configuration(app, service, app.entry.quick)
    try:
        config.load()
    except OSError as error:  # ssl.SSLError is one
        files = (settings.tls_cert, settings.tls_key)
        logger.critical(
            "the TLS files %s and %s can't be used: %s; they must be PEM, with no pass phrase", *files, error
        )
        return 1
    try:
        sockets = reserve(settings) if settings.http_processes else alone(settings)
    except (OSError, UnicodeError) as error:  # a name that is none raises the latter
        return can_not_listen(settings, error)
    if not settings.http_processes:
        return run_alone(Server(config), sockets)
    with asyncio.Runner(loop_factory=config.get_loop_factory()) as runner:
        return runner.run(run_with_processes(service, app, sockets))


def run_alone(server: Server, sockets: list[socket.socket]) -> int:
    """Serve in this process."""
    if hangup_ends():
        signal.signal(signal.SIGHUP, server.handle_exit)  # uvicorn leaves it alone
    try:
        server.run(sockets)
    except KeyboardInterrupt:  # a second Ctrl-C
        return 130
    except OSError as error:  # another service was bound at the same time, and listened first
        return can_not_listen(server.service.settings, error)
    return 1 if server.failed or server.force_exit else 0


def can_not_listen(settings: Settings, error: OSError | UnicodeError) -> int:
    """Say so; return the exit status."""
    reason = (getattr(error, "strerror", None) or str(error)).lower()
    logger.error("can't listen on %s:%d: %s; name another with --host and --port", settings.host, settings.port, reason)
    return 1


async def run_with_processes(service: Service, app: PerceiverApp, addresses: list[socket.socket]) -> int:
    """Run the model here, and HTTP in other processes."""
    stopping = Stopping(service)
    fronts = FrontProcesses(service, app.routes_alone, addresses, service.settings.http_processes)
    service.start()
    fronts.start()
    listening = asyncio.create_task(fronts.listening())
    is_logged = is_settled = False
    while not service.failure and not stopping.asked:
        await asyncio.sleep(TICK_SECONDS)
        if not is_logged and listening.done():
            is_logged = True
            log_addresses(addresses, service.settings)
        if not is_settled and service.status == "ready":
            is_settled = True
            settle()
    listening.cancel()
    if not service.failure:
        until = time.monotonic() + leave(service)
        fronts.tell()
        while time.monotonic() < until and not service.failure and not stopping.at_once:  # noqa: ASYNC110 - as below
            await asyncio.sleep(TICK_SECONDS)
    failed = bool(service.failure)
    if failed:
        logger.critical("%s", service.failure)
    else:
        log_drain(fronts.in_flight)
    seconds = 1 if failed else service.settings.drain_timeout_s
    fronts.drain(seconds)
    until = time.monotonic() + seconds + STOP_SECONDS
    while fronts.is_running and time.monotonic() < until and not stopping.at_once:  # noqa: ASYNC110 - a signal too
        await asyncio.sleep(TICK_SECONDS)
    await fronts.stop()
    if stopping.at_once:
        service.cut_off()
        return 130
    await service.stop()
    return 1 if failed else 0


def hangup_ends() -> bool:
    """Tell whether a closed terminal (SIGHUP) ends this process, which `nohup` keeps it from."""
    return hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is signal.SIG_DFL


class Stopping:
    """What signals ask for: the first a drain, the second an end.

    Args:
        service: what is to leave. It is told at once: of an HTTP process which the same signal has ended, because that
            had only just begun, nobody should think that it crashed.

    Attributes:
        asked: whether there was a first.
        at_once: whether there was a second.
    """

    def __init__(self, service: Service) -> None:
        self._service = service
        self.asked = self.at_once = False
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM, *([signal.SIGHUP] if hangup_ends() else [])):
            loop.add_signal_handler(number, self._stop)

    def _stop(self) -> None:
        self.at_once, self.asked = self.asked, True
        self._service.leaving = True
