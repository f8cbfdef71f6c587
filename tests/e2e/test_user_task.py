"""``docs/user-task.md``: its files, written out as they stand there, train and evaluate."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from lorakit.cli.main import run

DOC = Path(__file__).resolve().parents[2] / "docs" / "user-task.md"
#: Recipe, model, metrics of an evaluation, main metric's name in them.
RUNS = {
    "qa-recipe.yaml": ("tiny_llama", {"loss", "perplexity", "exact_match", "close"}),
    "reviews-recipe.yaml": ("tiny_bert", {"loss", "f1", "cost", "gain", "accuracy"}),
    "sums-recipe.yaml": ("tiny_llama", {"loss", "perplexity", "correct"}),
}
_BLOCK = re.compile(r"^```(?:json|yaml|python) (\S+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.fixture
def written(in_tmp: Path) -> list[str]:
    """Write the document's files to the working directory."""
    blocks = _BLOCK.findall(DOC.read_text(encoding="utf-8"))
    for name, text in blocks:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(text, encoding="utf-8")
    return [name for name, _ in blocks]


def result(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    assert run([*arguments]) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


def test_every_recipe_of_the_document_is_run(written: list[str]) -> None:
    assert {name for name in written if name.endswith("-recipe.yaml")} == set(RUNS)
    assert len(written) == len(set(written)) == 14
    assert run(["validate", *RUNS, "--set", "model.name_or_path=some/model"]) == 0


@pytest.mark.parametrize("recipe", RUNS)
def test_it_trains_and_evaluates(
    recipe: str,
    written: list[str],
    request: pytest.FixtureRequest,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model, names = RUNS[recipe]
    small = [
        f"model.name_or_path={request.getfixturevalue(model)}", "model.dtype=float32",
        "train.epochs=null", "train.max_steps=2", "task.max_length=128",
    ]  # fmt: skip
    options = [part for value in small for part in ("--set", value)]
    result(capsys, "train", recipe, "--json", *options)
    folder = next(Path("runs").iterdir())
    record = json.loads((folder / "run.json").read_text())
    assert record["exit_reason"] == "completed"
    assert set(record["metrics"]) == names
    measured = result(capsys, "eval", recipe, "--json", "--save-predictions", "p.jsonl", *options)
    assert set(measured["metrics"]) == names
    assert measured["metrics"] == pytest.approx(record["metrics"])
    # The run's own recipe, with every default written out, is the same task.
    again = result(capsys, "eval", str(folder / "recipe.yaml"), "--json")
    assert again["metrics"] == measured["metrics"]
    assert again["task"].startswith("./")
    scored = result(capsys, "eval", recipe, "--predictions", "p.jsonl", "--json")
    assert scored["metrics"] == {
        name: value
        for name, value in measured["metrics"].items()
        if name not in ("loss", "perplexity")
    }


def test_a_run_with_a_user_task_resumes(
    written: list[str], tiny_llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--set", f"model.name_or_path={tiny_llama}", "--set", "model.dtype=float32",
               "--set", "train.epochs=null", "--set", "task.max_length=128"]  # fmt: skip
    steps = ["--set", "train.max_steps=4", "--set", "train.save_every_steps=2"]
    assert run(["train", "sums-recipe.yaml", *options, *steps]) == 0
    (Path("runs/sums/checkpoints/step-4")).rename("gone")
    assert run(["train", "sums-recipe.yaml", *options, *steps, "--resume", "auto"]) == 0
    assert json.loads(Path("runs/sums/run.json").read_text())["steps"] == 4


ANSWERS = '{"prediction": "4"}\n{"prediction": "9"}\n'


def test_scores_of_the_metric_in_the_document(
    written: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    Path("p.jsonl").write_text(ANSWERS)
    scored = result(capsys, "eval", "qa-recipe.yaml", "--predictions", "p.jsonl", "--json")
    assert scored["metrics"] == {"exact_match": 0.5, "close": 1.0}


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("return float('nan')", "./close.py:close: close = NaN; allowed: a finite number"),
        ("return 'good'", './close.py:close: close = "good"; allowed: a finite number'),
        ("return {'a': 1.0, 'b': None}", "./close.py:close: b = null; allowed: a finite number"),
        ("return 1 / 0", "close.py:2: ZeroDivisionError: division by zero"),
        ("import json; json.loads('x')", "close.py:2: JSONDecodeError: Expecting value"),
    ],
)
def test_a_metric_that_fails_is_one_line(
    body: str, said: str, written: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    Path("p.jsonl").write_text(ANSWERS)
    Path("close.py").write_text(f"def close(predictions, references):\n    {body}\n")
    assert run(["eval", "qa-recipe.yaml", "--predictions", "p.jsonl", "--json"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert said in line
    assert "Traceback" not in err


def test_what_a_file_prints_does_not_reach_stdout(
    written: list[str], tiny_llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("p.jsonl").write_text(ANSWERS)
    Path("close.py").write_text("print('a')\ndef close(p, r):\n    print('b')\n    return 1\n")
    scored = result(capsys, "eval", "qa-recipe.yaml", "--predictions", "p.jsonl", "--json")
    assert scored["metrics"]["close"] == 1.0
    sums, build = Path("sums.py"), "        prompt = Segment("
    sums.write_text(sums.read_text().replace(build, f"        print('c')\n{build}"))
    model = f"model.name_or_path={tiny_llama}"
    assert result(capsys, "preview", "sums-recipe.yaml", "--set", model, "--json")["examples"]


def test_nothing_but_a_recipe_runs_the_file(in_tmp: Path) -> None:
    (in_tmp / "my.py").write_text("open('ran', 'w')\n")
    for arguments in (["tasks"], ["schema"], ["methods"]):
        assert run(arguments) == 0
    assert not (in_tmp / "ran").exists()
    assert not (in_tmp / "__pycache__").exists()
