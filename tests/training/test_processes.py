"""Processes that share each batch: how many are started, and that they stop, resume and fail as one does."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing

from tests.training.commands import RECIPE
from training import checkpoint, processes
from training.cli import build_parser
from training.metrics_log import read_metrics
from training.processes import count_processes
from training.run import status_or_error

TWO = [flag for flag in RECIPE if not flag.startswith("--threads")] + ["--processes=2"]


def count(flags: list[str], *batch_sizes: int) -> int:
    return count_processes(build_parser().parse_args(flags), batch_sizes)


@pytest.fixture
def eight_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)


@pytest.mark.usefixtures("eight_cores")
def test_a_process_for_each_core_with_a_fair_share_of_the_batch() -> None:
    assert count([], 1024) == 8
    assert count([], 256) == 4  # 64 images each
    assert count([], 192) == 3
    assert count([], 250) == 2  # which divides it
    assert count([], 256, 128) == 2  # for every stage
    assert count([], 127) == count([], 8) == 1


@pytest.mark.usefixtures("eight_cores")
def test_flags_decide() -> None:
    assert count(["--processes", "2"], 256) == count(["--processes", "2", "--threads", "1"], 8) == 2
    assert count(["--processes", "1"], 256) == count(["--threads", "1"], 256) == 1


def test_a_core_or_a_gpu_has_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert count([], 256) == 1
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert count([], 256) == 1
    assert count(["--device", "cpu"], 256) == 2
    with pytest.raises(ValueError, match=r"--processes 2: is for CPUs \(--device cpu\)"):
        count(["--processes", "2"], 256)


@pytest.mark.usefixtures("eight_cores")
def test_that_there_is_no_gpu_is_said_by_one() -> None:
    assert count(["--device", "cuda"], 256) == 1
    with pytest.raises(ValueError, match=r"--processes 2: is for CPUs \(--device cpu\)"):
        count(["--device", "cuda", "--processes", "2"], 256)


@pytest.mark.usefixtures("eight_cores")
def test_beside_torchrun_none_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert count([], 256) == 1
    with pytest.raises(ValueError, match="--processes 2: torchrun starts the processes here; leave it out"):
        count(["--processes", "2"], 256)


class LeftError(Exception):
    """The process would be gone, with this status."""


def run_one(rank: int, main: Callable[..., int], folder: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """The status with which one of two processes ends."""

    def leave(status: int) -> None:
        raise LeftError(status)

    monkeypatch.setenv("RANK", "")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "")
    monkeypatch.setattr(os, "setpgid", lambda pid, group: None)
    monkeypatch.setattr(os, "_exit", leave)
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **options: None)
    monkeypatch.setattr("training.__main__.main", main)
    with pytest.raises(LeftError) as left:
        processes._run_one(rank, [], 2, 1, str(folder / "meeting"))
    return int(left.value.args[0])


@pytest.mark.parametrize(
    ("status", "first", "other"), [(0, 0, 0), (1, 1, 1), (2, 2, 2), (3, 3, 0), (130, 130, 0)], ids=str
)
def test_a_process_leaves_at_once(
    status: int, first: int, other: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """gloo's threads now and then abort one that takes its time, and a whole run would count as failed."""
    assert [run_one(rank, lambda argv: status, tmp_path, monkeypatch) for rank in (0, 1)] == [first, other]


def test_an_interrupt_before_all_have_met_is_no_good_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(argv: Sequence[str]) -> int:
        raise KeyboardInterrupt

    assert run_one(0, interrupt, tmp_path, monkeypatch) == 130


EXITED = torch.multiprocessing.ProcessExitedException("ended", 0, 1, 1)
RAISED = torch.multiprocessing.ProcessRaisedException("Connection closed by peer", 1, 1)


