"""A real nginx in front of real services, as docker/nginx/perceiver.conf has it: what clients get through it."""

import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx

from tests.chaos.slow_service import MODULE, VARIABLE
from tests.end_to_end.nginx import changed, free_port, needs_nginx, running
from tests.end_to_end.process import SECONDS, Process, on_model, started
from tests.end_to_end.test_service_process import IMAGE, post
from tests.end_to_end.test_tls import needs_openssl, tls
from tests.fakes import make_model_folder
from tests.service.harness import png

pytestmark = [needs_openssl, needs_nginx]

WRAPPER = """
pid {0}/nginx.pid; error_log {0}/error.log info;
events {{ worker_connections 256; }}
http {{
    client_body_temp_path {0}/t1; proxy_temp_path {0}/t2;
    fastcgi_temp_path {0}/t3; uwsgi_temp_path {0}/t4; scgi_temp_path {0}/t5;
    include {0}/perceiver.conf;
}}
"""


def configuration(folder: Path, port: int, services: list[str]) -> str:
    """The file that is shipped, with the addresses of here."""
    tls(folder)
    changes = {
        "listen 443 ssl": f"listen 127.0.0.1:{port} ssl",
        "/etc/nginx/perceiver.crt": f"{folder}/cert.pem",
        "/etc/nginx/perceiver.key": f"{folder}/key.pem",
        "/var/log/nginx/perceiver.log": f"{folder}/access.log",
        "10.0.0.1:8000": services[0],
        "10.0.0.2:8000": services[1],
    }
    return changed("perceiver.conf", folder, changes)


@contextmanager
def nginx(folder: Path, *urls: str) -> Iterator[httpx.Client]:
    """A client of nginx before the services at these URLs."""
    folder.mkdir()
    port = free_port()
    (folder / "perceiver.conf").write_text(configuration(folder, port, [url.removeprefix("http://") for url in urls]))
    (folder / "nginx.conf").write_text(WRAPPER.format(folder))
    with (
        running(folder / "nginx.conf"),
        # As a client, it asks anew where the port is not open yet.
        httpx.Client(
            base_url=f"https://127.0.0.1:{port}",
            transport=httpx.HTTPTransport(verify=False, retries=8),
            timeout=SECONDS,
        ) as client,
    ):
        yield client


@contextmanager
def two(folder: Path, *arguments: str, **how: str) -> Iterator[tuple[list[Process], httpx.Client]]:
    """Two services, and a client of nginx before them."""
    make_model_folder(folder / "m")
    with ExitStack() as stack:
        start = [started(folder, *on_model(folder / "m", *arguments), **how) for _ in range(2)]
        services = [stack.enter_context(one) for one in start]
        direct = [stack.enter_context(service.ready()) for service in services]
        yield services, stack.enter_context(nginx(folder / "nginx", *(str(one.base_url) for one in direct)))


def told(answer: httpx.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["error"]["code"]


def test_what_clients_send_and_get(tmp_path: Path) -> None:
    key = {"x-api-key": "k"}
    with two(tmp_path, "--api-keys", "k", "--max-body-bytes", "100000") as (services, client):
        large, larger = bytes(300_000), bytes(33 * 1024 * 1024)  # for the service; for nginx
        for _ in services:  # each is asked each thing
            assert post(client, **key).status_code == 200
            form = client.post("/predict", files={"file": ("a.png", png(1))}, headers=key)
            assert form.json()["predictions"][0]["filename"] == "a.png"
            assert client.post("/predict", content=iter([png(1)]), headers=IMAGE | key).status_code == 200
            assert post(client, expect="100-continue", **key).status_code == 200
            unknown = post(client)
            assert told(unknown) == (401, "unauthorized")
            assert unknown.headers["www-authenticate"] == "Bearer"
            for content in (large, iter([large]), larger, iter([larger])):
                refused = client.post("/predict", content=content, headers=IMAGE | key)
                assert told(refused) == (413, "body_too_large")
            assert told(client.post("/predict", content=large, headers=IMAGE)) == (401, "unauthorized")
            assert told(client.get("/predict")) == (405, "method_not_allowed")
            assert client.post("/v2/models/tiny/versions/1/infer", content=b"{", headers=key).status_code == 400
            assert client.head("/predict").status_code == 405
        for path in ("/metrics", "/health", "/models", "/models/reload", "/docs", "/predict/", "/v2/models/tiny"):
            assert told(client.get(path)) == (404, "not_found")


def test_no_client_learns_that_a_service_stops_or_is_killed(tmp_path: Path) -> None:
    with two(tmp_path) as (services, client), ThreadPoolExecutor(6) as pool:
        stop = threading.Event()
        answers: Counter[int] = Counter()

        def ask() -> None:
            while not stop.is_set():
                answers[post(client).status_code] += 1

        asking = [pool.submit(ask) for _ in range(6)]
        try:
            services[0].wait(lambda: answers.total() > 50)
            services[0].signal()
            assert services[0].exit_status() == 0
            before = answers.total()
            services[1].wait(lambda: answers.total() > before + 50)
        finally:
            stop.set()
        for one in asking:
            one.result()
        assert set(answers) == {200}
        services[1].popen.kill()
        services[1].exit_status()
        assert told(gone := post(client)) == (503, "unavailable")
        assert gone.headers["retry-after"] == "1"


def test_services_that_are_full_say_so_themselves(tmp_path: Path) -> None:
    """By nginx's defaults, both would count as broken for ten seconds."""
    limits = ("--max-queue-size", "1", "--max-images", "1")
    with two(tmp_path, *limits, module=MODULE, **{VARIABLE: "200"}) as (_, client), ThreadPoolExecutor(8) as pool:
        answers = [one for _ in range(3) for one in pool.map(lambda _: post(client), range(8))]
        refused = [answer for answer in answers if answer.status_code != 200]
        assert {told(answer) for answer in refused} == {(503, "overloaded")}
        assert all(int(answer.headers["retry-after"]) >= 1 for answer in refused)
        assert len(answers) - len(refused) >= 3  # each round has had room for one at least
