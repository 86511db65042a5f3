"""What the tests of the command line share: a tiny recipe, and a way to act at a chosen step."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from tests.training.tiny import FLAGS
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
