"""Faults in one of several processes: all of them end alike, with one message from one of them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.e2e import faulty_method
from tests.e2e.processes import launch
from tests.e2e.shared_runs import FSDP, assert_equal, recipe, split_over
from tests.training.runs import checkpoint_names, completion_rows, log_lines, run_json, write_rows

TRAIN = ("-m", "lorakit", "train")
#: 12 steps, with a checkpoint after every fourth.
SETTINGS: dict[str, Any] = {"train__epochs": 4, "train__save_every_steps": 4}


@pytest.fixture
def alone(tiny_llama: Path, tmp_path: Path) -> Path:
    """A recipe for one process."""
    adapter = faulty_method.adapter(tmp_path)
    return recipe(tmp_path / "alone", tiny_llama, "completion", adapter, **SETTINGS)


@pytest.fixture
def shared(alone: Path, tmp_path: Path) -> Path:
    """The same for two."""
    return split_over(2, alone, tmp_path / "shared")


def one_error(ended: list[tuple[int, str, str]], *codes: int) -> str:
    """The only error line of all processes, which ended with ``codes``."""
    said = "".join(err for _, _, err in ended)
    assert [code for code, _, _ in ended] == list(codes), said
    assert "Traceback" not in said
    (line,) = [line for line in said.splitlines() if line.startswith("error: ")]
    return line


@pytest.mark.parametrize(
    ("kind", "rank", "variables"),
    [("loss", 0, {}), ("loss", 1, {}), ("gradient", 1, {}), ("loss", 1, FSDP)],
    ids=["loss of main", "loss", "gradient", "fsdp2"],
)
def test_numbers_that_are_not_finite_in_one_process_end_the_run_as_in_a_single_one(
    kind: str, rank: int, variables: dict[str, str], alone: Path, shared: Path
) -> None:
    wanted = one_error(launch(1, *TRAIN, alone, FAULT=f"0:6:{kind}"), 1)
    ended = launch(2, *TRAIN, shared, FAULT=f"{rank}:6:{kind}", **variables)
    assert one_error(ended, 1, 1) == wanted.replace("/alone/", "/shared/")
    assert "step 6: the " in wanted
    for file in (alone, shared):
        run = file.parent / "run"
        assert checkpoint_names(run) == ["step-4"]
        assert run_json(run)["diverged"]
        assert [line["step"] for line in log_lines(run)] == [1, 2, 3, 4, 5]


def test_a_process_that_has_no_rows(alone: Path, shared: Path) -> None:
    rows: list[dict[str, Any]] = list(completion_rows(5))
    for file in (alone, shared):
        write_rows(rows_of(file) / "train.jsonl", rows)
    for ended in (*launch(1, *TRAIN, alone), *launch(2, *TRAIN, shared)):
        assert ended[0] == 0, ended
    assert_equal(alone, shared)


def rows_of(file: Path) -> Path:
    return Path(json.loads(file.read_text())["task"]["path"])


@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_in_one_process(rank: int, shared: Path) -> None:
    ended = launch(2, *TRAIN, shared, FAULT=f"{rank}:6:error")
    line = one_error(ended, 1, 1)
    assert "ArithmeticError: the method cannot go on" in line
    assert "error: " in ended[rank][2]
    run = shared.parent / "run"
    if sys.version_info >= (3, 11):
        good = (
            f"; last good checkpoint: {run / 'checkpoints' / 'step-4'}; resume with --resume auto; "
        )
        assert good in line
    record = run_json(run)
    assert record["exit_reason"] == "failed"
    assert record["message"] == ["the method cannot go on", "process 1 failed"][rank]


def test_an_error_in_the_main_process_before_training(shared: Path) -> None:
    ended = launch(2, *TRAIN, shared, faults={0: {"max_file_bytes": 1500}})
    line = one_error(ended, 1, 1)
    assert "cannot be written: File too large; no checkpoint was written yet" in line
    assert ended[1][2] == ""


def test_an_error_in_another_process_before_training(shared: Path) -> None:
    values = json.loads(shared.read_text())
    values["task"]["path"] = f"${{ROWS:-{rows_of(shared)}}}"
    shared.write_text(json.dumps(values))
    ended = launch(2, *TRAIN, shared, faults={1: {"environment": {"ROWS": "not-there"}}})
    assert 'task.path = "not-there": no such file' in one_error(ended, 2, 2)
    assert not (shared.parent / "run").exists()


def test_other_commands_in_the_processes(shared: Path) -> None:
    code = """
import os, sys
from lorakit.cli.main import run
options = ["--dry-run"] if os.environ["RANK"] == "1" else []
sys.exit(run(["train", sys.argv[1], *options]))
"""
    line = one_error(launch(2, "-c", code, shared), 2, 2)
    assert line.endswith("started with different commands: train, train --dry-run")
    assert not (shared.parent / "run").exists()


def test_work_of_one_process_may_take_longer_than_the_timeout_of_torch() -> None:
    code = """
import os, time
from datetime import timedelta
from torch.distributed import distributed_c10d
from lorakit.distributed.group import init_process_group
from lorakit.distributed.processes import process_group, run_on_main
with process_group():
    init_process_group()
    distributed_c10d._set_pg_timeout(timedelta(seconds=1))
    run_on_main(lambda: time.sleep(3))
"""
    for status, _, err in launch(2, "-c", code):
        assert status == 0, err


def test_a_wrong_option_is_reported_once(shared: Path) -> None:
    ended = launch(2, *TRAIN, shared, "--bogus")
    assert "no such option: --bogus" in one_error(ended, 2, 2)


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize(
    ("at", "message"),
    [
        (("lorakit.training.loop:Loop.save", 2), "last good checkpoint: {}/checkpoints/step-4; "),
        (("lorakit.training.run:build_loop", 1), "no checkpoint was written yet; start the run"),
    ],
    ids=["with a checkpoint", "without one"],
)
def test_a_process_that_is_killed(
    at: tuple[str, int], message: str, victim: int, shared: Path
) -> None:
    run, codes = shared.parent / "run", [1, 1]
    codes[victim] = -9
    ended = launch(2, *TRAIN, shared, faults={victim: {"at_call": at}})
    line = one_error(ended, *codes)
    assert line.startswith("error: the connection to another process is lost (was it killed?); ")
    assert message.format(run) in line
    if "checkpoints" in message:
        assert line.endswith("resume with --resume auto")
