"""One process, or one of several that `training.processes` or ``torchrun`` started."""

from __future__ import annotations

import io
import os
import pickle
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from training.allocator import keep_freed_memory

T = TypeVar("T")

# Rank 0 may download or read a large folder of images while the others wait, for which NCCL would have ten minutes.
PROCESS_GROUP_TIMEOUT = timedelta(hours=2)


class PeerFailed(Exception):  # noqa: N818 -- says what happened, elsewhere
    """Rank 0 failed, and has said why."""


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

    @property
    def hardware(self) -> str:
        """The kind of device: a GPU's name, or cpu."""
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type

    def share(self, count: int) -> slice:
        """This process's part of a batch of ``count`` images.

        Raises:
            ValueError: the processes can't have equal parts.
        """
        part, rest = divmod(count, self.size)
        if rest:
            raise ValueError(
                f"a batch of {count} images can't be shared by {self.size} processes: "
                f"make --batch-size a multiple of {self.size}."
            )
        return slice(self.rank * part, (self.rank + 1) * part)

    def broadcast(self, value: T) -> T:
        """Rank 0's value (a picklable object of our own making), everywhere; tensors in it arrive on the CPU."""
        if self.size == 1:
            return value
        stream, tensors = _pickled(value) if self.is_main else (b"", [])
        box = [stream]
        dist.broadcast_object_list(box, src=0)
        if not self.is_main:
            value, tensors = _unpickled(box[0])
        for tensor in tensors:
            on_device = tensor.to(self.device)
            dist.broadcast(on_device, src=0)
            if not self.is_main and on_device is not tensor:
                tensor.copy_(on_device)
        return value

    def run_on_main(self, work: Callable[[], T]) -> T:
        """Do ``work`` in rank 0, which may download, read, and refuse; returns its result everywhere.

        Raises:
            PeerFailed: in the others, when ``work`` has raised in rank 0.
        """
        if not self.is_main:
            results = self.broadcast([])
            if not results:
                raise PeerFailed
            return results[0]
        results = []
        try:
            results.append(work())
            return results[0]
        finally:
            self.broadcast(results)

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process."""
        if self.size == 1:
            return flag
        tensor = torch.tensor(float(flag), device=self.device)
        dist.all_reduce(tensor)
        return tensor.item() > 0

    def mean(self, value: Tensor) -> Tensor:
        """Mean of a tensor over the processes."""
        if self.size == 1:
            return value
        total = value.clone()
        dist.all_reduce(total)
        return total / self.size

    def barrier(self) -> None:
        """Wait until all processes are here."""
        self.any(False)

    def synchronize(self) -> None:
        """Wait for what the device still has to do."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


class _Pickler(pickle.Pickler):
    """Leaves tensors out, of which pickle would make copies: a data set's may be most of the memory."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.tensors: list[Tensor] = []

    def persistent_id(self, obj: object) -> tuple[torch.Size, torch.dtype] | None:
        """Shape and type in a tensor's place."""
        if not isinstance(obj, Tensor):
            return None
        self.tensors.append(obj.contiguous())
        return obj.shape, obj.dtype


class _Unpickler(pickle.Unpickler):
    """Has empty tensors where others were left out."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.tensors: list[Tensor] = []

    def persistent_load(self, pid: tuple[torch.Size, torch.dtype]) -> Tensor:
        """A tensor to be filled."""
        self.tensors.append(torch.empty(pid[0], dtype=pid[1]))
        return self.tensors[-1]


def _pickled(value: object) -> tuple[bytes, list[Tensor]]:
    file = io.BytesIO()
    pickler = _Pickler(file)
    pickler.dump(value)
    return file.getvalue(), pickler.tensors


def _unpickled(stream: bytes) -> tuple[Any, list[Tensor]]:
    unpickler = _Unpickler(io.BytesIO(stream))
    return unpickler.load(), unpickler.tensors


def join(device: str) -> World:
    """Make this process ready to train: in its process group, or that of ``torchrun``'s environment, or alone.

    Args:
        device: "auto" (CUDA where there is one), "cpu" or "cuda".

    Raises:
        ValueError: CUDA was asked for and there is none, or not one for each process, or one can't be used.
    """
    count = torch.cuda.device_count()
    if device == "cuda" and count == 0:
        raise ValueError("--device cuda: torch sees no CUDA device; use --device cpu, or install torch's CUDA build.")
    local = int(os.environ.get("LOCAL_RANK", "0"))
    where = torch.device("cpu")
    if count and device != "cpu":
        if local >= count:
            raise ValueError(f"torchrun starts more processes than the {count} CUDA devices of this machine.")
        where = torch.device("cuda", local)
        claim_device(where)
        torch.set_float32_matmul_precision("high")
    else:
        keep_freed_memory()
    if dist.is_initialized():
        return World(dist.get_rank(), dist.get_world_size(), where)
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return World(0, 1, where)
    dist.init_process_group("nccl" if where.type == "cuda" else "gloo", timeout=PROCESS_GROUP_TIMEOUT)
    return World(dist.get_rank(), size, where)


def claim_device(device: torch.device) -> None:
    """Make a CUDA device this process's, and try it.

    torch counts devices by asking the driver, which may be too old for this build of torch, as the build may have no
    kernels for the device, and somebody may have it for himself. "auto" takes no CPU then: of a run of hours, who began
    it should know.

    Raises:
        ValueError: it can't be used.
    """
    try:
        torch.cuda.set_device(device)
        torch.ones((), device=device).neg().item()
    except Exception as error:  # RuntimeError and its children, AssertionError, and one of torch's own
        reason = (str(error).splitlines() or [repr(error)])[0].rstrip(".")
        raise ValueError(f"CUDA device {device.index} can't be used: {reason}. --device cpu does without.") from error


def shut_down(world: World, failed_with: int | None = None) -> None:
    """Leave the process group.

    After a failure NCCL would wait for peers that wait for this process, so the process ends here and now, with
    this exit status, and torchrun ends the others. With gloo they notice by themselves.
    """
    if world.size == 1:
        return
    if failed_with is not None and world.device.type == "cuda":
        if sys.exc_info()[0] is not None:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(failed_with)
    dist.destroy_process_group()
