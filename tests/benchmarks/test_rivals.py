"""`benchmarks.rivals` without the rivals: fakes stand in for them, as real processes."""

import re
import shutil
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from benchmarks.common import BenchmarkError, ModelPlace, join_spread
from benchmarks.generator import Records
from benchmarks.payloads import generate_images
from benchmarks.processes import Load
from benchmarks.rivals import __main__ as command
from benchmarks.rivals import environments
from benchmarks.rivals.__main__ import (
    OURS,
    Candidate,
    Contender,
    compare,
    parse_arguments,
    rows_of,
    run_each,
    search,
    settings_of_ours,
)
from benchmarks.rivals.frameworks import FRAMEWORKS, Framework, candidates, choose, triton_config
from benchmarks.rivals.labels import WRONG_LABEL, Expected, expect, reject_wrong_labels
from benchmarks.rivals.process_tree import alive, process_tree, stop_tree, tree_cpu_seconds, tree_memory_bytes
from benchmarks.rivals.servers import RivalServer
from benchmarks.rivals.wrk import find_wrk, run_wrk
from benchmarks.server import Server
from benchmarks.summary import summarize
from benchmarks.tiny_model import SIDE, make_tiny_model
from service.engine.metadata import MODEL_FILE
from tests.benchmarks.http_server import request

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
MODEL = ModelPlace(Path("/models/m"), 3, Path("/models/m/3"))
# Starts a child that takes 0.3 s of CPU time, on any machine, and then waits, as a server's worker does; answers any
# POST with its setting.
FAKE_RIVAL = r"""
import http.server, os, subprocess, sys
subprocess.Popen([sys.executable, "-c", "import time\nwhile time.process_time() < 0.3: pass\ntime.sleep(60)"])
class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_POST(self):
        self.rfile.read(int(self.headers["content-length"]))
        answer = os.environ["RIVAL_SETTING_WORKERS"].encode()
        self.send_response(200)
        self.send_header("content-length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)
http.server.ThreadingHTTPServer(("127.0.0.1", int(os.environ["RIVAL_PORT"])), Handler).serve_forever()
"""


# Ready, and answers any POST with 503.
REFUSING_SERVER = r"""
import http.server, os
class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_GET(self, status=200):
        self.rfile.read(int(self.headers.get("content-length", 0)))
        self.send_response(status)
        self.send_header("content-length", "0")
        self.end_headers()
    def do_POST(self):
        self.do_GET(503)
address = os.environ["PERCEIVER_HOST"], int(os.environ["PERCEIVER_PORT"])
http.server.ThreadingHTTPServer(address, Handler).serve_forever()
"""


def fake(code: str) -> Framework:
    return Framework("Fake", "fake", {"workers": 7}, lambda place: (place.python, "-c", code))


def records(*answers: tuple[int, int, bytes]) -> Records:
    """Records of answers: number, status, body."""
    numbers, statuses, bodies = (list(column) for column in zip(*answers, strict=True))
    begins, ends = [float(index) for index in range(len(numbers))], [index + 0.5 for index in range(len(numbers))]
    return Records(numbers, begins, begins, ends, statuses, [""] * len(ends), [b""] * len(ends), bodies)


@linux
def test_a_rivals_processes_are_measured_and_stopped_together() -> None:
    with RivalServer(fake(FAKE_RIVAL), Path(sys.executable), MODEL, request(b"x")) as server:
        tree = process_tree(server.pid)
        assert len(tree) == 2
        end = time.monotonic() + 20
        while (tree_cpu_seconds(server.pid) or 0) - (tree_cpu_seconds_of_root(server.pid)) < 0.1:
            assert time.monotonic() < end
            time.sleep(0.02)
        memory = tree_memory_bytes(server.pid)
        assert memory is not None
        assert 2**20 < memory < 2**30
    assert not any(alive(pid) for pid in tree)


