"""Start the service as one process or as several workers, and return the exit status."""

import logging
import os
import signal
import socket
import ssl
import threading
import time
from multiprocessing import connection, parent_process
from typing import Final

from prometheus_client import disable_created_metrics
from uvicorn import Config
from uvicorn.config import STARTUP_FAILURE
from uvicorn.supervisors import Multiprocess, multiprocess

from service.api.app import PerceiverApp
from service.engine.cpus import usable_cores
from service.engine.session import EngineError, resolve_provider
from service.lifecycle import Service
from service.logging import configure as configure_logging
from service.server.server import NO_PASS_PHRASE, Server, configuration, log_addresses
from service.server.sockets import BACKLOG, bind, claim_port
from service.settings import Settings

logger = logging.getLogger(__name__)

# A worker that imports its libraries on a busy machine answers late.
HEALTH_CHECK_TIMEOUT_S: Final = 30
INTERRUPTED: Final = 130
LOOP_HANGS_AFTER_S: Final = 2


def run(settings: Settings) -> int:
    """Serve until the end; return the exit status: 0 after a drain, 1 after a failure, 130 after a second Ctrl-C."""
    settings = with_workers(settings)
    if (problem := tls_problem(settings)) is not None:
        logger.critical("%s", problem)
        return 1
    try:
        sockets = bind(settings.host, settings.port)
    except (OSError, UnicodeError) as error:  # a name that is none raises the latter
        log_bind_error(settings, error)
        return 1
    if not settings.client_keys():
        logger.info("no API keys: open to all; api_keys and api_keys_file ask for one")
    if settings.workers == 1:
        return serve(make_server(settings), sockets)
    return supervise(settings, sockets)


def with_workers(settings: Settings) -> Settings:
    """Replace 0 (auto) workers by their number: one a core where the model runs on the CPU, else one."""
    if settings.workers:
        return settings
    try:
        is_on_cpu = resolve_provider(settings.provider, settings.device_ids[0]) == "cpu"
    except EngineError:  # the worker reports it
        is_on_cpu = False
    return settings.model_copy(update={"workers": usable_cores() if is_on_cpu else 1})


def tls_problem(settings: Settings) -> str | None:
    """Return why the TLS files can't be used; None where they can, or where there are none."""
    if settings.tls_cert is None:
        return None
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(settings.tls_cert, settings.tls_key, NO_PASS_PHRASE)
    except OSError as error:  # ssl.SSLError is one
        files = f"{settings.tls_cert} and {settings.tls_key}"
        return f"the TLS files {files} can't be used: {error}; they must be PEM, with no pass phrase"
    return None


def log_bind_error(settings: Settings, error: OSError | UnicodeError) -> None:
    """Say why the port can't be listened on, and what to do."""
    reason = (getattr(error, "strerror", None) or str(error)).lower()
    other = "name another with --host and --port (HOST= and PORT= of make serve)"
    logger.error("can't listen on %s:%d: %s; %s", settings.host, settings.port, reason, other)


# One process


def make_server(settings: Settings) -> Server:
    """Return the server of one process, which does not listen yet."""
    # A second series for each counter and histogram, which nobody queries.
    disable_created_metrics()  # type: ignore[no-untyped-call]
    return Server(configuration(PerceiverApp(Service(settings))))


def serve(server: Server, sockets: list[socket.socket]) -> int:
    """Serve in this process; return the exit status."""
    settings = server.service.settings
    try:
        if settings.management_port is not None:
            server.management_sockets = claim_port(settings.host, settings.management_port, settings.workers)
    except OSError as error:
        logger.error("can't listen on the management port: %s; name another with --management-port", error)
        return 1
    if hangup_ends():
        signal.signal(signal.SIGHUP, server.handle_exit)  # uvicorn leaves it alone
    try:
        server.run(sockets)
    except OSError as error:  # another service was bound at the same time, and listened first
        log_bind_error(settings, error)
        return 1
    return 1 if server.failed else INTERRUPTED if server.force_exit else 0


def hangup_ends() -> bool:
    """Tell whether a closed terminal (SIGHUP) ends this process, which `nohup` keeps it from."""
    return hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is signal.SIG_DFL


# Several workers