@pytest.mark.parametrize(
    ("error", "codes", "status", "said"),
    [
        (EXITED, [3, 0], 3, ""),
        (EXITED, [1, 1], 1, ""),
        (RAISED, [0, 1], 1, "Connection closed by peer\n"),
        (RAISED, [2, 1], 2, ""),  # the first has said it, and the other that the first has gone
        (RAISED, [1, 2], 2, ""),
        (EXITED, [-signal.SIGINT, -signal.SIGINT], 130, ""),  # while torch was imported
        (EXITED, [-signal.SIGTERM, 0], 143, ""),
        (RAISED, [1, -signal.SIGKILL], 1, f"error: process 2 of 2 was ended by SIGKILL.{processes.MEMORY}\n"),
        (RAISED, [-signal.SIGSEGV, 1], 1, "error: process 1 of 2 was ended by SIGSEGV.\n"),
    ],
    ids=str,
)
def test_why_the_processes_have_ended(
    error: Exception, codes: list[int], status: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert processes._explain(error, codes) == status
    assert capsys.readouterr().err == said


def test_what_all_notice_is_said_once(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def diverge() -> int:
        raise FloatingPointError("the training loss became nan")

    statuses = []
    for rank in (0, 1):
        monkeypatch.setenv("RANK", str(rank))
        statuses.append(status_or_error(diverge))
    assert statuses == [1, 1]
    assert capsys.readouterr().err == "error: the training loss became nan\n"


@contextmanager
def started(*flags: str | Path) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "training", *map(str, flags)]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def wait_for_epoch(process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None
    while not process.stdout.readline().startswith("epoch   1"):
        assert process.poll() is None


def children(pid: int) -> list[int]:
    """Those that train: the other child of `multiprocessing` tracks resources."""
    every = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(each) for each in every if b"spawn_main" in Path(f"/proc/{each}/cmdline").read_bytes()]


def wait_for_states(pids: Sequence[int], *, suspended: bool) -> None:
    """Return when all of the processes are suspended, or none is."""
    while any((state(pid) == "T") != suspended for pid in pids):
        time.sleep(0.01)


def state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def test_ctrl_z_suspends_all_and_ctrl_c_stops_them_and_the_command_that_is_told_goes_on(
    tmp_path: Path, image_dir: Path
) -> None:
    run = tmp_path / "run"
    with started(*TWO, "--data", image_dir, "--out", run, "--epochs=1000") as process:
        wait_for_epoch(process)
        every = [process.pid, *children(process.pid)]
        assert len(every) == 3
        os.killpg(process.pid, signal.SIGTSTP)
        wait_for_states(every, suspended=True)
        os.killpg(process.pid, signal.SIGCONT)
        wait_for_states(every, suspended=False)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        output, error = process.communicate(timeout=240)
    assert process.returncode == 3, error
    (again,) = re.findall("go on with: python -m training (.*)", output)
    assert again == f"--resume {run} --processes 2 --threads 1 --device cpu"
    assert "Traceback" not in error
    assert "leaked" not in error
    step = checkpoint.load(run / "last.safetensors")[1].step
    epochs = len(read_metrics(run))
    with started(*shlex.split(again), f"--max-steps={3 * epochs + 3}") as process:
        output, error = process.communicate(timeout=240)
    assert process.returncode == 3, error
    assert "2 x cpu" in output
    assert checkpoint.load(run / "last.safetensors")[1].step == 3 * epochs + 3 > step
    assert {(line["processes"], line["threads"]) for line in read_metrics(run)} == {(2, 1)}


def test_what_is_wrong_is_said_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "with a blank").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "with a blank"))  # where the processes meet
    with started(*TWO, "--data", tmp_path / "nowhere", "--out", tmp_path / "run") as process:
        output, error = process.communicate(timeout=240)
    assert (process.returncode, output) == (2, "")
    assert re.fullmatch(r"error: .*nowhere: does not exist.*\n", error)


def test_when_one_is_killed_the_run_fails_and_none_is_left(tmp_path: Path, image_dir: Path) -> None:
    with started(*TWO, "--data", image_dir, "--out", tmp_path / "run", "--epochs=1000") as process:
        wait_for_epoch(process)
        both = children(process.pid)
        os.kill(both[1], signal.SIGKILL)
        _, error = process.communicate(timeout=240)
    assert process.returncode == 1
    assert len(both) == 2
    assert "error: process 2 of 2 was ended by SIGKILL. " in error
    assert not any(Path(f"/proc/{pid}").exists() for pid in both)
