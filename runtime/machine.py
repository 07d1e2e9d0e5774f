"""What the machine is, and what of it this process may use."""

import math
import os
import platform
import warnings
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from .cgroups import cpu_quota, free_bytes


@dataclass(frozen=True)
class Machine:
    """A machine; features are named as in /proc/cpuinfo."""

    system: str
    architecture: str
    cpu_features: tuple[str, ...]

    @staticmethod
    @cache
    def here() -> "Machine":
        return Machine(platform.system(), platform.machine(), _cpu_features())


def physical_cores() -> int:
    """Cores that this process may use; the threads of one core count once, where that is known."""
    cores = set()
    for cpu in _allowed_cpus():
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        try:
            cores.add(siblings.read_text(encoding="ascii"))
        except OSError:
            cores.add(str(cpu))
    return min(len(cores), usable_threads())


def usable_threads(root: Path = Path("/")) -> int:
    """Threads that can run at once: the CPUs of this process, or fewer where its cgroup gets less
    of their time."""
    quota = cpu_quota(root)
    cpus = len(_allowed_cpus())
    return cpus if quota is None else min(cpus, math.ceil(quota))


def choose_threads(asked: int | None) -> int:
    """So many as were asked for, or one a core; never more than can run at once, since threads of a
    kernel wait for each other."""
    if asked is None:
        return physical_cores()
    most = usable_threads()
    if asked > most:
        warnings.warn(
            f"threads: expected at most {most}, which is what this process may use, found {asked}; "
            f"{most} are used",
            stacklevel=4,
        )
    return min(asked, most)


def available_memory_bytes(root: Path = Path("/")) -> int | None:
    """Memory that can be had without swapping; None where the system does not say."""
    known = [size for size in (_free_of_system(root), free_bytes(root)) if size is not None]
    return min(known, default=None)


def _allowed_cpus() -> list[int]:
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def _free_of_system(root: Path) -> int | None:
    try:
        for line in (root / "proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) << 10
    except OSError:
        pass
    return None


def _cpu_features() -> tuple[str, ...]:
    """Empty where the system does not list them in /proc/cpuinfo."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ()
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):  # x86 and AArch64
            return tuple(sorted(set(value.split())))
    return ()
