"""The quickstart's summary shows the answers, the results and commands that exist."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer

from lorakit.cli.main import app

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
_PROMPT = 'columns: "City", "Mayor"\nquestion: Who is the mayor of {}?\nSQL:'
_SQL = 'SELECT "Mayor" FROM t WHERE "City" = \'{}\''


def example(row: int, city: str, right: bool) -> dict[str, Any]:
    reference = _SQL.format(city)
    return {
        "row": row, "input": _PROMPT.format(city), "reference": reference, "right": right,
        "prediction": reference if right else "SELECT",
    }  # fmt: skip


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    run = {
        "trainable_parameters": 460_800, "total_parameters": 134_975_808, "steps": 500,
        "seconds": 125.4, "data": {"train": {"rows": 1000}},
        "metrics": {"lf_accuracy": 0.705, "ex_accuracy": 0.74},
    }  # fmt: skip
    base = {"examples": 200, "metrics": {"lf_accuracy": 0.0, "ex_accuracy": 0.015}}
    cities = ["Bergen", "Llanfairpwllgwyngyll", "Oslo", "Rome"]
    examples = [example(row, city, city != "Bergen") for row, city in enumerate(cities, 1)]
    answers = ["no idea\n" * 90, "a", "b", _SQL.format("Rome")]
    files = {
        "run.json": json.dumps(run), "eval-base.json": json.dumps(base),
        "predictions.json": json.dumps({"examples": examples}),
        "predictions-base.jsonl": "".join(json.dumps({"prediction": a}) + "\n" for a in answers),
    }  # fmt: skip
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    return tmp_path


def summary(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, SCRIPTS / "quickstart_summary.py", *arguments]
    return subprocess.run(
        list(map(str, command)), capture_output=True, text=True, check=False, timeout=60
    )


def test_summary_shows_answers_accuracies_and_a_lesson(run_dir: Path) -> None:
    printed = summary(run_dir)
    assert printed.returncode == 0, printed.stderr
    text = " ".join(printed.stdout.split())
    assert text.index("mayor of Llanfairpwllgwyngyll?") < text.index("mayor of Oslo?")
    assert "Bergen?" not in text, "the adapter answers wrong"
    assert "Rome?" not in text, "the base answers right as well"
    assert "the same query 0.0% 70.5%" in text
    assert "the right result 1.5% 74.0%" in text
    assert (
        "Training 0.34% of the parameters on 1,000 examples for 2 min 05 s raised the execution "
        "accuracy from 1.5% to 74.0%"
    ) in text


def test_the_next_commands_exist(run_dir: Path) -> None:
    printed = summary(run_dir).stdout
    assert "Next, after `source .venv/bin/activate`:" in printed
    assert "\nNext:" in summary(run_dir, "--active").stdout
    lines = [line.strip() for line in printed.splitlines() if line.startswith("  lorakit ")]
    assert [line.split()[1] for line in lines] == ["generate", "merge", "init"]
    commands: Any = typer.main.get_command(app)
    for line in lines:
        words = subprocess.run(
            ["bash", "-c", f"printf '%s\\0' {line}"], capture_output=True, text=True, check=True
        ).stdout.split("\0")[1:-1]
        context = commands.commands[words[0]].make_context(words[0], words[1:])
        if words[0] == "generate":
            assert context.params["prompt"] == _PROMPT.format("Llanfairpwllgwyngyll")
            assert shlex.split(line)[4] == f"{run_dir}/adapter"


def test_a_run_of_an_earlier_version(run_dir: Path) -> None:
    (run_dir / "predictions.json").unlink()
    printed = summary(run_dir)
    assert (printed.returncode, printed.stdout) == (1, "")
    assert "predictions.json does not exist; hint: rm -r " in printed.stderr
