"""How many CPUs this process may use: in a container often fewer than the machine has.

onnxruntime counts the machine's cores and ignores control groups (``docker run --cpus``, a pod's CPU limit) and
affinity masks (``--cpuset-cpus``, taskset). The kernel throttles threads beyond such a limit, and they wait for each
other.
"""

import os
from collections.abc import Iterator
from math import ceil, inf
from pathlib import Path
from typing import Final

OWN_GROUPS: Final = Path("/proc/self/cgroup")
GROUPS: Final = Path("/sys/fs/cgroup")
PROCESSORS: Final = Path("/sys/devices/system/cpu")


def quota(own: Path = OWN_GROUPS, groups: Path = GROUPS) -> float:
    """Return the CPU time that control groups allow this process, in CPUs; infinity without a limit.

    It is the minimum over the process's group and all above, of version 2 (``cpu.max``) or 1 (``cpu.cfs_quota_us``).
    In a container the group's path may be the host's and not exist; then the root of the mount is the group.

    Args:
        own: the file that names this process's groups, ``/proc/self/cgroup``.
        groups: where control groups are mounted.
    """
    return min(_quotas(own, groups), default=inf)


def _quotas(own: Path, groups: Path) -> Iterator[float]:
    for line in _text(own).splitlines():
        controllers, path = line.split(":", 2)[1:]
        if controllers and "cpu" not in controllers.split(","):
            continue
        root = groups / "cpu" if controllers else groups
        files = ("cpu.cfs_quota_us", "cpu.cfs_period_us") if controllers else ("cpu.max",)
        group = root / path.lstrip("/")
        for folder in (group, *group.parents):
            if folder.is_relative_to(root):
                time, *period = " ".join(_text(folder / name) for name in files).split() or ["max"]
                # "max" (version 2) and -1 (version 1) mean no limit.
                if time.isdecimal() and period and period[0].isdecimal() and int(period[0]):
                    yield int(time) / int(period[0])


def usable_cpus() -> int:
    """Return how many threads can run at once: CPUs in the affinity mask, at most the quota, rounded up."""
    return max(1, ceil(min(len(_allowed()), quota())))


def usable_cores() -> int:
    """Return how many threads speed up a run: one a physical core of the affinity mask, at most the quota.

    The quota is rounded down, since the event loop needs CPU time as well.
    """
    allowed = _allowed()
    cores = {_text(PROCESSORS / f"cpu{number}/topology/thread_siblings_list") or number for number in allowed}
    return max(1, int(min(len(cores), quota())))


def threads_within_limits() -> int:
    """Return `usable_cores` under a limit, else 0: onnxruntime then counts the machine's cores."""
    return usable_cores() if min(len(_allowed()), quota()) < (os.cpu_count() or 1) else 0


def _allowed() -> set[int]:
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:  # another system, another version of control groups, or hidden
        return ""
