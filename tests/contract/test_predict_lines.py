"""The contract of what ``lorakit predict`` prints: one JSON object per text."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

import lorakit
from lorakit.cli.main import run
from tests.e2e.evaluations import write_adapter


def predicted(capsys: pytest.CaptureFixture[str], *arguments: object) -> list[dict[str, Any]]:
    assert run(["predict", *map(str, arguments)]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_classes(tiny_bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = tmp_path / "adapter"
    write_adapter(tiny_bert, adapter, "encoder", ["no", "yes", "maybe"])
    found = predicted(capsys, adapter, "--text", "a", "--text", "b c")
    assert len(found) == 2
    for row in found:
        assert list(row) == ["label", "score", "scores"]
        assert list(row["scores"]) == ["no", "yes", "maybe"]
        assert math.isclose(sum(row["scores"].values()), 1, abs_tol=1e-6)
        assert row["score"] == row["scores"][row["label"]] == max(row["scores"].values())
    assert predicted(capsys, tiny_bert, "--adapter", adapter, "--text", "a", "b c") == found
    assert lorakit.predict(adapter, ["a", "b c"]) == found


def test_regression(tiny_bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_adapter(tiny_bert, tmp_path / "adapter", "encoder")
    (row,) = predicted(capsys, tmp_path / "adapter", "--text", "a")
    assert list(row) == ["score"]
    assert isinstance(row["score"], float)
