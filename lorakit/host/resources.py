"""The cores and the memory that this process may use, in a container those of its cgroup."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")
_MEMINFO = Path("/proc/meminfo")


@dataclass(frozen=True)
class HostMemory:
    """``available_bytes`` of ``total_bytes`` can be allocated without swapping, None if the system
    does not tell; with ``is_limited``, the total is the limit of the cgroup."""

    total_bytes: int
    available_bytes: int | None
    is_limited: bool = False


def allowed_cores() -> int:
    """The number of cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def core_quota(cgroup: Path = CGROUP) -> float | None:
    """How many cores' time the cgroup may use; None if there is no limit."""
    text = _read(cgroup / "cpu.max").split()  # cgroup 2: QUOTA PERIOD
    if len(text) == 2 and text[0].isdigit():
        return int(text[0]) / int(text[1])
    quota, period = _read(cgroup / "cpu/cpu.cfs_quota_us"), _read(cgroup / "cpu/cpu.cfs_period_us")
    return int(quota) / int(period) if quota.isdigit() and period.isdigit() else None


def host_memory(cgroup: Path = CGROUP) -> HostMemory:
    """The memory of the machine, or of the cgroup if its limit is lower. Files in the page cache
    that have not been used lately count as available."""
    known = _sizes(_MEMINFO, unit_bytes=1024)
    total, available = known.get("MemTotal:"), known.get("MemAvailable:")
    if total is None:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = _read(cgroup / "memory.max") or _read(cgroup / "memory/memory.limit_in_bytes")
    if not limit.isdigit() or int(limit) >= total:
        return HostMemory(total, available)
    free = max(0, int(limit) - _used_bytes(cgroup))
    return HostMemory(int(limit), free if available is None else min(available, free), True)


def _used_bytes(cgroup: Path) -> int:
    """What the cgroup uses, without files that are dropped when memory is needed."""
    used = _read(cgroup / "memory.current") or _read(cgroup / "memory/memory.usage_in_bytes")
    if not used.isdigit():
        return 0
    known = _sizes(cgroup / "memory.stat") or _sizes(cgroup / "memory/memory.stat")
    return int(used) - known.get("total_inactive_file", known.get("inactive_file", 0))


def _sizes(file: Path, unit_bytes: int = 1) -> dict[str, int]:
    """The lines ``NAME NUMBER ...`` of a file, in bytes; empty if there is no such file."""
    found = {}
    for line in _read(file).splitlines():
        name, *rest = line.split() or [""]
        if rest and rest[0].isdigit():
            found[name] = int(rest[0]) * unit_bytes
    return found


def _read(file: Path) -> str:
    """The text of a file of the kernel, empty if there is none."""
    try:
        return file.read_text().strip()
    except OSError:
        return ""
