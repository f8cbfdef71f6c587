"""Draw the quickstart's result for the README: a question, both answers, accuracy, and loss.

python scripts/plot_quickstart.py runs/quickstart docs/quickstart.png    (needs lorakit[plots])
"""

from __future__ import annotations

import json
import sys
import textwrap
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
from quickstart_summary import Answers, Outcome, read_outcome

GRAY, RED, BLUE, GREEN = "#6b7280", "#b42318", "#1f6feb", "#11734b"
#: 8 inches at 200 dpi are 1600 pixels, shown at half that width on most pages.
WIDTH, HEIGHT, DPI = 8.0, 4.7, 200


def main() -> None:
    run, out = Path(sys.argv[1]), sys.argv[2]
    outcome = read_outcome(run)
    plt.rcParams.update(
        {
            "font.size": 10.5,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.titlesize": 11.5,
        }
    )
    figure = plt.figure(figsize=(WIDTH, HEIGHT), facecolor="white")
    grid = figure.add_gridspec(2, 2, height_ratios=(1, 1.35), width_ratios=(1, 1.35))
    draw_answers(figure.add_subplot(grid[0, :]), outcome.answers[0])
    draw_accuracy(figure.add_subplot(grid[1, 0]), outcome)
    draw_loss(figure.add_subplot(grid[1, 1]), run)
    figure.tight_layout(h_pad=1.4, w_pad=2.5)
    figure.savefig(out, dpi=DPI, facecolor="white")


def draw_answers(axes: Any, answers: Answers) -> None:
    axes.axis("off")
    lines = [
        ("question", answers.question, "black"),
        ("columns", answers.columns, "black"),
        ("base model", answers.base, RED),
        ("with the adapter", answers.adapter, GREEN),
    ]
    height = 1.02
    for label, text, color in lines:
        wrapped = textwrap.wrap(text, 64)[:2]
        axes.text(0, height, label, color=GRAY, va="top", transform=axes.transAxes)
        axes.text(
            0.2, height, "\n".join(wrapped), color=color, va="top", family="monospace",
            fontsize=9.5, transform=axes.transAxes, linespacing=1.35, parse_math=False,
        )  # fmt: skip
        height -= 0.13 + 0.155 * len(wrapped)


def draw_accuracy(axes: Any, outcome: Outcome) -> None:
    found = (outcome.base, outcome.run)
    values = [100 * scores["metrics"]["ex_accuracy"] for scores in found]
    bars = axes.bar(["base model", "with the adapter"], values, color=[GRAY, BLUE], width=0.55)
    axes.bar_label(bars, [f"{value:.1f}%" for value in values], padding=3)
    axes.set(
        title=f"{outcome.questions} questions on unseen tables", ylabel="right results, %",
        ylim=(0, 112), yticks=range(0, 101, 25),
    )  # fmt: skip


def draw_loss(axes: Any, run: Path) -> None:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [(line["step"], line["loss"]) for line in lines if "loss" in line]
    axes.plot(*zip(*losses, strict=True), color=BLUE, marker="o", markersize=3.5)
    axes.set(title="training loss", xlabel="step", ylabel="loss per token, nats", ylim=(0, None))


if __name__ == "__main__":
    main()
