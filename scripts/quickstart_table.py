"""Print the quickstart's summary: accuracies, cost and files."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

METRICS = {"lf_accuracy": "logical-form accuracy", "ex_accuracy": "execution accuracy"}


def main() -> None:
    folder = Path(sys.argv[1])
    run = read(folder / "run.json")
    base, adapter = read(folder / "eval-base.json"), read(folder / "eval-adapter.json")
    console = Console()
    console.print()
    console.print(accuracy_table(base, adapter))
    console.print(cost_table(run, folder))


def read(file: Path) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return data


def accuracy_table(base: dict[str, Any], adapter: dict[str, Any]) -> Table:
    questions = adapter["examples"]
    table = Table(title=f"{adapter['task']}, {questions} questions on unseen tables")
    table.add_column("")
    table.add_column("base", justify="right")
    table.add_column("with the adapter", justify="right")
    for name, title in METRICS.items():
        before, after = base["metrics"][name], adapter["metrics"][name]
        table.add_row(title, f"{before:.1%}", f"{after:.1%}")
    return table


def cost_table(run: dict[str, Any], folder: Path) -> Table:
    trained, total = run["trainable_parameters"], run["total_parameters"]
    minutes, seconds = divmod(round(run["seconds"]), 60)
    table = Table(show_header=False)
    table.add_row("parameters trained", f"{trained:,} of {total:,} ({trained / total:.2%})")
    table.add_row("training", f"{run['steps']} steps, {minutes} min {seconds:02d} s")
    table.add_row("peak memory", f"{run['peak_memory_bytes'] / 2**30:.2f} GiB")
    table.add_row("adapter (PEFT format)", f"{folder / 'adapter'}")
    table.add_row("merged model", f"{folder / 'merged'}")
    table.add_row("run and metrics", f"{folder / 'run.json'}, {folder / 'metrics.jsonl'}")
    return table


if __name__ == "__main__":
    main()
