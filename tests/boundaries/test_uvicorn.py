"""What the service uses of uvicorn that uvicorn does not document: a new version may move it.

Each name stands here once. Where one is gone, the sentence says who uses it, so that a bump of uvicorn is one look.
"""

import inspect

import pytest
from uvicorn import Config, Server
from uvicorn.config import STARTUP_FAILURE
from uvicorn.protocols.http import httptools_impl
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState
from uvicorn.supervisors import Multiprocess, multiprocess

OVERRIDDEN = {
    "service/server/protocol.py": (
        HttpToolsProtocol,
        "connection_made connection_lost data_received on_message_begin on_header on_headers_complete on_body "
        "on_message_complete on_response_complete _start_asgi_task",
    ),
    "service/server/timeouts.py": (HttpToolsProtocol, "pause_writing resume_writing shutdown"),
    "service/server/response_cycle.py": (RequestResponseCycle, "run_asgi receive send"),
    "service/server/server.py": (Server, "handle_exit startup on_tick shutdown"),
    "service/launcher.py": (
        Multiprocess,
        "handle_int handle_term handle_hup terminate_all keep_subprocess_alive init_processes",
    ),
    "service/launcher.py, Worker": (multiprocess.Process, "target is_alive pong always_pong"),
}
READ = {
    "service/server/protocol.py": (
        HttpToolsProtocol,
        "config app loop logger access_logger parser root_path asgi_version app_state timeout_keep_alive server_state "
        "connections tasks transport flow server client scheme headers expect_100_continue cycle url",
    ),
    "service/server/response_cycle.py": (
        RequestResponseCycle,
        "keep_alive waiting_for_100_continue message_event more_body body response_started response_complete "
        "disconnected on_response default_headers",
    ),
    "service/server/server.py": (ServerState, "total_requests connections tasks default_headers"),
    "service/server/server.py, Server": (Server, "config server_state started should_exit force_exit"),
    "service/launcher.py": (Multiprocess, "sockets processes signal_queue should_exit"),
    "service/launcher.py, Worker": (multiprocess.Process, "child_conn _server"),
    "service/launcher.py, WorkerConfig": (Config, "workers timeout_worker_healthcheck"),
}


@pytest.mark.parametrize("user", OVERRIDDEN)
def test_what_is_overridden_is_there(user: str) -> None:
    base, names = OVERRIDDEN[user]
    missing = [name for name in names.split() if not callable(getattr(base, name, None))]
    assert not missing, f"uvicorn's {base.__name__} has no {', '.join(missing)} any more; {user} overrides or calls it"


@pytest.mark.parametrize("user", READ)
def test_what_is_read_is_set(user: str) -> None:
    base, names = READ[user]
    source = inspect.getsource(base)
    missing = [name for name in names.split() if f"self.{name}" not in source]
    assert not missing, f"uvicorn's {base.__name__} sets no {', '.join(missing)} any more; {user} reads or sets it"


def test_a_cycle_takes_what_the_protocol_gives_it() -> None:
    ours = {
        "self", "scope", "transport", "flow", "logger", "access_logger", "access_log", "default_headers",
        "message_event", "expect_100_continue", "keep_alive", "on_response",
    }  # fmt: skip
    theirs = set(inspect.signature(RequestResponseCycle.__init__).parameters)
    assert theirs == ours, "uvicorn's RequestResponseCycle takes other arguments; service/server/protocol.py makes one"


def test_flow_control_and_status_lines_are_where_they_were() -> None:
    assert {"read_paused", "write_paused"} <= set(inspect.getsource(FlowControl).replace("self.", " ").split())
    assert httptools_impl.STATUS_LINE[200] == b"HTTP/1.1 200 OK\r\n"


def test_the_supervisor_makes_its_workers_of_the_module_s_class() -> None:
    """service/launcher.py puts `Worker` in the place of `multiprocess.Process`, since there is no other way in."""
    assert "Process(self.config, self.sockets)" in inspect.getsource(Multiprocess)
    assert "STARTUP_FAILURE" in inspect.getsource(Multiprocess.keep_subprocess_alive)
    assert STARTUP_FAILURE == 3