def tree_cpu_seconds_of_root(pid: int) -> float:
    """What the root alone has taken, its children left out."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / 100


@linux
def test_a_process_that_is_gone_has_no_tree() -> None:
    assert process_tree(2**22 + 1) == []
    assert tree_cpu_seconds(2**22 + 1) is None
    assert tree_memory_bytes(2**22 + 1) is None
    stop_tree(2**22 + 1)


@linux
def test_a_rival_that_ends_is_told_with_its_last_words() -> None:
    server = RivalServer(fake("raise SystemExit('no such worker')"), Path(sys.executable), MODEL, request(b"x"))
    with pytest.raises(BenchmarkError, match="Fake ended with status 1 before it was ready:\nno such worker"), server:
        pass


def test_a_rival_whose_program_does_not_run_here_is_a_sentence(tmp_path: Path) -> None:
    server = RivalServer(fake(""), tmp_path / "python", MODEL, request(b"x"))
    with pytest.raises(BenchmarkError, match=r"Fake can't be started here: .*No such file"), server:
        pass


def test_labels_are_those_of_the_model_and_others_are_failures(tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path)
    expected = expect(model.path / MODEL_FILE, generate_images(40, SIDE, "jpeg"))
    labels = expected.labels
    assert len(labels) == 40
    assert len(set(labels)) > 1
    right = b'{"label": %b}'
    other = next(label for label in labels if label != labels[0])
    found = records(
        (0, 200, right % labels[0]),
        (41, 200, right % labels[1]),
        (0, 200, right % other),
        (1, 503, b"no"),
        (2, 200, b"{}"),
    )
    assert reject_wrong_labels(found, expected) == 2
    assert found.status == [200, 200, 0, 503, 0]
    assert found.failure == ["", "", WRONG_LABEL, "", WRONG_LABEL]


def test_an_answer_that_names_every_label_is_wrong() -> None:
    found = records((0, 200, b'["class 0", "class 1"]'))
    assert reject_wrong_labels(found, Expected([b'"class 0"'], re.compile(rb'"class \d+"'))) == 1


def test_each_rival_has_the_same_candidates_and_its_own_settings() -> None:
    chosen = choose(None, [], cores=2, connections=64)
    assert list(chosen) == ["triton", "mosec", "litserve", "bentoml"]
    for name, tried in chosen.items():
        assert [item.settings for item in tried] == [
            {"workers": workers, "threads": threads, "batch": batch} | FRAMEWORKS[name].settings
            for workers, threads, batch in ((2, 1, 32), (2, 1, 8), (1, 2, 32), (1, 1, 32))
        ]


def test_one_connection_has_no_batches() -> None:
    tried = choose(["mosec"], [], cores=2, connections=1)["mosec"]
    shapes = [(item.settings["workers"], item.settings["threads"], item.settings["batch"]) for item in tried]
    assert shapes == [(2, 1, 1), (1, 2, 1), (1, 1, 1)]


def test_one_core_has_no_candidate_twice() -> None:
    assert [(item["workers"], item["threads"], item["batch"]) for item in candidates(1, 64)] == [(1, 1, 32), (1, 1, 8)]


def test_a_setting_that_is_asked_for_holds_in_every_candidate() -> None:
    (tried,) = choose(["mosec"], ["mosec.wait_ms=9", "mosec.batch=32", "triton.workers=2"], 2, 64).values()
    assert [(item.settings["workers"], item.settings["threads"]) for item in tried] == [(2, 1), (1, 2), (1, 1)]
    assert all(item.settings["wait_ms"] == 9 and item.settings["batch"] == 32 for item in tried)


def test_our_service_is_tried_with_one_worker_and_with_one_a_core_unless_told() -> None:
    assert [item["workers"] for item in settings_of_ours(parse_arguments([]))] == ["auto", "1"]
    (only,) = settings_of_ours(parse_arguments(["--model", "m", "--service", "workers=3"]))
    assert only == {"provider": "cpu", "precision": "float32", "workers": "3"}


@pytest.mark.parametrize("text", ["mosec", "mosec.wait_ms", "mosec.wait_ms=soon", "mosec.speed=9", "other.workers=1"])
def test_an_unknown_setting_is_answered_with_those_there_are(text: str) -> None:
    with pytest.raises(BenchmarkError, match=r"must have the form NAME.SETTING=NUMBER, with one of triton.workers"):
        choose(None, [text], 2, 64)


def test_an_unknown_rival_is_answered_with_those_there_are() -> None:
    with pytest.raises(BenchmarkError, match="--only torchserve: must be one of triton, mosec, litserve, bentoml"):
        choose(["torchserve"], [], 2, 64)


def test_triton_is_told_the_settings() -> None:
    config = triton_config({"workers": 2, "wait_us": 50, "batch": 16})
    assert "max_batch_size: 16" in config
    assert "count: 2 " in config
    assert "max_queue_delay_microseconds: 50 " in config


def test_an_environment_is_made_once_and_anew_for_other_versions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[tuple[str, ...]] = []

    def run(name: str, *command: str) -> None:
        commands.append(command)
        (tmp_path / name).mkdir(exist_ok=True)

    monkeypatch.setattr(environments, "_run", run)
    python = environments.environment("mosec", tmp_path)
    assert python == tmp_path / "mosec" / "bin" / "python"
    assert [command[1:3] for command in commands] == [("-m", "venv"), ("-m", "pip")]
    assert environments.environment("mosec", tmp_path) == python
    assert len(commands) == 2
    (tmp_path / "mosec" / environments.MARK).write_text("mosec==0.1\n")
    environments.environment("mosec", tmp_path)
    assert len(commands) == 4


def test_an_environment_that_cannot_be_made_is_told_with_pips_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\necho 'ERROR: no matching distribution' >&2\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    with pytest.raises(BenchmarkError, match=r"mosec: its environment can't be made.*failed:\nERROR: no matching"):
        environments.environment("mosec", tmp_path / "there")


def test_every_requirement_is_pinned() -> None:
    for name, framework in FRAMEWORKS.items():
        lines = environments.requirements(name).split()
        assert all("==" in line for line in lines)
        assert {framework.package, "onnxruntime", "numpy", "simplejpeg"} <= {line.partition("==")[0] for line in lines}


def contender(title: str, *settings: str) -> Contender:
    """One that can't be started."""
    return Contender(title, [Candidate(text, lambda: pytest.fail("it is not started")) for text in settings], ())


