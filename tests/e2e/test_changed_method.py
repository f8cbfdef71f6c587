"""The code of a user's method changes after a run: resumes are refused, and readers warn."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import lorakit
from lorakit.cli.main import run
from tests.e2e.user_methods import METHOD
from tests.training.processes import Launcher
from tests.training.runs import run_json, tree, write_recipe_file

CHANGED = "has changed since the adapter was trained"


@pytest.fixture
def recipe(tiny_llama: Path, in_tmp: Path) -> Path:
    (in_tmp / "own.py").write_text(METHOD)
    file = write_recipe_file(
        in_tmp,
        tiny_llama,
        "completion",
        train__epochs=None,
        train__max_steps=4,
        train__save_every_steps=2,
        train__save_total_limit=None,
    )
    adapter = {"method": "./own.py:Own", "target_modules": ["q"]}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"adapter": adapter}))
    assert run(["train", str(file)]) == 0
    return file


def change_the_code() -> None:
    Path("own.py").write_text(METHOD.replace("return self", "return 2 * self"))


def test_a_resume_with_other_code_is_refused(
    recipe: Path, in_tmp: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = tree(in_tmp / "run")
    digest = run_json(in_tmp / "run")["method_digest"]
    info = json.loads((in_tmp / "run" / "adapter" / "lorakit.json").read_text())
    assert digest == info["method_digest"]
    Path("own.py").write_text(Path("own.py").read_text() + "# a comment\n")
    assert run(["train", str(recipe), "--resume", "auto"]) == 0
    assert "nothing to do" in capsys.readouterr().err
    change_the_code()
    for resume in ("auto", "run/checkpoints/step-2"):
        assert run(["train", str(recipe), "--resume", resume]) == 2
        *_, message = capsys.readouterr().err.splitlines()
        assert message.startswith("error: --resume: the code of ./own.py:Own has changed since")
        assert "restore it, or choose another train.output_dir" in message
    assert tree(in_tmp / "run") == before


def test_a_change_during_a_run_has_no_effect_on_it(recipe: Path, in_tmp: Path) -> None:
    digest = run_json(in_tmp / "run")["method_digest"]
    Path("own.py").write_text(
        METHOD + "    def hooks(self, layers, config, total_steps):\n        return Hooks()\n"
        "from pathlib import Path\nfrom lorakit.methods.base import RunHooks\nclass Hooks(RunHooks):\n"
        "    def after_step(self, step, scaled=False):\n"
        "        Path('own.py').write_text('1 / 0')\n"
    )
    assert run(["train", str(recipe), "--output-dir", "other"]) == 0
    info = json.loads(Path("other/adapter/lorakit.json").read_text())
    assert info["method_digest"] == run_json(Path("other"))["method_digest"] != digest


def test_another_spelling_of_the_path_is_the_same_method(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = ["--set", "adapter.method=own.py:Own"]
    assert run(["train", str(recipe), "--resume", "auto", *other]) == 0
    assert "nothing to do" in capsys.readouterr().err
    again = ["--output-dir", "again", "--resume", "run/checkpoints/step-2"]
    assert run(["train", str(recipe), *other, *again]) == 0


def test_readers_warn_once(recipe: Path, in_tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = json.loads(recipe.read_text())["model"]["name_or_path"]
    adapter, named = str(in_tmp / "run" / "adapter"), ["--method", "./own.py:Own"]
    generate = ["generate", base, "--adapter", adapter, "--prompt", "a", "--max-new-tokens", "1"]
    commands = {
        "eval": ["eval", str(recipe)],
        "merge": ["merge", base, adapter, "merged", *named],
        "generate": [*generate, *named],
    }
    capsys.readouterr()
    for expected in (0, 1):
        for name, command in commands.items():
            assert run([*command, *(["--overwrite"] if name == "merge" and expected else [])]) == 0
            assert capsys.readouterr().err.count(CHANGED) == expected, name
        lorakit.load(base, adapter, method=Path("own.py:Own"))  # type: ignore[arg-type]
        assert capsys.readouterr().err.count(CHANGED) == expected
        change_the_code() if not expected else None


def test_what_to_do_with_an_adapter_whose_code_is_not_named(
    recipe: Path, in_tmp: Path, launcher: Launcher
) -> None:
    """In processes of their own, since a process remembers the methods that it has run."""
    card = (in_tmp / "run" / "adapter" / "README.md").read_text()
    assert "run/adapter merged --method ./own.py:Own\n" in card
    assert 'run/adapter", method="./own.py:Own")' in card
    convert = ["convert", "run/adapter", "out", "--to", "lora"]
    lora = ["eval", str(recipe), "--adapter", "run/adapter", "--set", "adapter={}"]
    for command, said in (
        (
            convert,
            "cannot be converted; lorakit merge BASE run/adapter OUT --method ./own.py:Own",
        ),
        (lora, "hint: set adapter.method to ./own.py:Own in the recipe"),
    ):
        ended = launcher.run(command)
        assert ended.code == 2
        *_, message = ended.err.splitlines()
        assert said in message
