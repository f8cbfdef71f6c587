"""Comparing runs: results, differences, and which directories are runs."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest

import lorakit
from lorakit.errors import UserError
from lorakit.reports.comparison import compare, comparison_text
from tests.reports.files import LINES, RECIPE, log_line, write_run, write_sweep_files


def test_results_and_only_what_differs(tmp_path: Path) -> None:
    one = write_run(tmp_path / "one")
    other = write_run(
        tmp_path / "other", method="dora", record={"versions": {"torch": "2.8"}, "diverged": True}
    )
    found = compare(one, other).as_json()
    assert json.loads(json.dumps(found)) == found
    first = found["runs"][0]
    assert first == {
        "name": "one", "directory": str(one), "method": "lora", "status": "completed",
        "diverged": False, "trainable_parameters": 1024, "steps": 4, "trained_tokens": 640,
        "seconds": 75.0, "best_step": 4, "tokens_per_second": 102.5, "peak_memory_bytes": 2**30,
        "training_loss": 0.5, "metrics": {"loss": 0.5, "accuracy": 0.75},
    }  # fmt: skip
    assert found["differences"] == [
        {"key": "adapter.method", "values": ["lora", "dora"]},
        {"key": "versions.torch", "values": ["2.9", "2.8"]},
    ]
    text = comparison_text(lorakit.compare(one, other))
    rows = {line.split("  ")[0]: re.split(r" {2,}", line)[-2:] for line in text.splitlines()}
    assert rows["accuracy"] == ["0.7500", "0.7500"]
    assert rows["adapter.method"] == ["lora", "dora"]
    assert rows["time"] == ["1 min 15 s", "1 min 15 s"]
    assert "completed, diverged" in text


def test_the_rows_of_a_step_depend_on_the_processes(tmp_path: Path) -> None:
    recipe = RECIPE.replace("seed: 1", "per_device_batch_size: 8")
    runs = [
        write_run(tmp_path / str(count), recipe=recipe, record={"hardware": {"processes": count}})
        for count in (1, 2)
    ]
    found = {own["key"]: own["values"] for own in compare(*runs).as_json()["differences"]}
    assert found["effective_batch_size"] == [8, 16]


def test_a_run_that_goes_on_has_the_results_so_far(tmp_path: Path) -> None:
    record = {"exit_reason": None, "metrics": {}, "steps": 0, "seconds": 0.0, "trained_tokens": 0}
    run = write_run(tmp_path / "run", record=record, lines=LINES[:3])
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "eval": {"accuracy": 0.25}}\n{"step": 4, "loss"')
    (found,) = compare(run).results
    assert (found["status"], found["steps"]) == ("running or killed", 3)
    assert found["metrics"] == {"accuracy": 0.25}
    assert found["seconds"] is None


def test_a_sweep_stands_for_its_members(tmp_path: Path) -> None:
    sweep = write_sweep_files(tmp_path / "sweep")
    found = compare(sweep).results
    assert [(own["name"], own["status"]) for own in found] == [
        ("r=8", "completed"), ("r=1", "failed"), ("r=2", "pending"),
    ]  # fmt: skip
    assert [own["name"] for own in compare(sweep, sweep / "members" / "r=8").results] == [
        "r=8", "r=1", "r=2",
    ]  # fmt: skip


def test_a_member_that_halving_stopped_is_not_completed(tmp_path: Path) -> None:
    write_run(tmp_path / "members" / "a")
    members = [{"name": "a", "status": "stopped"}]
    (tmp_path / "sweep.json").write_text(json.dumps({"members": members}))
    assert compare(tmp_path).results[0]["status"] == "stopped"


def test_names_tell_runs_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a/run", "b/run"):
        write_run(tmp_path / name)
    assert [own["name"] for own in compare(tmp_path / "a/run", tmp_path / "b/run").results] == [
        "a/run", "b/run",
    ]  # fmt: skip
    monkeypatch.chdir(tmp_path / "a/run")
    assert compare(Path()).results[0]["name"] == "run"


def test_many_runs_have_a_row_each(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / f"run-{i}", method=f"m{i}") for i in range(6)]
    table, same = comparison_text(compare(*runs)).split("\n\n")
    assert same.startswith("the same in all runs: status completed, ")
    lines = table.splitlines()
    assert len(lines) == 7
    assert lines[0].split()[:2] == ["run", "adapter.method"]
    assert lines[6].split()[:2] == ["run-5", "m5"]


def test_many_settings_of_many_runs_have_a_line_each(tmp_path: Path) -> None:
    name = "member-with-a-name-that-is-longer-than-a-cell-"
    runs = [
        write_run(
            tmp_path / f"{name}{i}",
            record={"versions": {f"package_{k}": str(i % 5) for k in range(9)}},
        )
        for i in range(6)
    ]
    table, _, settings = comparison_text(compare(*runs)).split("\n\n")
    assert [line.split()[0] for line in table.splitlines()[1:]] == [f"{name}{i}" for i in range(6)]
    assert "package" not in table
    title, *lines = settings.splitlines()
    assert title.startswith("9 settings differ")
    assert re.split(r" {2,}", lines[-1]) == [
        "versions.package_8", "0 (2), 1 (1), 2 (1), 3 (1) and 1 more",
    ]  # fmt: skip


def test_metrics_named_like_a_column(tmp_path: Path) -> None:
    metrics = {"status": 0.25, "run": 0.5, "accuracy": 0.75}
    runs = [write_run(tmp_path / f"a\nb{i}", record={"metrics": metrics}) for i in range(6)]
    table, same = comparison_text(compare(*runs)).split("\n\n")
    assert [line.split()[:2] for line in table.splitlines()] == [
        ["run"], *(["a", f"b{i}"] for i in range(6))
    ]  # fmt: skip
    assert same.startswith("the same in all runs: status completed, status (metric) 0.2500, ")
    assert "run (metric) 0.5000" in same


def test_what_cannot_be_read_is_left_out(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", lines=[log_line(1), "no"])
    (run / "run.json").write_text("[")
    (run / "recipe.yaml").write_text("{")
    compared = compare(run)
    (found,) = compared.results
    assert (found["method"], found["status"], found["training_loss"]) == (
        None, "running or killed", 2.0,
    )  # fmt: skip
    recipe, record, metrics = compared.notes
    assert recipe.startswith("run: recipe.yaml: not readable: ")
    assert record == "run: run.json: not readable"
    assert metrics == "run: metrics.jsonl: 1 line not readable"


def test_infinite_numbers_are_json_too(tmp_path: Path) -> None:
    record = {"metrics": {"loss": math.inf}, "seconds": math.nan, "versions": {"x": [math.inf]}}
    found = compare(write_run(tmp_path / "a"), write_run(tmp_path / "b", record=record)).as_json()
    json.dumps(found, allow_nan=False)
    assert {"key": "versions.x", "values": [None, ["Infinity"]]} in found["differences"]
    assert found["runs"][1]["metrics"] == {}


@pytest.mark.parametrize("name", ["absent", "empty", "file", "sweep", "\0"])
def test_what_is_no_run_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "sweep.yaml").write_text("")
    with pytest.raises(UserError, match=r"no such directory|neither|no members|null") as caught:
        compare(tmp_path / name)
    assert str(tmp_path) in str(caught.value)
    with pytest.raises(UserError, match="no run given"):
        compare()
