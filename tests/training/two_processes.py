"""What `test_distributed` lets ``torchrun`` start twice: each process writes what it sees to ``FOLDER/<rank>/``."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tests.training.tiny import DROPOUT, FLAGS, data_set, run_config
from training import report, run
from training.__main__ import main
from training.distributed import PeerFailed, World, join, shut_down
from training.train import Trainer

# The bias of a key changes nothing, so its gradient is rounding alone, of which Adam makes full steps.
NO_BIAS: dict[str, object] = {"bias": False}
PLAIN: dict[str, Any] = {"optimizer": "adamw", "learning_rate": 0.01, "epochs": 2, "crop_padding": 2, "zoom": 0.2}
# With all that makes processes differ.
RICH: dict[str, Any] = {"optimizer": "muon", "learning_rate": 0.01, "epochs": 2, "ema_decay": 0.8, "cutmix": 1.0}


def trainer_in(folder: Path, world: World, model: dict[str, object], train: dict[str, Any]) -> Trainer:
    folder.mkdir(parents=True, exist_ok=True)
    return Trainer(run_config(model, **train), data_set(), folder, world)


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    parts = {"model": trainer.state.model, "evaluated": trainer.state.evaluated}
    return {f"{part}.{name}": t.clone() for part, module in parts.items() for name, t in module.state_dict().items()}


def failing_first(world: World) -> str:
    """How the processes learn that the first could not begin."""

    def refuse() -> None:
        raise ValueError("no")

    try:
        world.run_on_main(refuse)
    except (ValueError, PeerFailed) as error:
        return type(error).__name__
    return "nothing"


def train(folder: Path, mine: Path, world: World) -> dict[str, object]:
    """Train in several ways; returns what this process alone knows."""
    plain = trainer_in(folder / "plain", world, NO_BIAS, PLAIN)
    plain.fit()
    save_file(weights(plain), mine / "plain.safetensors")
    rich = trainer_in(folder / "rich", world, DROPOUT, RICH)
    rich.fit()
    save_file(weights(rich), mine / "rich.safetensors")
    first = trainer_in(folder / "stopped", world, DROPOUT, RICH)
    stopped = first.fit(max_steps=7)
    second = trainer_in(folder / "stopped", world, DROPOUT, RICH)
    second.resume()
    second.fit()
    asked = trainer_in(folder / "asked", world, NO_BIAS, PLAIN)
    # The process that writes nothing asks, and the other must follow.
    asked.stop_requested = not world.is_main
    asked_result = asked.fit()
    slow = trainer_in(folder / "slow", world, NO_BIAS, PLAIN)
    slow.state.save_last = lambda path, val: time.sleep(0.5) or times.append(time.monotonic())  # type: ignore[method-assign]
    times: list[float] = []
    slow.fit(max_steps=1)
    times.append(time.monotonic())
    seen = {"stopped": [stopped, first.state.step], "asked": [asked_result, asked.state.step], "slow": times}
    return {**seen, "refused": failing_first(world), "broadcast": broadcast(world)}


def broadcast(world: World) -> list[object]:
    """What arrives of the first's value, tensors among it, where the other has nothing."""
    grid = torch.arange(6, dtype=torch.uint8).view(2, 3)
    value = world.broadcast({"grid": grid, "turned": [grid.T], "none": torch.empty(0), "n": 3} if world.is_main else {})
    return [value["grid"].tolist(), value["turned"][0].tolist(), str(value["none"].dtype), value["n"]]


def commands(folder: Path, world: World) -> dict[str, object]:
    """Exit statuses of the command itself, in the process group that is there: torch can't join one a second time."""
    run.join, run.shut_down = lambda device: world, lambda world, failed_with: None
    if not world.is_main:
        run.load_for = lambda preset, path: sys.exit("reads what the first has read already")
    flags = [*FLAGS, "--device=cpu", "--epochs=1", "--batch-size=8"]
    return {
        "run": main([*flags, "--data", str(folder / "images"), "--out", str(folder / "run")]),
        "no data": main([*flags, "--data", str(folder / "nowhere")]),
        "odd batch": main([*flags, "--data", str(folder / "images"), "--batch-size=9"]),
    }


def all_of_it(folder: Path) -> None:
    torch.set_num_threads(1)
    mine = folder / os.environ["RANK"]
    mine.mkdir()
    report.save_curves = lambda lines, path, best_by: None
    world = join("cpu")
    seen = train(folder, mine, world) | {"commands": commands(folder, world)}
    (mine / "seen.json").write_text(json.dumps(seen))
    torch.distributed.barrier()  # neither tears the group down while the other still talks
    shut_down(world)
    sys.stderr.flush()
    # gloo's threads outlive the group and now and then abort a process that takes its time to exit ("terminate called
    # without an active exception"); everything that is tested has been written by now.
    os._exit(0)


if __name__ == "__main__":
    all_of_it(Path(sys.argv[1]))
