"""What the machine is: operating system, architecture, and the features of its CPU."""

import os
import platform
from dataclasses import dataclass
from functools import cache
from pathlib import Path


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
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    if allowed is None:
        return os.cpu_count() or 1
    cores = set()
    for cpu in allowed:
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        try:
            cores.add(siblings.read_text(encoding="ascii"))
        except OSError:
            cores.add(str(cpu))
    return len(cores)


def available_memory_bytes() -> int | None:
    """Memory that can be had without swapping; None where the system does not say."""
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
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
