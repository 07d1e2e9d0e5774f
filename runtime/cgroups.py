"""What Linux's control groups leave to this process: time of the CPUs, and memory.

A limit holds for all groups below it, so the least on the way from the process's group to the root
counts. Both versions of the interface are read (docs.kernel.org/admin-guide/cgroup-v1 and
cgroup-v2.html); a container may see the root of its own alone, whatever its path is called.
"""

from collections.abc import Iterator
from pathlib import Path, PurePosixPath

MOUNT = "sys/fs/cgroup"


def cpu_quota(root: Path) -> float | None:
    """CPUs' worth of time, None without a limit; `root`: of the file system."""
    quotas = []
    for folder in _folders(root, "cpu"):
        limit, period = _words(folder / "cpu.max", 2)  # of version 2, then of version 1
        if limit is None:
            (limit,) = _words(folder / "cpu.cfs_quota_us", 1)
            (period,) = _words(folder / "cpu.cfs_period_us", 1)
        if limit is not None and period:
            quotas.append(limit / period)
    return min(quotas, default=None)


def free_bytes(root: Path) -> int | None:
    """Memory that the groups of this process may still take, None without a limit. What they hold
    of files is free: the system drops it first."""
    free = []
    for folder in _folders(root, "memory"):
        for limit_name, used_name, prefix in (
            ("memory.max", "memory.current", ""),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
        ):
            (limit,), (used,) = _words(folder / limit_name, 1), _words(folder / used_name, 1)
            if limit is not None and used is not None:
                files = _of_files(folder / "memory.stat", prefix)
                free.append(max(0, limit - max(0, used - files)))
    return min(free, default=None)


def _folders(root: Path, controller: str) -> Iterator[Path]:
    """The folder of the process's group for a controller, and those of all groups above it."""
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":  # version 2, alone or beside version 1
            mounts = [root / MOUNT, root / MOUNT / "unified"]
        elif controller in controllers.split(","):
            mounts = [root / MOUNT / controllers, root / MOUNT / controller]
        else:
            continue
        group = PurePosixPath(path.lstrip("/"))
        for mount in mounts:
            for above in (group, *group.parents):
                yield mount / above


def _of_files(stat: Path, prefix: str) -> int:
    names = {f"{prefix}active_file", f"{prefix}inactive_file"}
    lines = (line.split() for line in _read(stat).splitlines())
    return sum(int(words[1]) for words in lines if words[0] in names)


def _words(file: Path, count: int) -> list[int | None]:
    """The numbers in a file; None for what is no limit ("max", or -1), or is not there."""
    words = _read(file).split()[:count]
    numbers = [int(word) if word.isdigit() else None for word in words]
    return numbers + [None] * (count - len(numbers))


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""
