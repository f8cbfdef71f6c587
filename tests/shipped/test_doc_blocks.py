"""Every block of README.md and docs/: commands parse, recipes are valid, Python compiles.

tests/shipped/test_doc_runs.py runs them.
"""

from __future__ import annotations

import ast
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from lorakit.cli.main import app, run
from tests.shipped.doc_blocks import OTHER, PAGES, PROGRAMS, SHELL, blocks, shell_commands
from tests.shipped.test_docs import REPO

_COMMANDS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
_SECTIONS = {"model", "adapter", "task", "train"}
#: What a fragment of a recipe leaves out.
_REST = {
    "model": {"name_or_path": "models/smollm2-135m-instruct"},
    "adapter": {"target_modules": ["q", "v"]},
    "task": {"name": "completion", "path": "data/pairs"},
    "train": {"output_dir": "runs/pairs"},
}
#: Why blocks are not run, and how many each reason excuses: a new one is added here, too.
NOT_RUN = {
    "a part of a file": 2,
    "runs until Ctrl-C": 1,
    "an error in another recipe": 1,
    "needs llama.cpp": 1,
    "needs Ollama": 1,
    "needs the network": 3,
    "tests/export runs it, on a tokenizer that llama.cpp has": 1,
}


@pytest.mark.parametrize("page", PAGES)
def test_commands_parse(page: str) -> None:
    for program, *arguments in shell_commands(page):
        assert program == "lorakit" or program in PROGRAMS, program
        if program == "lorakit" and not arguments[0].startswith("-"):
            name, *others = arguments
            others = others[: others.index(">")] if ">" in others else others
            assert name in _COMMANDS, name
            _COMMANDS[name].make_context(name, others)
        elif program == "python" and arguments[0].endswith(".py"):
            source = (REPO / arguments[0]).read_text(encoding="utf-8")
            for word in arguments[1:]:
                assert not word.startswith("--") or f'"{word.split("=")[0]}"' in source, word


@pytest.mark.parametrize("page", PAGES)
@pytest.mark.usefixtures("in_doc_files")
def test_recipes_pass_validate(page: str) -> None:
    """Sections that a block leaves out are those of a small recipe."""
    named = [block for block in blocks(page) if block.file]
    for block in named:
        Path(block.file).parent.mkdir(parents=True, exist_ok=True)
        Path(block.file).write_text(block.body, encoding="utf-8")
    for block in blocks(page):
        if block.language != "yaml":
            continue
        found = yaml.safe_load(block.body)
        if not block.reason and isinstance(found, dict) and set(found) <= _SECTIONS:
            missing = {key: _REST[key] for key in _SECTIONS - set(found)}
            rest = yaml.safe_dump(missing) if missing else ""
            Path("recipe.yaml").write_text(f"{block.body}\n{rest}", encoding="utf-8")
            assert run(["validate", "recipe.yaml"]) == 0, str(block)


@pytest.mark.parametrize("page", PAGES)
def test_blocks_have_a_known_language_and_python_compiles(page: str) -> None:
    for block in blocks(page):
        signature = block.language == "py" and page == "docs/api.md"
        assert signature or block.language in (*SHELL, *OTHER), str(block)
        if block.language == "python":
            ast.parse(block.body, str(block))


def test_blocks_that_are_not_run_are_counted() -> None:
    found = Counter(block.reason for page in PAGES for block in blocks(page) if block.reason)
    assert dict(found) == NOT_RUN
