"""The limits of a container, as its cgroup has them; tests/doctor has those of older ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from lorakit.host.resources import HostMemory, core_quota, host_memory


def limited(cgroup: Path, **files: str) -> Path:
    for name, text in files.items():
        (cgroup / name.replace("_", ".")).write_text(text)
    return cgroup


def test_the_machine_itself() -> None:
    memory = host_memory(Path("/nonexistent"))
    assert memory.total_bytes > 0
    assert not memory.is_limited
    assert core_quota(Path("/nonexistent")) is None


def test_unused_files_in_the_page_cache_are_available(tmp_path: Path) -> None:
    cgroup = limited(
        tmp_path, memory_max="1000000", memory_current="900000",
        memory_stat="anon 100000\ninactive_file 700000\nactive_file 100000",
    )  # fmt: skip
    assert host_memory(cgroup) == HostMemory(1_000_000, 800_000, is_limited=True)


@pytest.mark.parametrize("limit", ["max", str(1 << 60), ""])
def test_no_limit(limit: str, tmp_path: Path) -> None:
    found = host_memory(limited(tmp_path, memory_max=limit, memory_current="1"))
    assert found.total_bytes == host_memory(Path("/nonexistent")).total_bytes
    assert not found.is_limited
