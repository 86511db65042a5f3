"""HTTPS, as it is started in production: a process with a certificate, and clients that speak TLS."""

import shutil
import socket
import ssl
import subprocess
import time
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from service.server.handshake import SPARE_CONNECTIONS
from service.server.timeouts import LINGER_SECONDS
from tests.end_to_end.process import on_model, started
from tests.end_to_end.test_service_process import post, refused
from tests.fakes import make_model_folder
from tests.service.harness import png, request_head

needs_openssl = pytest.mark.skipif(shutil.which("openssl") is None, reason="makes its key with the openssl command")


def tls(folder: Path, *how: str) -> tuple[str, ...]:
    """The arguments for a new certificate and its key, which has no pass phrase unless `how` says so."""
    certificate, key = str(folder / "cert.pem"), str(folder / "key.pem")
    making = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-subj", "/CN=localhost", "-days", "2"]
    subprocess.run(
        [*making, *(how or ["-nodes"]), "-out", certificate, "-keyout", key], check=True, capture_output=True
    )
    return "--tls-cert", certificate, "--tls-key", key


@needs_openssl
def test_https(tmp_path: Path) -> None:
    make_model_folder(tmp_path / "m")
    impatient = ("--header-timeout-s", "1", "--body-timeout-s", "0.5")
    with started(tmp_path, *on_model(tmp_path / "m", *tls(tmp_path), *impatient)) as process, process.ready() as client:
        assert client.base_url.scheme == "https"
        assert post(client).status_code == 200
        with socket.create_connection(("127.0.0.1", client.base_url.port or 0), timeout=30) as silent:
            assert silent.recv(1) == b""  # the loop alone would have waited for its handshake for a minute
        with socket.create_connection(("127.0.0.1", client.base_url.port or 0), timeout=15) as tcp:
            late = ssl._create_unverified_context().wrap_socket(tcp.dup(), server_hostname="localhost")
            late.sendall(request_head(1000) + b"abc")
            assert late.recv(100).startswith(b"HTTP/1.1 408")
            with suppress(ConnectionResetError):  # it need not wait for long until the client has said goodbye
                while tcp.recv(1000):
                    pass
            late.close()
        assert post(client).status_code == 200
        process.signal()
        assert process.exit_status() == 0


@needs_openssl
def test_connections_in_their_handshake_count(tmp_path: Path) -> None:
    make_model_folder(tmp_path / "m")
    limits = ("--max-connections", "20", "--header-timeout-s", "60")
    with started(tmp_path, *on_model(tmp_path / "m", *tls(tmp_path), *limits)) as process, process.ready() as client:
        port = client.base_url.port or 0

        def is_closed(tcp: socket.socket) -> bool:
            try:
                return tcp.recv(1) == b""
            except ConnectionResetError:
                return True
            except BlockingIOError:
                return False

        with ExitStack() as stack:
            silent = []
            for _ in range(200):
                tcp = stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=30))
                tcp.setblocking(False)
                silent.append(tcp)
            process.wait(lambda: sum(map(is_closed, silent)) >= 200 - 20 - SPARE_CONNECTIONS)
            kept = [tcp for tcp in silent if not is_closed(tcp)]
            assert len(kept) >= 20
            for tcp in kept[25:]:
                tcp.close()

            def told() -> bytes:
                """What a further client is told, which can speak TLS; nothing while the others are being closed."""
                with (
                    suppress(OSError),
                    socket.create_connection(("127.0.0.1", port), timeout=30) as tcp,
                    ssl._create_unverified_context().wrap_socket(tcp, server_hostname="localhost") as other,
                ):
                    with suppress(OSError):
                        other.sendall(request_head(None, target="/health/live", method="GET"))
                    return other.recv(1000)
                return b""

            process.wait(lambda: told().startswith(b"HTTP/1.1 503"))
        process.wait(lambda: told().startswith(b"HTTP/1.1 200"))
        assert post(client).status_code == 200
        process.signal()
        assert process.exit_status() == 0


@needs_openssl
def test_a_tls_key_with_a_pass_phrase_is_refused_and_nobody_is_asked(tmp_path: Path) -> None:
    make_model_folder(tmp_path / "m")
    with started(tmp_path, *on_model(tmp_path / "m", *tls(tmp_path, "-passout", "pass:secret"))) as process:
        refused(process, 1, "they must be PEM, with no pass phrase")


def test_tls_files_that_are_none(tmp_path: Path) -> None:
    make_model_folder(tmp_path / "m")
    (tmp_path / "junk.pem").write_text("junk")
    junk = str(tmp_path / "junk.pem")
    with started(tmp_path, *on_model(tmp_path / "m", "--tls-cert", junk, "--tls-key", junk)) as process:
        refused(process, 1, f"the TLS files {junk} and {junk} can't be used: ")


@needs_openssl
def test_an_answer_that_is_not_read_yet_outlives_a_drain(tmp_path: Path) -> None:
    """One of ten megabytes, for the names of many images come back: most of it waits in the process."""
    make_model_folder(tmp_path / "m")
    part = b'--B\r\nContent-Disposition: form-data; name="file"; filename="%b"\r\n\r\n%b\r\n' % (b"n" * 4000, png(1))
    form = part * 2500 + b"--B--\r\n"
    arguments = ("--max-images", "2500", "--max-queue-size", "2500", *tls(tmp_path))
    with started(tmp_path, *on_model(tmp_path / "m", *arguments)) as process, process.ready() as client:
        with socket.create_connection(("127.0.0.1", client.base_url.port or 0), timeout=30) as tcp:
            slow = ssl._create_unverified_context().wrap_socket(tcp, server_hostname="localhost")
            slow.sendall(request_head(len(form)).replace(b"image/png", b"multipart/form-data; boundary=B") + form)
            process.wait(
                lambda: 'perceiver_requests_total{code="200",route="/predict"} 1.0' in client.get("/metrics").text
            )
            process.signal()
            process.wait(lambda: "draining: 0 requests" in process.stderr)
            time.sleep(LINGER_SECONDS + 1)  # that long a client has which leaves nothing unread
            answer = bytearray()
            while data := slow.recv(1_000_000):
                answer += data
            slow.close()
        head, _, body = bytes(answer).partition(b"\r\n\r\n")
        assert f"content-length: {len(body)}\r\n".encode() in head
        assert len(body) > 10_000_000
        assert process.exit_status() == 0


@needs_openssl
def test_a_client_that_does_not_close_its_half_does_not_hold_a_drain(tmp_path: Path) -> None:
    make_model_folder(tmp_path / "m")
    arguments = ("--drain-timeout-s", "3600", "--write-timeout-s", "3600", "--keep-alive-s", "3600", *tls(tmp_path))
    with started(tmp_path, *on_model(tmp_path / "m", *arguments)) as process, process.ready() as client:
        assert post(client).status_code == 200
        process.signal()
        assert process.exit_status() == 0
