"""CPU time and memory of a server with all its processes, from /proc: rivals start workers, helpers and shells."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

PROC = Path("/proc")
STOP_TIMEOUT_S = 3.0
POLL_S = 0.02
# Fields of /proc/PID/stat, counted after the name in brackets: parent, session, and user and system time of the process
# and of its children that have ended and were waited for.
PARENT, SESSION, TIMES = 1, 3, slice(11, 15)


def process_tree(pid: int) -> list[int]:
    """Return a process, its descendants and the rest of its session, where a child whose parent has ended stays.

    Empty where there is no /proc, or no such process.
    """
    found = {other: fields for other, fields in _all_stats() if fields}
    tree = {other for other, fields in found.items() if other == pid or int(fields[SESSION]) == pid}
    while more := {other for other, fields in found.items() if int(fields[PARENT]) in tree} - tree:
        tree |= more
    return sorted(tree)


def tree_cpu_seconds(pid: int) -> float | None:
    """User and system time of the tree in seconds, steps of 10 ms a process; None where there is no /proc.

    With what ended children have taken, so that it does not fall when one ends.
    """
    stats = [fields for fields in map(_stat, process_tree(pid)) if fields]
    ticks = sum(sum(map(int, fields[TIMES])) for fields in stats)
    return ticks / os.sysconf("SC_CLK_TCK") if stats else None


def tree_memory_bytes(pid: int) -> int | None:
    """Resident memory of the tree in bytes; None where it can't be read.

    A page that n processes share counts as an nth in each ("proportional set size"): summing resident sizes would
    count the interpreter's and the libraries' pages once a worker.
    """
    sizes = [size for size in map(_proportional_bytes, process_tree(pid)) if size is not None]
    return sum(sizes) if sizes else None


def stop_tree(pid: int, timeout_s: float = STOP_TIMEOUT_S) -> None:
    """End a process politely, then what it leaves behind, and wait until all of its tree has ended.

    Args:
        pid: root of the tree.
        timeout_s: seconds after which what still runs is killed.
    """
    tree = process_tree(pid)
    _signal([pid], signal.SIGTERM)
    end, orphaned, killed = time.monotonic() + timeout_s, False, False
    while left := [member for member in {*tree, *process_tree(pid)} if alive(member)]:
        if not orphaned and pid not in left:
            _signal(left, signal.SIGTERM)
            orphaned = True
        if not killed and time.monotonic() > end:
            _signal(left, signal.SIGKILL)
            killed = True
        if time.monotonic() > end + timeout_s:  # not even SIGKILL ends a process that waits for a device
            return
        time.sleep(POLL_S)


def _all_stats() -> Iterator[tuple[int, list[str]]]:
    for folder in PROC.glob("[0-9]*"):
        yield int(folder.name), _stat(int(folder.name))


def _stat(pid: int) -> list[str]:
    try:
        text = (PROC / str(pid) / "stat").read_text(encoding="utf-8", errors="replace")
    except OSError:  # it has ended meanwhile
        return []
    return text.rpartition(")")[2].split()  # the name before may hold spaces and brackets


def alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and was not waited for does not."""
    fields = _stat(pid)
    return bool(fields) and fields[0] != "Z"


def _proportional_bytes(pid: int) -> int | None:
    try:
        lines = (PROC / str(pid) / "smaps_rollup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:")), None)


def _signal(pids: list[int], number: signal.Signals) -> None:
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue
