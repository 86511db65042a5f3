"""The precision of a run: bfloat16 only where the processor computes in it, and what a run began with stays."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.training.commands import RECIPE, fake_cpu
from training import checkpoint
from training.__main__ import main
from training.precision import ISAS_WITHOUT_BFLOAT16, ONEDNN_LIMIT, choose_precision, computes_in_bfloat16

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("instructions", "expected"),
    [
        ((), "float32"),
        (("avx512_f",), "float32"),
        (("avx512_f", "amx_tile"), "float32"),
        (("avx512_f", "avx512_bf16"), "bfloat16"),
        (("avx512_f", "amx_tile", "amx_bf16"), "bfloat16"),
    ],
)
def test_auto_follows_the_cpu(monkeypatch: pytest.MonkeyPatch, instructions: tuple[str, ...], expected: str) -> None:
    fake_cpu(monkeypatch, *instructions)
    assert choose_precision("auto", CPU) == expected


def test_a_cpu_of_another_kind_takes_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"architecture": "aarch64", "bf16": True})
    assert choose_precision("auto", CPU) == "float32"


@pytest.mark.parametrize("isa", [*sorted(ISAS_WITHOUT_BFLOAT16), "avx2"])
def test_auto_follows_what_onednn_is_held_to(monkeypatch: pytest.MonkeyPatch, isa: str) -> None:
    fake_cpu(monkeypatch, "avx512_bf16", "amx_bf16")
    for limit, expected in ((isa, False), ("AVX512_CORE_BF16", True), ("DEFAULT", True)):
        monkeypatch.setenv(ONEDNN_LIMIT, limit)
        assert computes_in_bfloat16(CPU) == expected


@pytest.mark.parametrize(
    ("capability", "expected"), [((7, 5), "float32"), ((8, 0), "bfloat16"), ((8, 6), "bfloat16"), ((12, 0), "bfloat16")]
)
def test_auto_follows_the_gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], expected: str) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: capability)
    assert choose_precision("auto", CUDA) == expected


@pytest.mark.parametrize("native", [True, False])
def test_what_is_asked_for_is_taken(monkeypatch: pytest.MonkeyPatch, native: bool) -> None:
    fake_cpu(monkeypatch, *(["avx512_bf16"] if native else []))
    assert choose_precision("float32", CPU) == "float32"
    assert choose_precision("bfloat16", CPU) == "bfloat16"


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.usefixtures("without_figures")
def test_a_run_says_and_keeps_the_precision_that_it_began_with(
    tmp_path: Path, image_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], native: bool
) -> None:
    fake_cpu(monkeypatch, *(["avx512_bf16"] if native else []))
    run = tmp_path / "run"
    taken = "bfloat16" if native else "float32"
    assert main([*RECIPE, "--data", str(image_dir), "--out", str(run), "--max-steps=1"]) == 3
    does = "computes" if native else "does not compute"
    assert f"\nprecision {taken}, since the cpu device {does} in bfloat16\n" in capsys.readouterr().out
    assert json.loads((run / "config.json").read_text())["train"]["precision"] == taken
    assert checkpoint.load(run / "last.safetensors")[1].run.train.precision == taken
    fake_cpu(monkeypatch, *([] if native else ["avx512_bf16"]))  # as on another machine
    assert main(["--resume", str(run), "--max-steps=2", "--threads=1"]) == 3
    slow = "; the device emulates it, many times slower than float32" if native else ""
    assert f"\nprecision {taken}, as the run began{slow}\n" in capsys.readouterr().out
    assert checkpoint.load(run / "last.safetensors")[1].run.train.precision == taken


def test_asked_for_where_it_is_emulated_bfloat16_is_said_to_be_slow(
    tmp_path: Path, image_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_cpu(monkeypatch)
    flags = ["--data", str(image_dir), "--out", str(tmp_path / "run"), "--max-steps=1", "--precision=bfloat16"]
    assert main([*RECIPE, *flags]) == 3
    assert "\nprecision bfloat16, as asked for; the device emulates it" in capsys.readouterr().out
