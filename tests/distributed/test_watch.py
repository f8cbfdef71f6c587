"""Processes that watch each other while each does work of its own."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.processes import launch

#: Work that ends after a signal, and what a test puts in.
BLOCK = """
import os, signal, sys, time
from lorakit.api import process_group
from lorakit.distributed.processes import stop_signal
from lorakit.distributed.watch import watch_peers
from lorakit.errors import Interrupted, LorakitError
rank = int(os.environ["RANK"])

def work(seconds=60):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(0.01)
        if stop_signal.own:
            raise Interrupted("stopped", stop_signal.own)
    raise AssertionError("did not stop")

with process_group(), watch_peers() as watch:
"""


def run(
    processes: int, body: str, *arguments: object, **options: Any
) -> list[tuple[int, str, str]]:
    code = BLOCK + "".join(f"    {line}\n" for line in body.strip().splitlines())
    ended = launch(processes, "-c", code, *arguments, **options)
    return [(code, out, err.splitlines()[-1] if err else "") for code, out, err in ended]


def test_numbers_are_taken_once_and_events_arrive_in_order(tmp_path: Path) -> None:
    body = """
mine = []
for number in watch.claimed(20):
    mine.append(number)
    watch.tell((rank, number))
    time.sleep(0.01)
heard = []
watch.wait(lambda: heard.extend(watch.heard()))
import json
open(sys.argv[1] + f"/{rank}", "w").write(json.dumps([mine, heard]))
"""
    assert run(3, body, tmp_path) == [(0, "", "")] * 3
    found = [json.loads((tmp_path / str(rank)).read_text()) for rank in range(3)]
    assert sorted(number for mine, _ in found for number in mine) == list(range(20))
    for rank, (_, heard) in enumerate(found):
        for other, (mine, _) in enumerate(found):
            sent = [[other, number] for number in mine] if other != rank else []
            assert [event for event in heard if event[0] == other] == sent


@pytest.mark.parametrize("process", [0, 2])
def test_an_error_in_one_process_stops_the_others(process: int) -> None:
    body = """
if rank == int(sys.argv[1]):
    time.sleep(0.1)
    raise LorakitError("the work cannot go on")
work()
"""
    ended = run(3, body, process)
    assert ended[process][2].endswith("LorakitError: the work cannot go on")
    assert [(code, err) for rank, (code, _, err) in enumerate(ended) if rank != process] == [
        (1, "")
    ] * 2


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_stops_those_that_work_and_those_that_wait(victim: int) -> None:
    body = """
if rank == int(sys.argv[1]):
    time.sleep(0.1)
    os.kill(os.getpid(), signal.SIGKILL)
watch.wait(lambda: None) if rank == 2 else work()
"""
    ended = run(3, body, victim)
    assert ended.pop(victim)[0] == -signal.SIGKILL
    assert [code for code, _, _ in ended] == [1, 1]
    for _, _, err in ended:
        assert "the connection to another process is lost" in err


def test_a_signal_to_one_process_stops_all() -> None:
    body = """
from lorakit.training.control import stop_request
with stop_request():
    if rank == 1:
        os.kill(os.getpid(), signal.SIGTERM)
    watch.wait(lambda: None) if rank == 2 else work()
"""
    ended = run(3, body)
    assert [code for code, _, _ in ended] == [1, 143, 143]  # of the first one, a traceback
    assert "Interrupted: stopped" in ended[0][2]
