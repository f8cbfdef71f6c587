"""Idle OpenMP threads yield their cores to other processes."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time

import pytest
import torch  # noqa: F401 (nothing is done before torch is loaded)

from lorakit.host import openmp

TEAM = "lorakit-openmp-team"


def team_appears(within_seconds: float) -> bool:
    until = time.monotonic() + within_seconds
    while time.monotonic() < until:
        if TEAM in {thread.name for thread in threading.enumerate()}:
            return True
        sum(range(20_000))  # this thread needs a core, as a training step does
    return False


@pytest.fixture
def undecided(monkeypatch):
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def busy_core():
    """Pin this process and a busy loop to one core."""
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})
    loop = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    yield
    loop.kill()
    loop.wait()
    os.sched_setaffinity(0, allowed)


linux = pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="Linux only")


@linux
def test_threads_sleep_while_another_process_competes(undecided, busy_core):
    with openmp.yield_cores():
        assert team_appears(within_seconds=20)
    assert TEAM not in {thread.name for thread in threading.enumerate()}


@linux
def test_a_user_setting_decides(undecided, busy_core, monkeypatch):
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    before = threading.active_count()
    with openmp.yield_cores():
        assert threading.active_count() == before


def test_nested_blocks_share_a_watcher(undecided):
    with openmp.yield_cores():
        before = threading.active_count()
        with openmp.yield_cores():
            assert threading.active_count() == before
        assert threading.active_count() == before


def test_an_exception_ends_the_watcher(undecided):
    before = threading.active_count()
    with pytest.raises(KeyError), openmp.yield_cores():
        raise KeyError
    assert threading.active_count() == before
