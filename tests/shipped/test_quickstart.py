"""The quickstart's small scripts: the table's figures, and the word about a stale run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import yaml

from lorakit.recipe.load import load_recipe

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
RECIPE = SCRIPTS.parent / "recipes" / "quickstart.yaml"


def script(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPTS / name), *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=SCRIPTS.parent, timeout=120
    )


def kept_recipe(folder: Path, learning_rate: float | None = None) -> None:
    resolved = load_recipe(RECIPE).resolved()
    if learning_rate is not None:
        resolved["train"]["learning_rate"] = learning_rate
    (folder / "recipe.yaml").write_text(yaml.safe_dump(resolved), encoding="utf-8")


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
    printed = script("quickstart_table.py", tmp_path)
    assert printed.returncode == 0, printed.stderr
    rows = [line.split() for line in printed.stdout.replace("│", " ").splitlines()]
    assert ["logical-form", "accuracy", "0.0%", "70.5%"] in rows
    assert ["execution", "accuracy", "1.5%", "74.0%"] in rows
    assert "460,800 of 134,975,808 (0.34%)" in printed.stdout
    assert "500 steps, 2 min 05 s" in printed.stdout
    assert "1.50 GiB" in printed.stdout


def test_check_is_silent_without_a_run_and_for_the_same_recipe(tmp_path: Path) -> None:
    for _ in range(2):
        checked = script("quickstart_check.py", RECIPE, tmp_path)
        assert (checked.returncode, checked.stdout, checked.stderr) == (0, "", "")
        kept_recipe(tmp_path)


def test_check_names_what_changed_and_what_to_remove(tmp_path: Path) -> None:
    kept_recipe(tmp_path, learning_rate=0.5)
    checked = script("quickstart_check.py", RECIPE, tmp_path)
    assert checked.returncode == 2
    assert "train.learning_rate: 0.5 -> " in checked.stderr
    assert f"rm -r {tmp_path}" in checked.stderr
