"""A training step keeps to its device and never waits for it: seen on meta, a device of which no value can be read."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.training.tiny import DROPOUT, data_set, run_config, with_teacher
from training.config import PRESETS
from training.distributed import World
from training.train import Trainer

META = World(0, 1, torch.device("meta"))
MODEL = {"cross_scale", "cross_output", "cross_position_bias", "residual", "sharing", "head_hidden", "head_norm"}
MIXED: dict[str, Any] = {"mixup": 0.4, "cutmix": 1.0, "mix_probability": 0.7, "crop_padding": 2, "zoom": 0.2}


class OneDevice(TorchDispatchMode):
    """Refuses what meta tensors let pass and a GPU does not: operations on two devices (matrix products, indices), and
    copies between them that the process waits for.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        given, made = ([x for x in tree_leaves(tree) if isinstance(x, torch.Tensor)] for tree in ((args, kwargs), out))
        if func._schema.name in ("aten::_to_copy", "aten::copy_"):
            waits = not (kwargs.get("non_blocking") or any(arg is True for arg in args))
            assert len({x.device for x in given + made}) == 1 or not waits, f"{func} makes the process wait"
        else:
            # A single number of the CPU is passed by value.
            assert len({x.device for x in given if x.ndim}) < 2, f"{func} of tensors on two devices"
        return out


@pytest.mark.parametrize(
    ("preset", "optimizer", "taught"),
    [("reference", "lamb", False), ("compact", "muon", False), ("compact", "muon", True), ("accurate", "adamw", False)],
)
def test_a_step_keeps_to_its_device(
    preset: str, optimizer: str, taught: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: nullcontext())  # meta has none
    model = PRESETS[preset].model.model_dump(include=MODEL) | DROPOUT | {"num_blocks": 2}
    recipe = MIXED | {"trivial_augment": 0.5, "ema_decay": 0.9, "clip_norm": 1.0, "optimizer": optimizer}
    run = run_config(model, **recipe)
    trainer = Trainer(with_teacher(run) if taught else run, data_set(), tmp_path, META)
    trainer.state.model.train()
    with OneDevice():
        for _ in range(4):  # mixed and not
            trainer.one_step(torch.arange(8, device="meta"))
    assert trainer.state.step == 4
