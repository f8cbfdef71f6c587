"""Print the quickstart's result: answers of both models, accuracies, and what to run next."""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

METRICS = {"lf_accuracy": "the same query", "ex_accuracy": "the right result"}
MODEL = "models/smollm2-135m-instruct"
_LONGEST_ANSWER = 120


@dataclass(frozen=True)
class Answers:
    """A question on an unseen table, the prompt that the models read, and what they answered;
    ``right`` tells whether the adapter answered as the dataset does."""

    question: str
    columns: str
    prompt: str
    base: str
    adapter: str
    right: bool


@dataclass(frozen=True)
class Outcome:
    """What the run, the adapter's final evaluation and that of the base have written."""

    folder: Path
    run: dict[str, Any]
    base: dict[str, Any]
    answers: list[Answers]

    @property
    def questions(self) -> int:
        return int(self.base["examples"])

    @property
    def share_trained(self) -> float:
        return float(self.run["trainable_parameters"] / self.run["total_parameters"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="directory of the run")
    parser.add_argument(
        "--active", action="store_true", help="the user's shell has the environment activated"
    )
    arguments = parser.parse_args()
    outcome = read_outcome(arguments.run)
    console = Console(highlight=False, soft_wrap=False)
    for answers in outcome.answers:
        console.print()
        console.print(answer_table(answers))
    console.print()
    console.print(accuracy_table(outcome))
    console.print()
    console.print(lesson(outcome))
    # Not through rich, which would break the commands where the line ends.
    print("\nNext:" if arguments.active else "\nNext, after `source .venv/bin/activate`:")
    for what, command in next_commands(outcome):
        print(f"\n  # {what}\n  {command}")


def read_outcome(folder: Path, count: int = 2) -> Outcome:
    """Read the results of a run, with the answers to ``count`` questions: if possible such that the
    adapter answers right and the base does not, and of those the ones with the longest queries."""
    predictions = _text(folder / "predictions-base.jsonl").splitlines()
    before = [str(json.loads(line)["prediction"]) for line in predictions]
    ranked = []
    for example in _read(folder / "predictions.json")["examples"]:
        base, reference = before[example["row"] - 1], example["reference"].strip()
        columns, question, _ = example["input"].split("\n", 2)
        answers = Answers(
            question.removeprefix("question: "), columns.removeprefix("columns: "),
            example["input"], _one_line(base), _one_line(example["prediction"]), example["right"],
        )  # fmt: skip
        shows = example["right"] and base.strip() != reference
        ranked.append((not shows, -len(reference), example["row"], answers))
    chosen = [answers for *_, answers in sorted(ranked, key=lambda item: item[:-1])[:count]]
    return Outcome(folder, _read(folder / "run.json"), _read(folder / "eval-base.json"), chosen)


def _text(file: Path) -> str:
    if not file.is_file():
        sys.exit(f"error: {file} does not exist; hint: rm -r {file.parent}, then run this again")
    return file.read_text(encoding="utf-8")


def _read(file: Path) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(_text(file))
    return data


def _one_line(text: str) -> str:
    return textwrap.shorten(text, _LONGEST_ANSWER, placeholder=" ...") or "(nothing)"


def answer_table(answers: Answers) -> Table:
    title = Text(f"Question: {answers.question}\nColumns: {answers.columns}", style="bold")
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, expand=True)
    table.add_column("base model", ratio=1, overflow="fold")
    table.add_column("with the adapter", ratio=1, overflow="fold")
    table.add_row(
        Text(answers.base, style="red"),
        Text(answers.adapter, style="green" if answers.right else "red"),
    )
    return table


def accuracy_table(outcome: Outcome) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column(f"of {outcome.questions} questions")
    table.add_column("base model", justify="right")
    table.add_column("with the adapter", justify="right")
    for name, title in METRICS.items():
        before, after = outcome.base["metrics"][name], outcome.run["metrics"][name]
        table.add_row(title, f"{before:.1%}", f"{after:.1%}")
    return table


def lesson(outcome: Outcome) -> str:
    """One sentence that says what was learnt, from what and at which cost."""
    run = outcome.run
    before, after = (found["metrics"]["ex_accuracy"] for found in (outcome.base, run))
    rows = run["data"]["train"]["rows"]
    minutes, seconds = divmod(round(run["seconds"]), 60)
    return (
        f"Training {outcome.share_trained:.2%} of the parameters on {rows:,} examples for "
        f"{minutes} min {seconds:02} s raised the execution accuracy from {before:.1%} to "
        f"{after:.1%}, on tables that are not in the training data."
    )


def next_commands(outcome: Outcome) -> list[tuple[str, str]]:
    """Commands for a shell, with what each does."""
    adapter, prompt = outcome.folder / "adapter", _in_shell(outcome.answers[0].prompt)
    return [
        (
            "ask a question, about your own columns if you edit it",
            f"lorakit generate {MODEL} --adapter {adapter} --prompt {prompt}",
        ),
        (
            "merge the adapter into a model that plain transformers loads",
            f"lorakit merge {MODEL} {adapter} {outcome.folder / 'merged'}",
        ),
        ("write a recipe for a model and data of your own; then: lorakit train recipe.yaml",
         "lorakit init"),
    ]  # fmt: skip


def _in_shell(text: str) -> str:
    """``text`` in quotes of bash and zsh, on one line."""
    for old, new in (("\\", "\\\\"), ("'", "\\'"), ("\n", "\\n")):
        text = text.replace(old, new)
    return f"$'{text}'"


if __name__ == "__main__":
    main()