def test_the_table_compares_each_round_with_ours_and_has_the_spread() -> None:
    contenders = [contender(OURS, "a"), contender("Fake", "b")]
    for item, rounds in zip(contenders, ((30, 20, 40), (10, 10, 10)), strict=True):
        for answers in rounds:
            sent = records(*((index, 200, b"{}") for index in range(answers)))
            item.summaries.append(summarize(Load(sent, 0.0, 100.0, server_cpu_seconds=1.0)))
        item.memory_bytes = [2**20]
    ours, other = rows_of(contenders, 64)
    assert (ours["server"], ours["settings"], ours["ours_by_it"], ours["connections"]) == (OURS, "a", 1, 64)
    assert [other[f"ours_by_it{which}"] for which in ("", "_min", "_max")] == pytest.approx([3, 2, 4])
    assert [ours[f"images_per_s{which}"] for which in ("", "_min", "_max")] == pytest.approx([0.3, 0.2, 0.4])
    assert other["server_cpu_ms"] == pytest.approx(100)
    assert other["memory_mib"] == 1
    assert join_spread(ours)["images_per_s"] == "0.3 (0.2 to 0.4)"


def test_every_round_begins_with_another_server(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []

    def find(item: Contender, **_: object) -> None:
        item.candidates[1].found = 7.0

    monkeypatch.setattr(command, "search", find)
    monkeypatch.setattr(command, "measure", lambda item, **_: order.append(f"{item.title} {item.best.settings}"))
    contenders = [contender(title, "a", "b") for title in (OURS, "A", "B")]
    found = compare(contenders, 8, parse_arguments(["--rounds", "4"]), Expected([], re.compile(b"")))
    assert found["A, connections=8"] == "a: 0; b: 7"
    ours = f"{OURS} b"
    assert order == [ours, "A b", "B b", "A b", "B b", ours, "B b", ours, "A b", ours, "A b", "B b"]


@linux
def test_a_rival_that_answers_wrongly_is_left_out_and_the_others_stay(capsys: pytest.CaptureFixture[str]) -> None:
    server = RivalServer(fake(FAKE_RIVAL), Path(sys.executable), MODEL, request(b"x"))  # answers "7" to everything
    contenders = [Contender("Fake", [Candidate("a", lambda: server)], [request(b"x")])]
    expected = Expected([b'"class 7"'], re.compile(rb'"class \d+"'))
    run_each(contenders, 0, partial(search, connections=1, args=parse_arguments([]), expected=expected))
    assert contenders == []
    assert "Fake with a is left out: Fake: not every answer is right: {'wrong_label': 1}" in capsys.readouterr().err


@linux
@pytest.mark.parametrize("generator", ["python", "wrk"])
def test_a_search_finds_what_each_candidate_answers(generator: str) -> None:
    if generator == "wrk" and shutil.which("wrk") is None:
        pytest.skip("there is no wrk on PATH")
    server = RivalServer(fake(FAKE_RIVAL), Path(sys.executable), MODEL, request(b"x"))
    item = Contender("Fake", [Candidate("a", lambda: server)], [request(b"x"), request(b"yy" * 4096)])
    options = ["--generator", generator, "--search-seconds", "1"]
    search(item, 2, parse_arguments(options), Expected([b"7"] * 2, re.compile(b"7")))
    assert item.best.found > 0


def test_without_wrk_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(BenchmarkError, match="--generator wrk: PATH has no wrk; install it"):
        find_wrk()


@pytest.mark.skipif(shutil.which("wrk") is None, reason="there is no wrk on PATH")
def test_wrk_counts_what_is_no_success(tmp_path: Path) -> None:
    server = ("-c", REFUSING_SERVER)
    with Server(MODEL, command=server) as refusing:
        summary = run_wrk(refusing.port, [request(b"x")], 2, seconds=1, warmup_s=0)
    assert summary.answered == 0
    assert summary.errors == {"status": summary.requests}
    with pytest.raises(BenchmarkError, match=r"wrk failed: unable to connect to 127\.0\.0\.1"):
        run_wrk(refusing.port, [request(b"x")], 2, seconds=1, warmup_s=0)
