"""The archive, from a real local server that misbehaves; archives that are hostile or damaged."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import tarfile
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.training.data_sets import CONTENTS, assert_same, python2_pickle
from training.data import download
from training.data.cifar import FOLDER, MEMBERS
from training.data.dataset import DataError
from training.data.load import load


def tar_of(members: dict[str, bytes | tarfile.TarInfo]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as tar:
        for name, content in members.items():
            info = content if isinstance(content, tarfile.TarInfo) else tarfile.TarInfo(name)
            info.name = name
            if isinstance(content, bytes):
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
            else:
                tar.addfile(info)
    return file.getvalue()


def archive_bytes() -> bytes:
    files = {f"{FOLDER}/{name}": python2_pickle(content) for name, content in CONTENTS.items()}
    return tar_of({f"{FOLDER}/file.txt~": b"", **files})


class Server:
    """A real HTTP server of one file, which may break off, ignore ranges or answer with an error."""

    def __init__(self, content: bytes) -> None:
        self.content = content
        self.resumes = True
        self.break_off_after: int | None = None
        self.status: int | None = None
        self.ranges: list[str | None] = []
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.url = f"http://127.0.0.1:{self.http.server_port}/archive.tar.gz"

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                wanted = self.headers["Range"]
                server.ranges.append(wanted)
                offset = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted and server.resumes else 0
                if server.status is not None or offset >= len(server.content):
                    self.send_error(server.status or 416)
                    return
                body = server.content[offset:]
                self.send_response(206 if offset else 200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body[: server.break_off_after])

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - as in the base class
                """Keep the tests' output clean."""

        return Handler


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server(archive_bytes())
    thread = threading.Thread(target=server.http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.http.shutdown()
    thread.join()
    server.http.server_close()


def fetch(server: Server, cache_dir: Path, md5: str | None = None) -> Path:
    right = hashlib.md5(server.content).hexdigest()
    return download.ensure_cifar100(cache_dir, url=server.url, md5=md5 or right)


def test_the_official_archive_is_asked_for() -> None:
    assert download.ARCHIVE_URL == "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz"
    assert download.ARCHIVE_MD5 == "eb9058c3a382ffc7106e4002c42a8d85"


def test_download_unpacks_the_three_files_only(tmp_path: Path, server: Server) -> None:
    folder = fetch(server, tmp_path / "deep" / "cache")
    assert sorted(path.name for path in folder.iterdir()) == ["meta", "test", "train"]
    assert not list(tmp_path.rglob("*.partial"))
    assert not list(tmp_path.rglob(".unpacking*"))
    assert_same(load(None, input_size=32, cache_dir=tmp_path / "deep" / "cache"), load(folder, input_size=32))


def test_nothing_is_downloaded_twice(tmp_path: Path, server: Server) -> None:
    folder = fetch(server, tmp_path)
    assert fetch(server, tmp_path) == folder
    (folder / "test").unlink()  # the archive is still there
    assert fetch(server, tmp_path) == folder
    assert (folder / "test").is_file()
    assert server.ranges == [None]


def test_download_goes_on_where_it_broke_off(tmp_path: Path, server: Server) -> None:
    server.break_off_after = 50_000
    fetch(server, tmp_path)
    assert server.ranges == [None, "bytes=50000-"]


def test_a_later_run_goes_on_where_the_first_gave_up(tmp_path: Path, server: Server) -> None:
    server.break_off_after = 100
    with pytest.raises(DataError, match=r"the connection broke off.*run the same command again to go on"):
        fetch(server, tmp_path)
    assert (tmp_path / f"{FOLDER}.tar.gz.partial").stat().st_size == 300
    server.break_off_after = None
    assert fetch(server, tmp_path).is_dir()
    assert server.ranges[-1] == "bytes=300-"


def test_a_server_that_does_not_resume_sends_everything(tmp_path: Path, server: Server) -> None:
    server.resumes = False
    (tmp_path / f"{FOLDER}.tar.gz.partial").write_bytes(server.content[:100])
    assert fetch(server, tmp_path).is_dir()
    assert server.ranges == ["bytes=100-"]


def test_a_complete_partial_file_is_used(tmp_path: Path, server: Server) -> None:
    (tmp_path / f"{FOLDER}.tar.gz.partial").write_bytes(server.content)
    assert fetch(server, tmp_path).is_dir()


def test_a_wrong_checksum_is_refused_and_the_file_deleted(tmp_path: Path, server: Server) -> None:
    with pytest.raises(DataError, match=r"MD5 checksum [0-9a-f]{32} where 0{32} is right; .* has been deleted"):
        fetch(server, tmp_path, md5="0" * 32)
    assert not (tmp_path / FOLDER).exists()
    assert not list(tmp_path.glob("*.tar.gz*"))


def test_a_damaged_partial_file_heals_with_the_second_run(tmp_path: Path, server: Server) -> None:
    (tmp_path / f"{FOLDER}.tar.gz.partial").write_bytes(b"junk")
    with pytest.raises(DataError, match="has been deleted"):
        fetch(server, tmp_path)
    assert fetch(server, tmp_path).is_dir()


def test_an_archive_that_lay_there_is_verified_and_kept(tmp_path: Path, server: Server) -> None:
    archive = tmp_path / f"{FOLDER}.tar.gz"
    archive.write_bytes(server.content[:-1])
    with pytest.raises(DataError, match=r"cifar-100-python\.tar\.gz: has the MD5 checksum .*; remove it"):
        fetch(server, tmp_path)
    assert archive.exists()
    archive.write_bytes(server.content)
    assert fetch(server, tmp_path).is_dir()
    assert server.ranges == []


def test_an_error_of_the_server_is_passed_on(tmp_path: Path, server: Server) -> None:
    server.status = 404
    with pytest.raises(DataError, match=r"cannot be downloaded \(Not Found\)"):
        fetch(server, tmp_path)


def test_without_a_network_local_data_are_named_as_the_way_out(tmp_path: Path) -> None:
    gone = Server(b"")
    gone.http.server_close()
    with pytest.raises(DataError, match=r"cannot be downloaded \(.*refused\).* or pass --data with a local folder"):
        fetch(gone, tmp_path)


def test_a_cache_that_cannot_be_written(tmp_path: Path, server: Server) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(DataError, match=r"cache: cannot be written \(.*\), so CIFAR-100 cannot be downloaded"):
        fetch(server, tmp_path / "cache")


def test_several_loaders_download_once(tmp_path: Path, server: Server) -> None:
    threads = [threading.Thread(target=fetch, args=(server, tmp_path)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert load(tmp_path, input_size=32).labels
    assert server.ranges == [None]


def link(kind: bytes, target: str) -> tarfile.TarInfo:
    info = tarfile.TarInfo()
    info.type, info.linkname = kind, target
    return info


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_in_an_archive_are_refused(tmp_path: Path, kind: bytes) -> None:
    secret = tmp_path / "secret"
    secret.write_text("secret")
    files = {f"{FOLDER}/{name}": b"content" for name in ("meta", "test")}
    (tmp_path / "a.tar.gz").write_bytes(tar_of({**files, f"{FOLDER}/train": link(kind, str(secret))}))
    with pytest.raises(DataError, match=r"cifar-100-python/train must be a plain file"):
        download.unpack(tmp_path / "a.tar.gz", tmp_path / FOLDER)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.tar.gz", "secret"]


def test_no_path_of_an_archive_is_followed(tmp_path: Path) -> None:
    """A link for the folder, names that climb or start at the root: nothing is written but the three files."""
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    inside.mkdir()
    outside.mkdir()
    files: dict[str, bytes | tarfile.TarInfo] = {f"{FOLDER}/{name}": name.encode() for name in MEMBERS}
    climbing = {"../climbed": b"", f"{outside}/absolute": b"", f"{FOLDER}/../../climbed": b""}
    content = tar_of({FOLDER: link(tarfile.SYMTYPE, str(outside)), **climbing, **files})
    (inside / "a.tar.gz").write_bytes(content)
    download.unpack(inside / "a.tar.gz", inside / FOLDER)
    assert sorted(path.name for path in (inside / FOLDER).iterdir()) == ["meta", "test", "train"]
    assert not (inside / FOLDER).is_symlink()
    assert not list(outside.iterdir())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["inside", "outside"]


def test_a_disk_without_room_is_not_taken_for_a_damaged_archive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_room(source: object, target: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    (tmp_path / "a.tar.gz").write_bytes(archive_bytes())
    monkeypatch.setattr(download.shutil, "copyfileobj", no_room)
    with pytest.raises(DataError, match=r"a\.tar\.gz: cannot be unpacked to .* \(No space left on device\)\.$"):
        download.unpack(tmp_path / "a.tar.gz", tmp_path / FOLDER)
    assert [path.name for path in tmp_path.iterdir()] == ["a.tar.gz"]


@pytest.mark.parametrize("damage", ["junk", "truncated", "flipped", "a member missing"])
def test_a_broken_archive_leaves_nothing_behind(tmp_path: Path, damage: str) -> None:
    whole = archive_bytes()
    content = {
        "junk": b"not a tar",
        "truncated": whole[: len(whole) // 2],
        "flipped": whole[:20] + bytes(255 - byte for byte in whole[20:70]) + whole[70:],
        "a member missing": tar_of({f"{FOLDER}/meta": b"content"}),
    }[damage]
    (tmp_path / "a.tar.gz").write_bytes(content)
    with pytest.raises(DataError, match=r"a\.tar\.gz: is not the official archive \(.*\); remove it"):
        download.unpack(tmp_path / "a.tar.gz", tmp_path / FOLDER)
    assert [path.name for path in tmp_path.iterdir()] == ["a.tar.gz"]