class WorkerConfig(Config):
    """uvicorn's configuration of a supervisor; it is pickled for each worker.

    Attributes:
        is_replacement: whether workers that are started now find others that serve.
    """

    is_replacement = False

    def __init__(self, settings: Settings) -> None:
        super().__init__(
            "", workers=settings.workers, log_config=None, timeout_worker_healthcheck=HEALTH_CHECK_TIMEOUT_S
        )
        self.settings = settings


class Worker(multiprocess.Process):
    """A whole service in a process of its own."""

    config: WorkerConfig
    _server: Server | None
    _asked: float | None = None  # when the health check was sent that is not answered yet (`time.monotonic`)

    def target(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve, in the new process; it ends with STARTUP_FAILURE where it was never ready."""
        settings = self.config.settings
        configure_logging(settings)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # the supervisor's affair
        signal.signal(signal.SIGTERM, lambda *_: os._exit(0))  # before and after the server handles it
        threading.Thread(target=self.always_pong, daemon=True).start()
        threading.Thread(target=drain_with_parent, daemon=True).start()
        server = self._server = make_server(settings)
        server.listens_when_ready = self.config.is_replacement
        status = serve(server, sockets or [])
        # Not sys.exit: a thread that hangs in a driver must not keep a failed process from being replaced.
        os._exit(STARTUP_FAILURE if status == 1 and not server.was_ready else status)

    def is_alive(self, timeout: float = HEALTH_CHECK_TIMEOUT_S) -> bool:
        """Tell whether it runs, and no health check is older than ``timeout``; wait for no answer."""
        if not self.process.is_alive():
            return False
        try:
            if self._asked is None:
                self.parent_conn.send(b"ping")
                self._asked = time.monotonic()
            elif self.parent_conn.poll():
                self.parent_conn.recv()
                self._asked = None
        except (OSError, EOFError):
            return False
        return self._asked is None or time.monotonic() - self._asked < timeout

    def pong(self) -> None:
        """Answer one health check, and not before the event loop goes on, where it hangs."""
        self.child_conn.recv()
        server = self._server
        while server is not None and server.started and time.monotonic() - server.last_tick > LOOP_HANGS_AFTER_S:
            time.sleep(0.1)
        self.child_conn.send(server is not None and server.started)


def drain_with_parent() -> None:
    """Drain this worker when its supervisor has been killed: nobody would restart or stop it any more."""
    parent = parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    logger.error("the supervisor of this worker has ended; it drains")
    os.kill(os.getpid(), signal.SIGTERM)


class Supervisor(Multiprocess):
    """uvicorn's, with workers of ours. A closed terminal ends it; uvicorn's would restart its workers."""

    interrupts = 0
    config: WorkerConfig

    def init_processes(self) -> None:
        """Start the first workers; those that are started later take the place of one."""
        super().init_processes()
        self.config.is_replacement = True

    @property
    def is_interrupted(self) -> bool:
        """Whether Ctrl-C was pressed twice: workers have ended without a drain."""
        return self.interrupts + self.signal_queue.count(signal.SIGINT) > 1

    def handle_int(self) -> None:
        """Stop."""
        self.interrupts += 1
        super().handle_int()

    def handle_hup(self) -> None:
        """Stop."""
        self.handle_term()

    def terminate_all(self) -> None:
        """Drain the workers. Nobody is left in the backlog of a socket that no worker listens on any more."""
        for one in self.sockets:
            one.close()
        super().terminate_all()


def supervise(settings: Settings, sockets: list[socket.socket]) -> int:
    """Run workers until the end; return the exit status."""
    multiprocess.Process = Worker  # type: ignore[misc]  # uvicorn has no other place to name it
    for one in sockets:
        one.listen(BACKLOG)  # clients wait for the first worker
    hangup = signal.getsignal(signal.SIGHUP)
    supervisor = Supervisor(WorkerConfig(settings), sockets)
    if hangup is signal.SIG_IGN:  # nohup
        signal.signal(signal.SIGHUP, hangup)
    log_addresses(sockets, settings)
    if settings.management_port is None:
        logger.warning("each of %d workers has metrics of its own; set management_port to have them", settings.workers)
    supervisor.run()
    statuses = {process.exitcode for process in supervisor.processes}
    if supervisor.is_interrupted or INTERRUPTED in statuses:
        return INTERRUPTED
    return 0 if statuses == {0} else 1
