"""The quickstart's table shows the results of the run and the two evaluations."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


def test_table_shows_both_accuracies_and_the_cost(tmp_path: Path) -> None:
    run = {
        "trainable_parameters": 460_800,
        "total_parameters": 134_975_808,
        "steps": 500,
        "seconds": 125.4,
        "peak_memory_bytes": 3 * 2**29,
    }
    scores = {"task": "wikisql", "split": "validation", "examples": 200}
    base = {**scores, "metrics": {"lf_accuracy": 0.0, "ex_accuracy": 0.015}}
    adapter = {**scores, "metrics": {"lf_accuracy": 0.705, "ex_accuracy": 0.74}}
    for name, content in {"run": run, "eval-base": base, "eval-adapter": adapter}.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    command = [sys.executable, str(SCRIPTS / "quickstart_table.py"), str(tmp_path)]
    printed = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert printed.returncode == 0, printed.stderr
    rows = [line.split() for line in printed.stdout.replace("│", " ").splitlines()]
    assert ["logical-form", "accuracy", "0.0%", "70.5%"] in rows
    assert ["execution", "accuracy", "1.5%", "74.0%"] in rows
    assert "460,800 of 134,975,808 (0.34%)" in printed.stdout
    assert "500 steps, 2 min 05 s" in printed.stdout
    assert "1.50 GiB" in printed.stdout
