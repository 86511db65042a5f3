"""Processes of this command that share each batch on a CPU: one for each core, unless flags say otherwise."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing
from tqdm import tqdm

from training.distributed import PROCESS_GROUP_TIMEOUT
from training.run import FAILED, INTERRUPTED, USER_ERROR

# Of a batch, for each process that is started unasked: with fewer, agreeing on the gradients costs what it gains.
MIN_IMAGES = 64
# For a process to end by itself once another has failed.
GRACE_S = 30.0
MEMORY = " Linux ends what takes too much memory so: try fewer --processes, or a lower --batch-size."
STOPPING = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


def count_processes(args: argparse.Namespace, batch_sizes: Sequence[int]) -> int:
    """How many processes are to share each batch; 1 in a process that shares already.

    Args:
        args: the flags; --processes decides, and one process is meant by --threads alone.
        batch_sizes: images a step, of each stage.

    Raises:
        ValueError: --processes does not go with the rest; a sentence for the user.
    """
    shares_already = "WORLD_SIZE" in os.environ or dist.is_initialized()
    is_on_cpu = args.device == "cpu" or (args.device == "auto" and torch.cuda.device_count() == 0)
    if args.processes is not None:
        if shares_already and not dist.is_initialized():
            raise ValueError(f"--processes {args.processes}: torchrun starts the processes here; leave it out.")
        if not is_on_cpu:
            raise ValueError(
                f"--processes {args.processes}: is for CPUs (--device cpu); for each GPU, torchrun starts a process."
            )
        return 1 if shares_already else args.processes
    if shares_already or not is_on_cpu or args.threads is not None:
        return 1
    most = min([torch.get_num_threads(), *(size // MIN_IMAGES for size in batch_sizes)])
    divides = (count for count in range(most, 1, -1) if all(size % count == 0 for size in batch_sizes))
    return next(divides, 1)


def run_processes(argv: Sequence[str], count: int, threads: int | None) -> int:
    """Run the command in several processes; returns the exit status of the first, which writes and prints.

    Args:
        argv: the flags of ``python -m training``.
        count: how many processes.
        threads: of each; None shares out torch's number.
    """
    each = threads or max(1, torch.get_num_threads() // count)
    with tempfile.TemporaryDirectory() as folder:
        meeting = str(Path(folder) / "meeting")
        context = torch.multiprocessing.spawn(_run_one, (list(argv), count, each, meeting), count, join=False)
        assert context is not None
        with _forward_signals(context.pids()):
            try:
                while not context.join(grace_period=GRACE_S):
                    pass
            except (
                torch.multiprocessing.ProcessExitedException,
                torch.multiprocessing.ProcessRaisedException,
            ) as error:
                return _explain(error, [process.exitcode for process in context.processes])
    return 0


def _run_one(rank: int, argv: list[str], count: int, threads: int, meeting: str) -> None:
    """One of the processes; those behind the first end well with it, unless they have failed by themselves."""
    from training.__main__ import main

    os.setpgid(0, 0)  # or a Ctrl-C would arrive twice: from the terminal, and passed on
    os.environ["RANK"] = str(rank)
    if sys.platform == "linux":  # where a container's host name may have no address
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(threads)
    tqdm.set_lock(threading.RLock())  # its own is a semaphore, which would count as leaked
    status = INTERRUPTED
    # By `spawn` an interrupt while the others are waited for would be a good end.
    with suppress(KeyboardInterrupt):
        # No address: torch takes what is escaped in one, as a blank is, for the file's name.
        store = dist.FileStore(meeting, count)
        dist.init_process_group("gloo", store=store, timeout=PROCESS_GROUP_TIMEOUT, world_size=count, rank=rank)
        status = main(argv)
    sys.stdout.flush()
    sys.stderr.flush()
    # At once: gloo's threads outlive the group, and now and then abort a process that takes its time to exit.
    os._exit(status if rank == 0 or status in (FAILED, USER_ERROR) else 0)


def _explain(error: Exception, exit_codes: Sequence[int | None]) -> int:
    """Say why the processes ended where none of them has said it; returns the exit status."""
    codes = [code or 0 for code in exit_codes]
    for rank, code in enumerate(codes):
        if code < 0 and -code not in STOPPING:  # `join` sends SIGTERM to those that are left
            killed = -code == signal.SIGKILL
            name = signal.Signals(-code).name
            print(
                f"error: process {rank + 1} of {len(codes)} was ended by {name}.{MEMORY if killed else ''}",
                file=sys.stderr,
            )
            return FAILED
    if said := [code for code in codes if code > FAILED]:  # what others raise then is that their peer has gone
        return said[0]
    if codes[0] < 0:  # stopped before it could tell: as a shell tells it of one process
        return 128 - codes[0]
    if isinstance(error, torch.multiprocessing.ProcessRaisedException):
        print(error, file=sys.stderr)
    return FAILED


@contextmanager
def _forward_signals(pids: Sequence[int]) -> Iterator[None]:
    """Pass on what stops or suspends a run to its processes, which do as one alone does."""

    def send(number: int) -> None:
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    def suspend() -> None:
        send(signal.SIGSTOP)
        os.kill(os.getpid(), signal.SIGSTOP)  # until the shell's `fg` or `bg`
        send(signal.SIGCONT)

    handlers = {number: lambda number, _: send(number) for number in STOPPING}
    if hasattr(signal, "SIGTSTP"):  # Ctrl-Z
        handlers[signal.SIGTSTP] = lambda number, _: suspend()
    # `nohup` has SIGHUP ignored.
    previous = {
        n: signal.signal(n, handler) for n, handler in handlers.items() if signal.getsignal(n) != signal.SIG_IGN
    }
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
