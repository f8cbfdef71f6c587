"""The fenced blocks of README.md and docs/, and the command lines in them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass

from tests.shipped.test_docs import DOCS

#: What a block may be; one without a language holds commands, and ``py`` a signature of docs/api.md.
SHELL = ("", "bash")
OTHER = ("console", "json", "python", "text", "yaml")
#: Programs that are not run, and why.
PROGRAMS = {
    "pip": "installs packages from the network",
    "bash": "a script that tests of its own run",
    "python": "a script that tests of its own run",
    "torchrun": "needs several GPUs or hosts; tests/e2e/test_launchers.py runs it on the CPU",
    "accelerate": "needs several GPUs or hosts; tests/e2e/test_launchers.py runs it on the CPU",
    "source": "activates an environment",
    "twine": "needs the network",
    "sbatch": "needs SLURM",
    "llama-cli": "needs llama.cpp",
    "ollama": "needs Ollama",
    "lm_eval": "tests/e2e/test_lm_eval.py runs it",
    "export": "sets variables, as doc_sandbox does",
}
PAGES = [name for name in DOCS if name != "CHANGELOG.md"]

_BLOCK = re.compile(
    r"^(?:<!-- not run: (?P<reason>[^>]+) -->\n)?```(?P<language>\w*)(?: (?P<file>\S+))?\n"
    r"(?P<body>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
_INDENTED = re.compile(
    r"^    ((?:\w+=\S+ )*(?:lorakit|python|accelerate|torchrun|bash) .+(?:\n {8}.+)*)", re.MULTILINE
)
_ASSIGNMENT = re.compile(r"\w+=\S*")


@dataclass(frozen=True)
class Block:
    """A fenced block: its place, what the fence says, and why it is not run, if it is not."""

    page: str
    line: int
    language: str
    file: str
    body: str
    reason: str

    def commands(self) -> Iterator[list[str]]:
        """Yield the words of each command, without variables that are set before it."""
        lines = self.body.replace("\\\n", " ").splitlines()
        if self.language == "console":
            lines = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
        yield from _words(lines)

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks(page: str) -> list[Block]:
    text = DOCS[page]
    return [
        Block(
            page, text.count("\n", 0, match.start("body")), match["language"], match["file"] or "",
            match["body"], match["reason"] or "",
        )
        for match in _BLOCK.finditer(text)
    ]  # fmt: skip


def shell_commands(page: str) -> Iterator[list[str]]:
    """Yield the commands in fenced blocks and in blocks that are indented by four columns."""
    for block in blocks(page):
        if block.language in (*SHELL, "console"):
            yield from block.commands()
    for text in _INDENTED.findall(_BLOCK.sub("", DOCS[page])):
        yield from _words(text.replace("\\\n", " ").splitlines())


def _words(lines: list[str]) -> Iterator[list[str]]:
    for line in lines:
        words = shlex.split(line, comments=True)
        while words and _ASSIGNMENT.fullmatch(words[0]):
            del words[0]
        if words:
            yield words
