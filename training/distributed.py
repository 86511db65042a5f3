"""One process, or one of several that ``torchrun`` started."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class World:
    """This process among its peers."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and shows progress."""
        return self.rank == 0

    def share(self, count: int) -> slice:
        """This process's part of ``count`` pictures; ``count`` is a multiple of the size."""
        part = count // self.size
        return slice(self.rank * part, (self.rank + 1) * part)

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value (any picklable object of our own making), everywhere."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process."""
        if self.size == 1:
            return flag
        tensor = torch.tensor(float(flag), device=self.device)
        dist.all_reduce(tensor)
        return tensor.item() > 0

    def mean(self, value: torch.Tensor) -> torch.Tensor:
        """Mean of a scalar tensor over the processes."""
        if self.size > 1:
            dist.all_reduce(value)
            value /= self.size
        return value


def join(device: str) -> World:
    """Join the process group that ``torchrun``'s environment describes, or be alone.

    Args:
        device: "auto" (CUDA where there is one), "cpu" or "cuda".

    Raises:
        ValueError: CUDA was asked for and there is none.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no CUDA device; use --device cpu, or install torch's CUDA build.")
    kind = device if device != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")
    local = int(os.environ.get("LOCAL_RANK", "0"))
    where = torch.device(kind, local) if kind == "cuda" else torch.device("cpu")
    if kind == "cuda":
        torch.cuda.set_device(where)
        torch.set_float32_matmul_precision("high")
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size > 1:
        dist.init_process_group("nccl" if kind == "cuda" else "gloo")
        return World(dist.get_rank(), size, where)
    return World(0, 1, where)


def leave(world: World) -> None:
    """Leave the process group."""
    if world.size > 1:
        dist.destroy_process_group()
