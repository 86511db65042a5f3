"""Two gloo processes under ``torchrun``: as one process with twice the batch, and agreed in all they do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.training import two_processes
from tests.training.tiny import ALONE, write_images
from training import checkpoint, distributed
from training.__main__ import main
from training.distributed import World, join
from training.metrics_log import read_metrics

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder that the two processes wrote, and what they said on stderr."""
    folder = tmp_path_factory.mktemp("pair")
    write_images(folder / "images")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    with subprocess.Popen(
        [*torchrun, "-m", "tests.training.two_processes", str(folder)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    ) as process:
        try:
            _, error = process.communicate(timeout=600)  # on a busy machine
        except subprocess.TimeoutExpired:
            process.terminate()  # and not killed, so that it ends its two processes
            raise
    assert process.returncode == 0, error
    return folder, error


def seen(folder: Path, rank: int) -> dict[str, Any]:
    return json.loads((folder / str(rank) / "seen.json").read_text())


@pytest.mark.parametrize("name", ["plain", "rich"])
def test_both_processes_end_with_the_same_weights(pair: tuple[Path, str], name: str) -> None:
    one, other = (load_file(pair[0] / str(rank) / f"{name}.safetensors") for rank in (0, 1))
    assert one.keys() == other.keys()
    assert all(torch.equal(tensor, other[key]) for key, tensor in one.items())


@pytest.mark.usefixtures("without_figures")
def test_two_processes_train_as_one_with_twice_their_batch(pair: tuple[Path, str], tmp_path: Path) -> None:
    alone = two_processes.trainer_in(tmp_path, ALONE, two_processes.NO_BIAS, two_processes.PLAIN)
    before = two_processes.weights(alone)
    alone.fit()
    together = load_file(pair[0] / "0" / "plain.safetensors")
    for name, weight in two_processes.weights(alone).items():
        torch.testing.assert_close(together[name], weight, atol=2e-5, rtol=1e-4)
        assert not torch.equal(before[name], weight)
    expected, found = read_metrics(tmp_path), read_metrics(pair[0] / "plain")
    assert len(expected) == len(found) == 2
    for one, other in zip(expected, found, strict=True):
        for key in ("step", "train_loss", "val_loss", "val_top1", "learning_rate"):
            assert other[key] == pytest.approx(one[key], rel=1e-5), key


def test_processes_that_stopped_go_on_bit_for_bit(pair: tuple[Path, str]) -> None:
    folder = pair[0]
    assert seen(folder, 0)["stopped"] == seen(folder, 1)["stopped"] == [False, 7]
    whole, stopped = (checkpoint.load(folder / name / "last.safetensors")[0] for name in ("rich", "stopped"))
    assert all(torch.equal(tensor, stopped[name]) for name, tensor in whole.items())
    for one, other in zip(read_metrics(folder / "rich"), read_metrics(folder / "stopped"), strict=True):
        # The two processes' losses are added in another order.
        assert other["train_loss"] == pytest.approx(one["train_loss"], rel=1e-6)
        assert other["val_loss"] == one["val_loss"]


def test_when_one_is_asked_to_stop_both_do(pair: tuple[Path, str]) -> None:
    assert [seen(pair[0], rank)["asked"] for rank in (0, 1)] == [[False, 0], [False, 0]]
    assert (pair[0] / "asked" / "last.safetensors").exists()


def test_after_a_stop_none_leaves_before_the_checkpoint_is_written(pair: tuple[Path, str]) -> None:
    """torchrun kills what is left 30 s after the first has ended."""
    (written, _), (left,) = (seen(pair[0], rank)["slow"] for rank in (0, 1))
    assert left > written


def test_the_first_says_what_is_wrong_and_the_other_follows(pair: tuple[Path, str]) -> None:
    folder, stderr = pair
    assert [seen(folder, rank)["refused"] for rank in (0, 1)] == ["ValueError", "PeerFailed"]
    assert [seen(folder, rank)["commands"] for rank in (0, 1)] == [{"run": 0, "no data": 2, "odd batch": 2}] * 2
    errors = [line for line in stderr.splitlines() if "error: " in line]
    assert len(errors) == 2
    assert "nowhere: does not exist" in errors[0]
    assert "a batch of 9 images can't be shared by 2 processes: make --batch-size a multiple of 2." in errors[1]
    assert "Traceback" not in stderr


def test_a_value_with_tensors_arrives_whole(pair: tuple[Path, str]) -> None:
    expected = [[[0, 1, 2], [3, 4, 5]], [[0, 3], [1, 4], [2, 5]], "torch.float32", 3]
    assert [seen(pair[0], rank)["broadcast"] for rank in (0, 1)] == [expected] * 2


def test_the_command_leaves_one_run(pair: tuple[Path, str]) -> None:
    run = pair[0] / "run"
    assert [line["epoch"] for line in read_metrics(run)] == [1]
    assert json.loads((run / "report.json").read_text())["test"]["n"] == 6
    assert len(list((run / "tensorboard").iterdir())) == 1


class LeftAtOnceError(Exception):
    """The process would be gone."""


@pytest.mark.parametrize(
    ("device", "failed_with", "ends"), [("cuda", 2, True), ("cuda", None, False), ("cpu", 2, False)]
)
def test_with_nccl_who_fails_ends_at_once_and_says_why(
    device: str,
    failed_with: int | None,
    ends: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Its peers wait for it in a collective operation, and NCCL's own farewell would wait for them."""
    left: list[str] = []

    def leave_at_once(status: int) -> None:
        raise LeftAtOnceError(status)

    monkeypatch.setattr(os, "_exit", leave_at_once)
    monkeypatch.setattr(distributed.dist, "destroy_process_group", lambda: left.append("group"))

    def work() -> None:
        try:
            raise RuntimeError("no room")
        finally:
            distributed.shut_down(World(1, 2, torch.device(device)), failed_with)

    with pytest.raises(LeftAtOnceError if ends else RuntimeError, match="2" if ends else "no room"):
        work()
    assert left == ([] if ends else ["group"])
    assert ("RuntimeError: no room" in capsys.readouterr().err) == ends


def test_shares_are_equal_and_leave_nothing_out() -> None:
    parts = [World(rank, 4, torch.device("cpu")).share(12) for rank in range(4)]
    assert [index for part in parts for index in range(12)[part]] == list(range(12))
    with pytest.raises(ValueError, match="a batch of 10 images can't be shared by 4 processes"):
        World(0, 4, torch.device("cpu")).share(10)


def test_a_process_without_torchrun_is_alone() -> None:
    assert join("cpu") == ALONE


@pytest.mark.parametrize(
    ("call", "said", "reason"),
    [
        # What torch says on a driver of CUDA 12, on a V100, and beside a process that has the device for itself.
        (
            "set_device",
            "The NVIDIA driver on your system is too old (found version 12040). Please update your GPU driver.",
            "The NVIDIA driver on your system is too old (found version 12040). Please update your GPU driver",
        ),
        (
            "ones",
            "CUDA error: no kernel image is available for execution on the device\nSearch for it.\n",
            "CUDA error: no kernel image is available for execution on the device",
        ),
        (
            "set_device",
            "CUDA error: CUDA-capable device(s) is/are busy or unavailable\n",
            "CUDA error: CUDA-capable device(s) is/are busy or unavailable",
        ),
    ],
    ids=["driver", "kernels", "busy"],
)
@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_a_device_that_the_driver_counts_and_torch_can_not_use_is_told_in_a_sentence(
    device: str,
    call: str,
    said: str,
    reason: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def refuses(*_args: Any, **_kwargs: Any) -> None:
        raise RuntimeError(said)

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda if call == "set_device" else torch, call, refuses)
    assert main(["--preset=compact", "--device", device, "--out", str(tmp_path / "run")]) == 2
    assert f"error: CUDA device 0 can't be used: {reason}. --device cpu does without.\n" == capsys.readouterr().err
