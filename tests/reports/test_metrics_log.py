"""Reading metrics.jsonl as a run leaves it, and as it should not be."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from lorakit.reports.metrics_log import read_metrics, thinned


def test_numbers_evaluations_and_ranks(tmp_path: Path) -> None:
    lines = [
        {"step": 1, "epoch": None, "loss": 2.0, "ranks": [3, 3]},
        {"step": 1, "eval": {"loss": 1.5, "accuracy": 0.5}},
        {"step": 2, "loss": 1, "ranks": [3, 1]},
    ]
    file = tmp_path / "metrics.jsonl"
    file.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    log = read_metrics(file)
    assert log.curves == {
        "loss": [(1, 2.0), (2, 1)], "eval.loss": [(1, 1.5)], "eval.accuracy": [(1, 0.5)],
    }  # fmt: skip
    assert log.ranks == [(1, [3, 3]), (2, [3, 1])]
    assert (log.last_step, log.unreadable_lines) == (2, 0)


def test_a_line_that_is_being_written_is_left_for_later(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    log = read_metrics(file)
    assert log.curves == {"loss": [(1, 2.0)]}
    assert log.unreadable_lines == 0


@pytest.mark.parametrize(
    "line",
    [
        "{", "[1]", "null", "7", "{}", '{"step": "1"}', '{"step": true, "loss": 1}', '{"step": -1}',
        '{"loss": 1}', "\x00", "[" * 100_000, '{"step": 1.5, "loss": 1}', "\xff\xfe",
    ],
)  # fmt: skip
def test_other_lines_are_counted(tmp_path: Path, line: str) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(line.encode("latin-1") + b'\n{"step": 1, "loss": 2.0}\n')
    log = read_metrics(file)
    assert log.curves == {"loss": [(1, 2.0)]}
    assert log.unreadable_lines == 1


@pytest.mark.parametrize(
    "value",
    ["NaN", "Infinity", '"1"', "true", "null", "[1]", "{}", "1" + "0" * 400],
)
def test_what_is_no_finite_number_is_no_point(tmp_path: Path, value: str) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text(f'{{"step": 1, "loss": {value}, "other": 1, "ranks": {value}}}\n')
    assert read_metrics(file).curves == {"other": [(1, 1)]}


def test_no_file_and_no_regular_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name in ("absent", "pipe", "."):
        assert read_metrics(tmp_path / name).curves == {}


def test_thousands_of_names_are_not_curves(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text(json.dumps({"step": 1} | {f"n{i}": i for i in range(5000)}) + "\n")
    assert len(read_metrics(file).curves) == 40


def test_thinned_curves_keep_peaks_and_means() -> None:
    values = np.random.default_rng(0).normal(size=50_000)
    values[[137, 40_000]] = 50, -50
    points = list(enumerate(values.tolist(), 1))
    extremes, means = thinned(points, 300)
    assert len(extremes) <= 600
    assert len(means) == 300
    assert (138, 50) in extremes
    assert (40_001, -50) in extremes
    assert set(extremes) <= set(points)
    assert [step for step, _ in extremes] == sorted({step for step, _ in extremes})
    expected = [
        part.mean() for part in np.split(values, [i * 50_000 // 300 for i in range(1, 300)])
    ]
    assert [value for _, value in means] == pytest.approx(expected)


def test_short_curves_remain() -> None:
    points = [(step, float(step)) for step in range(600)]
    assert thinned(points, 300) == (points, [])


@pytest.mark.parametrize(
    "line",
    [{"step": 10**400, "loss": 1.0}, {"step": 1, "ranks": [10**400]}, {"step": 1, "loss": 1.7e308}],
)
def test_numbers_that_no_run_writes_are_left_out(line: dict[str, object], tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text(json.dumps(line) + "\n")
    log = read_metrics(file)
    assert log.curves == {}
    assert log.ranks == []
