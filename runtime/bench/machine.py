"""The machine and the software that a measurement ran on, and what else the machine did."""

import contextlib
import json
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

import numpy as np

from ..version import __version__

LEAST_CPU_SECONDS = 1  # the system counts in ticks of 10 ms


class OtherProcesses:
    """What the machine did beside this process, from when this object was made."""

    def __init__(self) -> None:
        self._start = _cpu_seconds()

    def share(self) -> float | None:
        """The share of all CPUs' time that others took, other virtual machines too. None where the
        system does not tell, and before that time is long enough for the ticks it counts in."""
        now = _cpu_seconds()
        if self._start is None or now is None:
            return None
        own, busy, total = (after - before for before, after in zip(self._start, now, strict=True))
        return max(0.0, busy - own) / total if total >= LEAST_CPU_SECONDS else None


def _cpu_seconds() -> tuple[float, float, float] | None:
    """CPU time of this process and its ended children, of all processes, and idle time included.

    proc_stat(5): user, nice, system, idle, iowait, irq, softirq, steal; guests are within user.
    """
    try:
        first = Path("/proc/stat").read_text(encoding="ascii").splitlines()[0]
    except OSError:
        return None
    ticks = [int(n) for n in first.split()[1:9]]
    total = sum(ticks)
    per_second = os.sysconf("SC_CLK_TCK")
    return sum(os.times()[:4]), (total - ticks[3] - ticks[4]) / per_second, total / per_second


def cpu_name() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    for line in text.splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    of_macos = _output("sysctl", "-n", "machdep.cpu.brand_string").strip()
    return of_macos or platform.processor() or platform.machine()


def gpu_name() -> str | None:
    """The first GPU and its cores, as macOS tells them; None on other systems."""
    try:
        gpu = json.loads(_output("system_profiler", "-json", "SPDisplaysDataType"))
        gpu = gpu["SPDisplaysDataType"][0]
        cores = f", {gpu['sppci_cores']} cores" if "sppci_cores" in gpu else ""
        return f"{gpu['sppci_model']}{cores}"
    except (ValueError, LookupError, TypeError):
        return None


def system_name() -> str:
    """With its version, which is that of what it holds of a device's driver."""
    return platform.platform(terse=True)


def _output(*command: str) -> str:
    """What a command prints; nothing where there is no such command, or it fails."""
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return ""


def memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def process_bytes(field: str) -> int | None:
    """Memory of this process, "VmRSS" now or "VmHWM" at most (proc_pid_status(5)); None where the
    system does not tell."""
    try:
        text = Path("/proc/self/status").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    values = dict(line.partition(":")[::2] for line in text.splitlines())
    return int(values[field].split()[0]) << 10 if field in values else None


def versions() -> dict[str, str]:
    """The versions of what may decide how fast it is, as far as it is installed."""
    found = {"osscompile": __version__}
    for name, package in (("tvm", "apache-tvm"), ("tvm_ffi", "apache-tvm-ffi")):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(package)
    return found | {"numpy": np.__version__, "python": platform.python_version()}


def source_commit() -> str | None:
    """Commit of the checkout that this code runs from, "-dirty" if it was changed since; None
    without one, or without git. An installed copy may lie in a checkout of something else."""
    here = Path(__file__).parent
    command = ["git", "-C", str(here)]
    try:
        tracked = [*command, "ls-files", "--error-unmatch", "__init__.py"]
        subprocess.run(tracked, check=True, capture_output=True)
        describe = [*command, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        result = subprocess.run(describe, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return result.stdout.strip()
