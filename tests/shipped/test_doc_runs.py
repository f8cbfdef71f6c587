"""README.md and docs/, run page by page: each block in order, on tiny models.

Slow: scripts/soak.sh -k doc_runs. What is not run says why, in the page or in ``PROGRAMS``, and is counted.
"""

from __future__ import annotations

import io
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import lorakit
from lorakit.cli.main import run
from tests.shipped import doc_sandbox
from tests.shipped.doc_blocks import PAGES, PROGRAMS, SHELL, Block, blocks

#: The runs that a page trains itself.
TRAINED = {
    "README.md": ("chat",),
    "docs/index.md": ("chat",),
    "docs/tutorial.md": ("quickstart",),
    "docs/first-run.md": ("chat", "reviews"),
    "docs/migrate.md": ("chat",),
}
RUN_HERE = [
    page for page in PAGES
    if any(not b.reason and b.language in (*SHELL, "console", "python") for b in blocks(page))
]  # fmt: skip


@pytest.fixture(scope="module")
def with_runs(doc_files: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(doc_files)
        doc_sandbox.write_runs(doc_files)


def prepare(page: str) -> dict[str, Any]:
    """Make what a page takes for granted; return the names that its Python blocks use."""
    for name in TRAINED.get(page, ()):
        shutil.rmtree(Path("runs") / name)
    if page == "docs/migrate.md":
        Path("recipe.yaml").unlink()
    if page == "docs/predict.md":
        lorakit.merge("models/all-minilm-l6-v2", "runs/reviews/adapter", "merged")
    if page == "docs/papers.md":
        for number in (1, 2):
            member = (
                Path("runs/papers/lora-figures-3-4/members") / ("r8-seed1", "r64-seed2")[number - 1]
            )
            shutil.copytree(f"runs/seed-{number}", member)
    if page == "docs/lm-evaluation-harness.md":
        pytest.importorskip("lm_eval", reason="needs lorakit[harness]")
    model = torch.nn.ModuleDict({"q": torch.nn.Linear(8, 8), "v": torch.nn.Linear(8, 8)})
    return {"any_module": model, "model": model, "torch": torch}


def run_shell(block: Block) -> None:
    for program, *arguments in block.commands():
        if program != "lorakit":
            assert program in PROGRAMS, f"{block}: {program}"
            continue
        if ">" in arguments:
            arguments = arguments[: arguments.index(">")]
        assert run(arguments) == 0, f"{block}: lorakit {' '.join(arguments)}"


def run_block(block: Block, names: dict[str, Any]) -> None:
    if block.file:
        return
    if block.language == "yaml":
        if "model" in yaml.safe_load(block.body):
            Path("recipe.yaml").write_text(block.body, encoding="utf-8")
    elif block.language == "python":
        exec(compile(block.body, str(block), "exec"), names)
    elif block.language in (*SHELL, "console"):
        run_shell(block)


@pytest.mark.slow
@pytest.mark.parametrize("page", RUN_HERE)
@pytest.mark.usefixtures("with_runs", "in_doc_files")
def test_the_blocks_of_a_page_run(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    names = prepare(page)
    for block in blocks(page):
        if block.file:
            Path(block.file).parent.mkdir(parents=True, exist_ok=True)
            Path(block.file).write_text(block.body, encoding="utf-8")
    for block in blocks(page):
        monkeypatch.setattr(sys, "stdin", io.StringIO("one two\n"))
        if not block.reason:
            run_block(block, names)
