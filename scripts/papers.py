"""Repeat the experiments of the papers, and print each table beside the paper's.

    GLUE_PATH=DIR WIKISQL_PATH=DIR python scripts/papers.py                  # all of them
    GLUE_PATH=DIR WIKISQL_PATH=DIR python scripts/papers.py lora-table6      # or some
    GLUE_PATH=DIR WIKISQL_PATH=DIR python scripts/papers.py --quick          # a check that all runs

Each experiment is a sweep, recipes/papers/NAME.yaml, and `lorakit inspect` on its adapters where
the paper looks into them; docs/papers.md describes them. Figures are in OUT/NAME/plots and
OUT/NAME/inspect. Run again to continue where a run was interrupted. ``--quick`` trains on a few
rows, so that its scores mean nothing.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

RECIPES = Path("recipes/papers")
BASE = "models/all-minilm-l6-v2"
#: What --quick sets, by the sweep's recipe.
QUICK = {
    "encoder": ["task.limit_train=64", "task.limit_eval=64", "train.epochs=1"],
    "causal": ["task.limit_train=8", "task.limit_eval=2", "task.eval_generate=never"],
}
#: The numbers of directions for which the similarity of subspaces is printed.
PHI = ((1, 1), (2, 2), (8, 8), (8, 64))
#: Two ranks with one seed, which determines the initial head and the order of the rows as well, and
#: with two; and one rank with two.
PAIRS = (("r8-seed1", "r64-seed1"), ("r8-seed1", "r64-seed2"), ("r64-seed1", "r64-seed2"))
Rows = list[list[str]]


@dataclass(frozen=True)
class Paper:
    """``values``: what the paper has for each row of the sweep's table, by the row's first cells;
    the titles have the key (). ``inspect`` prints what the adapters contain."""

    source: str
    values: dict[tuple[str, ...], Sequence[str]] = field(default_factory=dict)
    says: str = ""
    inspect: Callable[[Path], None] | None = None


def main() -> int:
    arguments = parse()
    started = time.monotonic()
    failed = [name for name in arguments.names if not run(name, arguments.out, arguments.quick)]
    print(f"\nin all {time.monotonic() - started:.0f} s")
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return int(bool(failed))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(PAPERS))
    parser.add_argument("--out", type=Path, default=Path("runs/papers"))
    parser.add_argument("--quick", action="store_true", help="a few rows, to see that all runs")
    arguments = parser.parse_args()
    arguments.names = arguments.names or list(PAPERS)
    if unknown := sorted(set(arguments.names) - set(PAPERS)):
        parser.error(f"unknown: {', '.join(unknown)}; allowed: {', '.join(PAPERS)}")
    if arguments.quick and arguments.out == Path("runs/papers"):
        arguments.out = Path("runs/papers-quick")
    return arguments


def run(name: str, out: Path, quick: bool) -> bool:
    """Train the experiment's members and print its tables; return whether all members completed."""
    paper, folder, file = PAPERS[name], out / name, RECIPES / f"{name}.yaml"
    command = ["sweep", str(file), "--resume", "--output-dir", str(folder)]
    if quick:
        recipe = next(key for key in QUICK if f"/{key}.yaml" in file.read_text(encoding="utf-8"))
        command += [word for text in settings(file, recipe) for word in ("--set", text)]
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-m", "lorakit", *command], stdout=sys.stderr)
    print(f"\n## {name}: {paper.source}\n")
    if not (folder / "table.csv").is_file():
        print("no result")
        return False
    print_table(sweep_table(folder / "table.csv", paper.values))
    if paper.says:
        print(f"\nThe paper: {paper.says}")
    if paper.inspect is not None and done.returncode == 0:
        paper.inspect(folder)
    print(f"\n{time.monotonic() - started:.0f} s; figures: {folder}", flush=True)
    return done.returncode == 0


def settings(file: Path, recipe: str) -> list[str]:
    """What ``--quick`` sets, without the keys that the grid varies."""
    grid = file.read_text(encoding="utf-8").partition("\ngrid:")[2]
    return [text for text in QUICK[recipe] if f"  {text.partition('=')[0]}:" not in grid]


