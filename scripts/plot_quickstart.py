"""Plot accuracy before and after training, and the loss of the quickstart's run, for the README.

python scripts/plot_quickstart.py runs/quickstart docs/quickstart.png    (needs lorakit[plots])
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

GRAY, BLUE = "#9aa5b1", "#1f6feb"


def main() -> None:
    run, out = Path(sys.argv[1]), sys.argv[2]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [(line["step"], line["loss"]) for line in lines if "loss" in line]
    scores = [
        json.loads((run / f"eval-{side}.json").read_text())["metrics"]
        for side in ("base", "adapter")
    ]
    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 2.8), width_ratios=(1, 1.4))
    values = [100 * score["ex_accuracy"] for score in scores]
    bars = left.bar(["base", "with the adapter"], values, color=[GRAY, BLUE], width=0.55)
    left.bar_label(bars, [f"{value:.1f}%" for value in values], padding=3)
    left.set(title="SQL that gives the right answer", ylim=(0, 115), yticks=[])
    left.spines["left"].set_visible(False)
    right.plot(*zip(*losses, strict=True), color=BLUE, marker="o", markersize=3)
    right.set(title="training loss", xlabel="step", ylim=(0, None))
    figure.tight_layout()
    figure.savefig(out, dpi=130)


if __name__ == "__main__":
    main()
