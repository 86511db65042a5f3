"""What the tests of the command line share: a tiny recipe, a way to act at a chosen step, a faked processor."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from tests.training.tiny import FLAGS
from training.precision import ONEDNN_LIMIT
from training.train import Trainer

RECIPE = [*FLAGS, "--epochs=2", "--batch-size=8", "--threads=1", "--device=cpu"]


def at_step(monkeypatch: pytest.MonkeyPatch, number: int, act: Callable[[], object]) -> None:
    """Act when ``number`` steps are done."""
    one_step = Trainer.one_step

    def step_and_act(self: Trainer, indices: torch.Tensor) -> None:
        one_step(self, indices)
        if self.state.step == number:
            act()

    monkeypatch.setattr(Trainer, "one_step", step_and_act)


def fake_cpu(monkeypatch: pytest.MonkeyPatch, *instructions: str) -> None:
    """A CPU with AVX2, and with these instructions."""
    monkeypatch.delenv(ONEDNN_LIMIT, raising=False)
    known = dict.fromkeys(("avx512_f", "avx512_bf16", "amx_tile", "amx_bf16"), False) | {"avx2": True, "cpu_name": "x"}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: known | dict.fromkeys(instructions, True))