def inspect(*words: str | Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "lorakit", "inspect", *map(str, words), "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def sweep_table(file: Path, values: dict[tuple[str, ...], Sequence[str]]) -> Rows:
    """The table of a sweep, with the paper's columns at its end."""
    with file.open(encoding="utf-8", newline="") as lines:
        titles, *rows = csv.reader(lines)
    at = next(place for place, title in enumerate(titles) if title.endswith("_std")) - 1
    keys, metric = titles[:at], titles[at]
    added, width = values.get((), []), max(map(len, values), default=0)
    table = [[*(key.rpartition(".")[2] for key in keys), metric, "parameters", "seconds", *added]]
    for row in rows:
        mean, std, _, parameters, seconds = row[at : at + 5]
        score = f"{float(mean):.4f}" if mean else "-"
        score += f" ± {float(std):.4f}" if std else ""
        cells = [score, f"{int(parameters):,}" if parameters else "-"]
        cells.append(f"{float(seconds):.1f}" if seconds else "-")
        table.append([*row[:at], *cells, *values.get(tuple(row[:width]), ["-"] * len(added))])
    return table


def print_table(rows: Rows) -> None:
    for row in [rows[0], ["---"] * len(rows[0]), *rows[1:]]:
        print(f"| {' | '.join(row)} |")


def subspaces(folder: Path) -> None:
    """Figures 3 and 4: phi at some places, as means over the layers, and of random matrices."""
    places = [f"phi({i}, {j})" for i, j in PHI]
    titles = [title for place in places for title in (place, "random")]
    rows = [["adapters", "side", "role", *titles]]
    for one, other in PAIRS:
        for side in ("right", "left"):
            adapters = [folder / "members" / name / "adapter" for name in (one, other)]
            plot = folder / "inspect" / f"{one}-{other}-{side}"
            found = inspect(*adapters, "--side", side, "--plot", plot)
            roles = {module["module"]: module["role"] for module in found["modules"]}
            similar = found["similarity"]["modules"]
            for role in dict.fromkeys(roles.values()):
                own = [module for module in similar if roles[module["module"]] == role]
                rows.append([f"{one}, {other}", side, role, *phi_cells(own)])
    print()
    print_table(rows)


def phi_cells(modules: Sequence[dict[str, Any]]) -> list[str]:
    """phi and its control at ``PHI``, or where the directions end."""
    cells = []
    for i, j in PHI:
        for key in ("phi", "control_phi"):
            grids = [module[key] for module in modules if module[key]]
            values = [grid[min(i, len(grid)) - 1][min(j, len(grid[0])) - 1] for grid in grids]
            cells.append(f"{statistics.fmean(values):.3f}" if values else "-")
    return cells


def amplification(folder: Path) -> None:
    """Table 7, for q of each layer and v as a mean."""
    rows = [["r", "role", "layer", "norm of dW", "norm of U^T W V", "amplification"]]
    for r in (4, 64):
        member = folder / "members" / f"r={r}"
        words = ("--base", BASE, "--plot", folder / "inspect" / member.name)
        modules = inspect(member / "adapter", *words)["modules"]
        for role in ("q", "v"):
            own = [module for module in modules if module["role"] == role]
            middle = sorted(own, key=lambda module: module["layer"])[len(own) // 2]
            rows.append([str(r), role, str(middle["layer"]), *amplified([middle])])
            rows.append([str(r), role, f"mean of {len(own)}", *amplified(own)])
    print()
    print_table(rows)


def amplified(modules: Sequence[dict[str, Any]]) -> list[str]:
    known = [module for module in modules if module["amplification"]]
    if not known:
        return ["-", "-", "-"]
    norms = [module["norm_delta"] for module in known]
    within = [module["norm_delta"] / module["amplification"] for module in known]
    factors = [module["amplification"] for module in known]
    return [f"{statistics.fmean(values):.2f}" for values in (norms, within, factors)]


def rank_map(folder: Path) -> None:
    """The ranks of an AdaLoRA adapter by role and layer; its figure is the paper's Figure 3."""
    members = json.loads((folder / "sweep.json").read_text(encoding="utf-8"))["members"]
    member = next(m for m in members if m["set"].get("adapter.target_r") == 4)
    modules = inspect(member["adapter_dir"], "--plot", folder / "inspect" / "target_r=4")["modules"]
    layers = sorted({module["layer"] for module in modules})
    roles = list(dict.fromkeys(module["role"] for module in modules))
    ranks = {(module["role"], module["layer"]): module["r"] for module in modules}
    rows = [["rank of", *(f"layer {layer}" for layer in layers)]]
    rows += [[role, *(str(ranks.get((role, layer), "-")) for layer in layers)] for role in roles]
    print(f"\n{member['name']}:\n")
    print_table(rows)


def d_90(folder: Path) -> None:
    """The smallest d with 90% of the score of full fine-tuning."""
    found = json.loads((folder / "sweep.json").read_text(encoding="utf-8"))
    scores = {m["name"]: m["metrics"][found["metric"]] for m in found["members"]}
    goal = 0.9 * scores["full"]
    reached = sorted(
        member["set"]["adapter.d"]
        for member in found["members"]
        if "adapter.d" in member["set"] and scores[member["name"]] >= goal
    )
    print(f"\n90% of full: {goal:.4f}; d_90: {reached[0] if reached else 'above all d'}")


TABLE_5 = {
    (): ["GPT-3, WikiSQL", "GPT-3, MNLI"],
    ("q",): ["70.4", "91.0"],
    ("k",): ["70.0", "90.8"],
    ("v",): ["73.0", "91.0"],
    ("o",): ["73.2", "91.3"],
    ("q+k",): ["71.4", "91.3"],
    ("q+v",): ["73.7", "91.3"],
    ("q+k+v+o",): ["73.7", "91.7"],
}
TABLE_6 = {
    (): ["GPT-3, WikiSQL", "GPT-3, MNLI"],
    ("1", "q"): ["68.8", "90.7"],
    ("2", "q"): ["69.6", "90.9"],
    ("4", "q"): ["70.5", "91.1"],
    ("8", "q"): ["70.4", "90.7"],
    ("64", "q"): ["70.0", "90.7"],
    ("1", "q+v"): ["73.4", "91.3"],
    ("2", "q+v"): ["73.3", "91.4"],
    ("4", "q+v"): ["73.7", "91.3"],
    ("8", "q+v"): ["73.8", "91.6"],
    ("64", "q+v"): ["73.5", "91.4"],
    ("1", "q+k+v+o"): ["74.1", "91.2"],
    ("2", "q+k+v+o"): ["73.7", "91.7"],
    ("4", "q+k+v+o"): ["74.0", "91.7"],
    ("8", "q+k+v+o"): ["74.0", "91.5"],
    ("64", "q+k+v+o"): ["73.9", "91.4"],
}
LORA, REGRET = "LoRA (Hu et al. 2021)", "LoRA Without Regret (Schulman et al. 2025)"
PAPERS = {
    "lora-table5": Paper(f"{LORA}, Table 5", TABLE_5),
    "lora-table5-wikisql": Paper(f"{LORA}, Table 5", TABLE_5),
    "lora-table6": Paper(f"{LORA}, Table 6", TABLE_6),
    "lora-table6-wikisql": Paper(f"{LORA}, Table 6", TABLE_6),
    "lora-figures-3-4": Paper(
        f"{LORA}, Figures 3 and 4",
        says="phi(1, 1) is above 0.5 in layer 48 of GPT-3, and falls with i and j; that of random "
        "matrices is about 0.",
        inspect=subspaces,
    ),
    "lora-table7": Paper(
        f"{LORA}, Table 7",
        says="q in layer 48 of GPT-3: 6.91 / 0.32 = 21.5 at r = 4, 3.57 / 1.90 = 1.9 at r = 64.",
        inspect=amplification,
    ),
    "lora-plus-ratio": Paper(
        "LoRA+ (Hayou et al. 2024)",
        says="B needs a higher learning rate than A; 16 times is recommended.",
    ),
    "adalora-budget": Paper(
        "AdaLoRA (Zhang et al. 2023), Table 1",
        says="DeBERTaV3-base on MRPC: LoRA 89.95 (1.33M parameters) and 89.71 (0.33M), AdaLoRA "
        "90.69 (1.27M) and 90.44 (0.32M).",
        inspect=rank_map,
    ),
    "intrinsic-dimension": Paper(
        "Intrinsic dimension (Aghajanyan et al. 2020)",
        says="d_90 is about 200 for RoBERTa-large on MRPC.",
        inspect=d_90,
    ),
    "lora-without-regret-layers": Paper(
        REGRET, says="attention alone is worse than the MLP alone, which is as good as all layers."
    ),
    "lora-without-regret-rank": Paper(
        REGRET,
        says="the best learning rate hardly depends on the rank, and is about 10 times that of "
        "full fine-tuning.",
    ),
    "lora-without-regret-batch": Paper(
        REGRET, says="LoRA loses more than full fine-tuning in large batches, at any rank."
    ),
}


if __name__ == "__main__":
    sys.exit(main())
