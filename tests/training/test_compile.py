"""``--compile``: the whole step is one graph, is not compiled anew for every draw, and computes what eager does."""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from tests.training.tiny import ALONE, data_set, run_config, with_teacher
from training.train import Trainer, epoch_order

MIXED: dict[str, Any] = {"mixup": 0.4, "cutmix": 1.0, "mix_probability": 0.7, "crop_padding": 2, "zoom": 0.2}
FULL = "TEST_INDUCTOR"


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


def loss_of_steps(folder: Path, model: dict[str, object], steps: int, *, taught: bool = False, **train: Any) -> float:
    """The summed loss of the first steps of a run."""
    run = run_config(model, optimizer="adamw", epochs=20, **train)
    trainer = Trainer(with_teacher(run) if taught else run, data_set(), folder, ALONE)
    for indices in epoch_order(0, 0, 40, 8).repeat(4, 1)[:steps]:
        trainer.one_step(indices)
    return trainer.state.loss_sum.item()


@pytest.mark.parametrize("taught", [False, True])
def test_a_compiled_step_is_one_graph_with_the_same_loss(
    taught: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Captures the graph, and leaves out the C++ compiler, which takes most of a minute for it.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    model: dict[str, object] = {"num_iterations": 1, "latent_dropout": 0.5, "cross_position_bias": True}
    expected = loss_of_steps(tmp_path, model, 12, taught=taught, **MIXED)
    assert not counters["stats"]
    found = loss_of_steps(tmp_path, model, 12, taught=taught, compile=True, **MIXED)
    assert found == pytest.approx(expected, rel=1e-5)
    # One with and one without a mix, whatever is drawn.
    assert counters["stats"]["unique_graphs"] == 2
    assert not counters["graph_break"]


@pytest.mark.skipif(FULL not in os.environ, reason=f"compiling C++ takes a minute or two of CPU: set {FULL}=1")
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="torch.compile needs a C++ compiler")
# Of torch's own making, when it imports its compiler.
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_compiled_code_computes_the_same_loss(tmp_path: Path) -> None:
    small: dict[str, object] = {"num_blocks": 0, "num_iterations": 1}
    assert loss_of_steps(tmp_path, small, 3, compile=True) == pytest.approx(loss_of_steps(tmp_path, small, 3), rel=1e-5)
