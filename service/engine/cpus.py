"""How many processors this process may use: in a container often fewer than the machine has.

onnxruntime counts the machine's cores, whatever a control group (``docker run --cpus``, a pod's CPU limit) or an
affinity mask (``--cpuset-cpus``, taskset) leaves of them. Threads beyond a limit wait for each other while the kernel
holds them back, and onnxruntime tells of cores that it can't bind them to.
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
    """Return how many CPUs' time the control groups leave this process, infinity without a limit.

    The least of its own group and those above it, of version 2 (``cpu.max``) or 1 (``cpu.cfs_quota_us``). Inside a
    container the path of its group may be the host's, which is not to be seen there: then the mount's root is its own.

    Args:
        own: which groups this process is in, as ``/proc/self/cgroup`` tells.
        groups: where they are mounted.
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
                # No limit is "max" in version 2 and -1 in version 1.
                if time.isdecimal() and period and period[0].isdecimal() and int(period[0]):
                    yield int(time) / int(period[0])


def usable_cpus() -> int:
    """Return how many threads can run at once: processors in the affinity mask, at most the quota, rounded up."""
    return max(1, ceil(min(len(_allowed()), quota())))


def usable_cores() -> int:
    """Return how many threads of a run pay: one a physical core of those in the affinity mask, within the quota.

    As many as the quota has whole CPUs, since the event loop wants a share as well.
    """
    allowed = _allowed()
    cores = {_text(PROCESSORS / f"cpu{number}/topology/thread_siblings_list") or number for number in allowed}
    return max(1, int(min(len(cores), quota())))


def threads_within_limits() -> int:
    """Return `usable_cores` where a limit is below the machine, 0 where none is: onnxruntime counts the machine's."""
    return usable_cores() if min(len(_allowed()), quota()) < (os.cpu_count() or 1) else 0


def _allowed() -> set[int]:
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:  # no Linux, another version, or hidden
        return ""
