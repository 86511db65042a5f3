"""Two replicas behind a real nginx, as docker/compose.replicas.yml has them: no request is lost, come what may."""

import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from tests.chaos.slow_service import MODULE, VARIABLE
from tests.end_to_end.load import Load
from tests.end_to_end.nginx import changed, follows_dns, free_port, needs_nginx, running
from tests.end_to_end.process import SECONDS, Process, on_model, started
from tests.fakes import make_model_folder

pytestmark = needs_nginx

HOSTS = ("127.0.0.2", "127.0.0.3")
RUN_MS = "20"  # so that each replica is at work when something befalls it


class NameServer:
    """Docker's name server, as far as nginx asks it: the addresses of `service`, over UDP.

    Attributes:
        addresses: what it says.
    """

    def __init__(self, *addresses: str) -> None:
        self.addresses = addresses
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.bind(("127.0.0.1", 0))
        self.port = int(self._socket.getsockname()[1])
        self._thread = threading.Thread(target=self._answer)
        self._thread.start()

    def _answer(self) -> None:
        while True:
            query, client = self._socket.recvfrom(512)
            if not query:
                self._socket.close()
                return
            assert query[12:].startswith(b"\x07service\x00\x00\x01\x00\x01")
            records = b"".join(
                b"\xc0\x0c\x00\x01\x00\x01" + (1).to_bytes(4) + b"\x00\x04" + socket.inet_aton(address)
                for address in self.addresses
            )
            counts = b"\x00\x01" + len(self.addresses).to_bytes(2) + bytes(4)
            self._socket.sendto(query[:2] + b"\x81\x80" + counts + query[12:25] + records, client)

    def close(self) -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as last:
            last.sendto(b"", ("127.0.0.1", self.port))
        self._thread.join()


@dataclass
class Replica:
    """One service, at an address of its own and the port of all."""

    process: Process
    client: httpx.Client

    def images(self) -> float:
        """How many it has classified."""
        lines = self.client.get("/metrics").text.splitlines()
        return next(float(line.split()[1]) for line in lines if line.startswith("perceiver_images_total "))


class Replicas:
    """Replicas of one model, nginx before them, and a name server where this nginx asks one."""

    def __init__(self, folder: Path, stack: ExitStack, arguments: tuple[str, ...]) -> None:
        self.folder, self._stack, self._arguments = folder, stack, arguments
        self.port = 0
        self.replicas = [self.start(host) for host in HOSTS]
        self.name_server = NameServer(*HOSTS)
        stack.callback(self.name_server.close)
        self.url = f"http://127.0.0.1:{free_port()}"
        (folder / "nginx").mkdir()
        (folder / "nginx/replicas.conf").write_text(self._configuration())
        stack.enter_context(running(folder / "nginx/replicas.conf"))
        self.replicas[0].process.wait(self._is_open)

    def start(self, host: str) -> Replica:
        """A replica that is ready."""
        arguments = on_model(self.folder / "m", "--host", host, *self._arguments)
        how = started(self.folder, *arguments, module=MODULE, port=self.port, **{VARIABLE: RUN_MS})
        process = self._stack.enter_context(how)
        client = self._stack.enter_context(process.ready())
        self.port = client.base_url.port or 0
        return Replica(process, client)

    def _configuration(self) -> str:
        """The file that is shipped, with the addresses of here."""
        changes = {
            "listen 8080": f"listen {self.url.removeprefix('http://')}",
            "/dev/stdout": str(self.log),
            "error_log stderr": f"error_log {self.folder}/nginx/error.log",
        }
        if follows_dns():
            changes |= {"127.0.0.11": f"127.0.0.1:{self.name_server.port}", "service:8000": f"service:{self.port}"}
        else:
            servers = "".join(f"server {host}:{self.port} max_fails=0;" for host in HOSTS)
            changes |= {
                "resolver 127.0.0.11 valid=2s ipv6=off;": "",
                "server service:8000 resolve max_fails=0;": servers,
            }
        return changed("replicas.conf", self.folder, changes)

    @property
    def log(self) -> Path:
        return self.folder / "nginx/access.log"

    def _is_open(self) -> bool:
        try:
            return httpx.post(f"{self.url}/predict", timeout=SECONDS).status_code == 400
        except httpx.TransportError:
            return False

    def asked_another(self) -> int:
        """How many requests have had their answer from a second replica."""
        return self.log.read_text().count(', 200"')


@contextmanager
def replicas(folder: Path, *arguments: str) -> Iterator[Replicas]:
    make_model_folder(folder / "m")
    with ExitStack() as stack:
        yield Replicas(folder, stack, arguments)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_one_that_is_killed_or_drains_and_comes_back(tmp_path: Path, number: signal.Signals) -> None:
    with replicas(tmp_path) as service, Load(service.url) as load:
        first, second = service.replicas
        second.process.wait(lambda: first.images() > 20 and second.images() > 20)
        first.process.signal(number)
        assert first.process.exit_status() == (0 if number == signal.SIGTERM else -number)
        answered = load.answers["right", 1]
        second.process.wait(lambda: load.answers["right", 1] > answered + 100)
        assert service.asked_another() > 0
        back = service.start(HOSTS[0])
        back.process.wait(lambda: back.images() > 20)
    assert set(load.answers) == {("right", 1)}


def test_one_takes_a_new_version_before_the_other(tmp_path: Path) -> None:
    key = {"x-api-key": "k"}
    with replicas(tmp_path, "--model-poll-s=3600", "--admin-key=k") as service, Load(service.url, (1, 2)) as load:
        first, second = service.replicas
        second.process.wait(lambda: load.answers["right", 1] > 50)
        make_model_folder(tmp_path / "m", 2)
        assert first.client.post("/models/reload", headers=key).json()["live"] == 2
        old = load.answers["right", 1]
        second.process.wait(lambda: load.answers["right", 1] > old + 50 and load.answers["right", 2] > 50)
        assert second.client.post("/models/reload", headers=key).json()["live"] == 2
        load.stop()
        with Load(service.url, (1, 2)) as after:
            second.process.wait(lambda: after.answers.total() > 100)
    assert set(load.answers) == {("right", 1), ("right", 2)}
    assert set(after.answers) == {("right", 2)}


@pytest.mark.skipif(not follows_dns(), reason="this nginx is older than 1.27.3")
def test_nginx_follows_the_name_server(tmp_path: Path) -> None:
    with replicas(tmp_path) as service, Load(service.url) as load:
        first, second = service.replicas
        second.process.wait(lambda: first.images() > 20 and second.images() > 20)
        service.name_server.addresses = HOSTS[1:]

        def rests() -> bool:
            before = first.images()
            time.sleep(0.5)
            return first.images() == before

        second.process.wait(rests)
        third = service.start("127.0.0.4")
        service.name_server.addresses = (*HOSTS[1:], "127.0.0.4")
        third.process.wait(lambda: third.images() > 20)
    assert set(load.answers) == {("right", 1)}
