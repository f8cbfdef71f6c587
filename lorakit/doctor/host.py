"""The CPU and its memory: how much this process may use, and how much of it others use."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lorakit.doctor.finding import Finding
from lorakit.errors import memory_size
from lorakit.host.openmp import Sample
from lorakit.host.resources import CGROUP, allowed_cores, core_quota, host_memory

_AREA = "host"
_LEAST_AVAILABLE_BYTES = 2 << 30
#: Other processes that use a larger share of the cores slow down training on the CPU.
_MUCH_SHARE = 0.25


def start_sample() -> Sample | None:
    """The start of the measurement of what other processes use; None except on Linux."""
    try:
        return Sample.take()
    except (AttributeError, OSError, ValueError):
        return None


def host_findings(
    torch: Any | None, start: Sample | None, cgroup: Path = CGROUP
) -> Iterator[Finding]:
    """Cores, threads and memory. ``start`` is where the measurement of contention began, and
    ``cgroup`` has the limits of a container."""
    cores, text = _cores(cgroup)
    yield Finding(_AREA, "cores", cores, text)
    yield _contention(cores, start)
    if torch is not None:
        yield _threads(torch.get_num_threads(), cores)
    yield from _memory(cgroup)


def _cores(cgroup: Path) -> tuple[float, str]:
    """The cores that this process may use, by affinity and by the quota of its cgroup."""
    online = os.cpu_count() or 1
    allowed, quota = allowed_cores(), core_quota(cgroup)
    parts = [f"{allowed} of {online} allowed"]
    if quota is not None and quota < allowed:
        parts.append(f"the cgroup's quota is {quota:g}")
        return quota, ", ".join(parts)
    return float(allowed), parts[0]


def _contention(cores: float, start: Sample | None) -> Finding:
    load = os.getloadavg()[0]
    value: dict[str, Any] = {"load_average": round(load, 2), "running": _running()}
    text = f"load average {load:.1f}"
    if value["running"] is not None:
        text += f", {value['running']} running or waiting for a core"
    now = start_sample() if start is not None else None
    if start is None or now is None:
        return Finding(_AREA, "contention", value, text)
    others = now.cores_of_others(start)
    value["cores_of_others"] = round(others, 2)
    text += f", other processes use {others:.1f} cores"
    if others > _MUCH_SHARE * cores:
        hint = "stop them, or wait for them to finish"
        return Finding(_AREA, "contention", value, text, "warning", hint)
    return Finding(_AREA, "contention", value, text)


def _running() -> int | None:
    """How many threads of the machine run or wait for a core, this one not counted."""
    try:
        fields = Path("/proc/loadavg").read_text().split()
        return max(0, int(fields[3].partition("/")[0]) - 1)
    except (OSError, IndexError, ValueError):
        return None


def _threads(threads: int, cores: float) -> Finding:
    if threads > cores:
        text = f"{threads} threads on {cores:g} cores wait for each other"
        hint = f"export OMP_NUM_THREADS={max(1, int(cores))}"
        return Finding(_AREA, "threads", threads, text, "warning", hint)
    text = str(threads)
    if "OMP_NUM_THREADS" in os.environ and 2 * threads <= cores:
        hint = "unset OMP_NUM_THREADS"
        text += f" of {cores:g} cores, set by OMP_NUM_THREADS"
        return Finding(_AREA, "threads", threads, text, "warning", hint)
    return Finding(_AREA, "threads", threads, text)


def _memory(cgroup: Path) -> Iterator[Finding]:
    memory = host_memory(cgroup)
    total, available = memory.total_bytes, memory.available_bytes
    if available is None:
        return
    value = {"total_bytes": total, "available_bytes": available}
    text = f"{memory_size(available)} available of {memory_size(total)}"
    if memory.is_limited:
        text += ", the limit of the cgroup"
    if available < _LEAST_AVAILABLE_BYTES:
        hint = "stop other processes, or raise the limit of the container"
        yield Finding(_AREA, "memory", value, text, "warning", hint)
    else:
        yield Finding(_AREA, "memory", value, text)
