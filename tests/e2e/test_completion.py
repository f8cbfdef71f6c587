"""Completion in the shell: the scripts that are printed, and what they complete."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]


@pytest.fixture
def program(tmp_path: Path) -> Path:
    """The command ``lorakit``, on a search path of its own."""
    file = tmp_path / "bin" / "lorakit"
    file.parent.mkdir()
    file.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m lorakit "$@"\n')
    file.chmod(0o755)
    return file


def command(program: Path, *words: str, **environment: str) -> str:
    path = f"{program.parent}{os.pathsep}{os.environ['PATH']}"
    extra = {"PATH": path, "PYTHONPATH": str(REPO), "HOME": str(program.parents[1])}
    done = subprocess.run(
        words,
        env={**os.environ, **extra, **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def script(program: Path, shell: str) -> str:
    undetected = {"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    return command(program, str(program), "--show-completion", shell, **undetected)


def test_bash_completes_commands_and_names(program: Path) -> None:
    file = program.parents[1] / "completion.sh"
    file.write_text(script(program, "bash"))
    complete = f". {file}; _lorakit_completion lorakit; echo ${{COMPREPLY[*]}}"
    for words, expected in (
        ("lorakit trai", "train"),
        ("lorakit init --hard", "--hardware"),
        ("lorakit init --method ada", "adalora"),
        ("lorakit init --task token", "token_classification"),
    ):
        typed = f"COMP_WORDS=({words}); COMP_CWORD={len(words.split()) - 1}; "
        assert command(program, "bash", "-c", typed + complete).split() == [expected]


def test_zsh_gets_commands_with_their_descriptions(program: Path) -> None:
    assert script(program, "zsh").startswith("#compdef lorakit\n")
    environment = {"_LORAKIT_COMPLETE": "complete_zsh", "_TYPER_COMPLETE_ARGS": "lorakit ini"}
    shown = command(program, str(program), **environment)
    assert '"init":"Write a first recipe for a model and data."' in shown


def test_it_is_installed_for_bash(program: Path) -> None:
    undetected = {"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    command(program, str(program), "--install-completion", "bash", **undetected)
    home = program.parents[1]
    assert ".bash_completions/lorakit.sh" in (home / ".bashrc").read_text()
    assert "complete" in (home / ".bash_completions" / "lorakit.sh").read_text()


def test_it_is_quick(program: Path) -> None:
    environment = {
        "COMP_WORDS": "lorakit tr",
        "COMP_CWORD": "1",
        "_LORAKIT_COMPLETE": "complete_bash",
    }

    def seconds() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert command(program, str(program), **environment).split() == ["train"]
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert min(seconds() for _ in range(3)) < 0.8
