"""What of a machine this process may use: CPUs, their time, and memory, as Linux's files say."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import pytest

from osscompile.runtime.cgroups import cpu_quota, free_bytes
from osscompile.runtime.machine import (
    available_memory_bytes,
    choose_threads,
    physical_cores,
    usable_threads,
)

UNLIMITED = "9223372036854771712"  # what version 1 says


def write(root: Path, files: dict[str, str]) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content + "\n")
    return root


VERSION_2 = {
    "proc/self/cgroup": "0::/user.slice/job",
    "proc/meminfo": "MemTotal: 9000 kB\nMemAvailable: 8000 kB",
    "sys/fs/cgroup/user.slice/job/cpu.max": "max 100000",
    "sys/fs/cgroup/user.slice/cpu.max": "150000 100000",
    "sys/fs/cgroup/user.slice/job/memory.max": "max",
    "sys/fs/cgroup/user.slice/job/memory.current": "100",
    "sys/fs/cgroup/user.slice/memory.max": "5000000",
    "sys/fs/cgroup/user.slice/memory.current": "3000000",
    "sys/fs/cgroup/user.slice/memory.stat": "anon 2\nactive_file 400000\ninactive_file 600000",
}
VERSION_1 = {
    "proc/self/cgroup": "5:memory:/docker/abc\n4:cpu,cpuacct:/docker/abc\n0::/",
    "proc/meminfo": "MemAvailable: 8000 kB",
    # of a container, which sees its own group as the root
    "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "50000",
    "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000",
    "sys/fs/cgroup/memory/memory.limit_in_bytes": "5000000",
    "sys/fs/cgroup/memory/memory.usage_in_bytes": "3000000",
    "sys/fs/cgroup/memory/memory.stat": "total_active_file 400000\ntotal_inactive_file 600000",
}


@pytest.mark.parametrize("files, quota", [(VERSION_2, 1.5), (VERSION_1, 0.5)], ids=["v2", "v1"])
def test_limits_of_a_group_above(tmp_path: Path, files: dict[str, str], quota: float) -> None:
    root = write(tmp_path, files)
    assert cpu_quota(root) == quota
    assert free_bytes(root) == 3_000_000  # what is held of files can be had
    assert available_memory_bytes(root) == 3_000_000


def test_the_least_limit_counts(tmp_path: Path) -> None:
    least = {
        "sys/fs/cgroup/user.slice/job/cpu.max": "20000 100000",
        "sys/fs/cgroup/user.slice/job/memory.max": "1000",
    }
    root = write(tmp_path, VERSION_2 | least)
    assert cpu_quota(root) == 0.2
    assert free_bytes(root) == 900
    assert usable_threads(root) == 1


def test_groups_without_limits(tmp_path: Path) -> None:
    none = {
        "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "-1",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": UNLIMITED,
    }
    root = write(tmp_path, VERSION_1 | none)
    assert cpu_quota(root) is None
    assert available_memory_bytes(root) == 8000 << 10


def test_group_that_holds_more_than_it_may(tmp_path: Path) -> None:
    root = write(tmp_path, VERSION_2 | {"sys/fs/cgroup/user.slice/memory.max": "1000"})
    assert free_bytes(root) == 0


def test_system_without_these_files(tmp_path: Path) -> None:
    assert cpu_quota(tmp_path) is None
    assert available_memory_bytes(tmp_path) is None
    assert 1 <= usable_threads(tmp_path) <= (os.cpu_count() or 1)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs Linux")
def test_process_that_may_use_one_cpu(tmp_path: Path) -> None:
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})
    try:
        assert usable_threads(tmp_path) == 1
    finally:
        os.sched_setaffinity(0, allowed)


def test_threads_are_at_most_those_that_can_run() -> None:
    """Alone, since TVM is told of the limit too, which hides a wrong number."""
    most = usable_threads()
    with pytest.warns(UserWarning, match=f"threads: expected at most {most}.*, found {most + 1}"):
        assert choose_threads(most + 1) == most
    with warnings.catch_warnings(action="error"):
        assert [choose_threads(count) for count in (1, most)] == [1, most]
        assert choose_threads(None) == physical_cores()
