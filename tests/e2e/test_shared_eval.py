"""``lorakit eval`` in several processes, started like a launcher does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.evaluations import evaluated, recipe_file
from tests.e2e.processes import launch
from tests.tasks.wikisql_files import write_lines

REPO = Path(__file__).resolve().parents[2]
PAIRS = [{"prompt": "ab" * n, "completion": f" {n}" * (n % 3 + 1)} for n in (3, 9, 1, 7, 2, 8, 5)]
LINES = [{"sentence": "x" * n + " film", "label": n % 2} for n in (5, 1)]

#: ``lorakit eval`` as one of the processes, in which one may fail.
ONE_OF_THEM = """
import os, sys
from lorakit.cli.main import run
from lorakit.errors import DataError
from lorakit.evaluation import evaluate

failing, *arguments = sys.argv[1:]

def refuse(*_):
    raise DataError("this process cannot go on")

if os.environ["RANK"] == failing:
    evaluate.collate_causal = refuse
sys.exit(run(["eval", *arguments]))
"""


@pytest.fixture
def completions(tiny_llama: Path, tmp_path: Path) -> Path:
    write_lines(tmp_path / "validation.jsonl", PAIRS)
    keys: dict[str, Any] = {"max_new_tokens": 6, "temperature": 1.0}
    return recipe_file(tmp_path, tiny_llama, "completion", tmp_path, **keys)


def test_torchrun_gives_what_one_process_gives(
    completions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    alone, shared = tmp_path / "alone.jsonl", tmp_path / "shared.jsonl"
    wanted = evaluated(capsys, completions, "--base", "--save-predictions", alone)
    done = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
            "-m", "lorakit", "eval", completions, "--base", "--json",
            "--save-predictions", shared, "--output", tmp_path / "result.json",
        ],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, cwd=REPO, capture_output=True, text=True,
        timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert json.loads((tmp_path / "result.json").read_text()) == found
    assert found["examples"] == wanted["examples"] == 7
    assert found["metrics"] == pytest.approx(wanted["metrics"], rel=1e-6)
    assert shared.read_text(encoding="utf-8") == alone.read_text(encoding="utf-8")
    assert len(set(shared.read_text(encoding="utf-8").splitlines())) > 3


def test_more_processes_than_rows(
    tiny_bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_lines(tmp_path / "validation.jsonl", LINES)
    recipe = recipe_file(tmp_path, tiny_bert, "glue/sst2", tmp_path)
    wanted = evaluated(capsys, recipe, "--base")
    main, *others = launch(3, "-m", "lorakit", "eval", recipe, "--base", "--json")
    assert main[0] == 0, main[2]
    assert json.loads(main[1])["metrics"] == pytest.approx(wanted["metrics"], rel=1e-6)
    assert [(code, out) for code, out, _ in others] == [(0, ""), (0, "")]


@pytest.mark.parametrize("failing", ["1", "none"])
def test_an_error_ends_all_with_one_message(
    completions: Path, tmp_path: Path, failing: str
) -> None:
    arguments = [completions, *(["--base"] if failing == "1" else [])]
    output = tmp_path / "result.json"
    ended = launch(2, "-c", ONE_OF_THEM, failing, *arguments, "--output", output)
    assert [code for code, _, _ in ended] == [2, 2]
    assert not any(out for _, out, _ in ended)
    message = "cannot go on" if failing == "1" else "no such adapter directory"
    said = [line for _, _, err in ended for line in err.splitlines() if line.startswith("error: ")]
    assert len(said) == 1
    assert message in said[0]
    assert not output.exists()
