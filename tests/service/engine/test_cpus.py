"""The CPUs that a container's limits leave, from the kernel's files as containers have them."""

import os
import subprocess
import sys
from math import inf
from pathlib import Path

import pytest

from service.engine import cpus
from service.engine.session import SessionSpec, session_options

PERIOD = "100000"


class Host:
    """The files about control groups, below a folder."""

    def __init__(self, folder: Path) -> None:
        self.own, self.groups = folder / "cgroup", folder / "groups"
        self.groups.mkdir()

    def in_group(self, *lines: str) -> None:
        self.own.write_text("".join(f"{line}\n" for line in lines))

    def limit(self, group: str, text: str) -> None:
        self._write(group, "cpu.max", text)

    def limit_v1(self, group: str, microseconds: str, period: str = PERIOD) -> None:
        self._write(f"cpu/{group}", "cpu.cfs_quota_us", microseconds)
        self._write(f"cpu/{group}", "cpu.cfs_period_us", period)

    def quota(self) -> float:
        return cpus.quota(self.own, self.groups)

    def _write(self, group: str, name: str, text: str) -> None:
        folder = self.groups / group
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"{text}\n")


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


def test_a_container_sees_its_own_group_as_the_root(host: Host) -> None:
    host.in_group("0::/")
    host.limit("", f"250000 {PERIOD}")
    assert host.quota() == 2.5


def test_the_least_of_all_groups_above_counts(host: Host) -> None:
    host.in_group("0::/system.slice/perceiver.service")
    host.limit("system.slice/perceiver.service", f"400000 {PERIOD}")
    host.limit("system.slice", "150000 50000")
    host.limit("system.slice/other.service", f"100000 {PERIOD}")
    assert host.quota() == 3.0


def test_version_1_has_files_of_its_own(host: Host) -> None:
    host.in_group("5:memory:/docker/abc", "4:cpuset:/docker/abc", "3:cpu,cpuacct:/docker/abc", "0::/")
    host.limit_v1("docker/abc", "-1")
    assert host.quota() == inf
    host.limit_v1("docker/abc", "50000")
    assert host.quota() == 0.5


def test_if_the_hosts_path_does_not_exist_the_root_is_the_containers(host: Host) -> None:
    host.in_group("3:cpu,cpuacct:/docker/abc", "0::/docker/abc")
    host.limit_v1("", "200000")
    assert host.quota() == 2.0
    host.in_group("0::/../../docker/abc")
    host.limit("", f"100000 {PERIOD}")
    assert host.quota() == 1.0


@pytest.mark.parametrize("text", [f"max {PERIOD}", "max", "", f"-1 {PERIOD}", "100000", "100000 0", "many few"])
def test_values_without_a_limit_limit_nothing(host: Host, text: str) -> None:
    host.in_group("0::/")
    host.limit("", text)
    assert host.quota() == inf


def test_without_control_groups_there_is_no_limit(host: Host) -> None:
    assert host.quota() == inf
    host.in_group("0::/somewhere")
    assert host.quota() == inf


@pytest.mark.parametrize(
    ("allowed", "limit", "cpus_", "threads"),
    [
        (range(8), inf, 8, 0),  # onnxruntime counts by itself
        (range(8), 8.0, 8, 0),
        (range(8), 2.5, 3, 2),
        (range(8), 0.5, 1, 1),
        (range(8), 6.0, 6, 4),  # of eight processors four are cores
        (range(4), inf, 4, 2),
        ((0, 2), inf, 2, 2),
        ((0, 1), inf, 2, 1),
        (range(4), 1.0, 1, 1),
    ],
)
def test_threads_are_cores_within_the_mask_and_the_quota(
    allowed: range, limit: float, cpus_: int, threads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(8):
        folder = tmp_path / f"cpu{number}" / "topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(f"{number // 2 * 2}-{number // 2 * 2 + 1}\n")
    monkeypatch.setattr(cpus, "PROCESSORS", tmp_path)
    monkeypatch.setattr(cpus, "quota", lambda: limit)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(allowed), raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    assert (cpus.usable_cpus(), cpus.threads_within_limits()) == (cpus_, threads)
    assert session_options(SessionSpec(provider="cpu")).intra_op_num_threads == threads
    assert session_options(SessionSpec(provider="cpu", intra_op_threads=7)).intra_op_num_threads == 7


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity masks here")
def test_a_process_bound_to_one_processor_takes_one_thread() -> None:
    code = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
    code += "from service.engine.cpus import threads_within_limits, usable_cpus\n"
    code += "print(usable_cpus(), threads_within_limits())"
    seen = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=60).stdout
    threads = 1 if (os.cpu_count() or 1) > 1 else 0
    assert seen.split() == ["1", str(threads)]
