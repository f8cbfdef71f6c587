"""Compare the memory that ``lorakit plan`` predicts with what short runs on a GPU really allocate.

    python scripts/bench_plan.py --cases 8b 8b-nf4 roberta [--parts] [--output results.jsonl]

Models have the named shape and random weights; each case is a run of ``lorakit train`` of a few
steps, whose ``run.json`` has the peak. With ``--parts``, the process also reports what is allocated
after each stage and around the backward pass, and the largest tensors at the moment of the peak.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import Any

from bench_gpu import recipe_arguments
from gpu_cases import CASES, Case, save_model, write_rows

GIB = 2**30
CHECKPOINTING = {"train.gradient_checkpointing": True}
COMPILED, EAGER = {"train.compile": True}, {"train.compile": False}


def case(base: str, steps: int = 4, **changes: Any) -> Case:
    """A case of ``bench_gpu`` with fewer steps and other values; ``recipe`` is added to its own."""
    recipe = CASES[base].recipe | changes.pop("recipe", {})
    return replace(CASES[base], steps=steps, recipe=recipe, **changes)


PLANS = {
    "8b": case("8b", recipe=COMPILED),
    "8b-eager": case("8b", recipe=EAGER | CHECKPOINTING),
    "8b-checkpointing": case("8b-all", recipe=COMPILED | CHECKPOINTING),
    "8b-qv": case("8b", targets=("q", "v"), recipe=COMPILED),
    "8b-fp8": case("8b-all-fp8", recipe=COMPILED),
    "8b-nf4": case("8b-all-nf4", recipe=COMPILED),
    "8b-nf4-checkpointing": case("8b-all-nf4", recipe=COMPILED | CHECKPOINTING),
    "8b-packed": case("8b-packed", recipe=COMPILED),
    "8b-offload": case("8b-all-offload", recipe=COMPILED),
    "1b": case("1b"),
    "1b-eager": case("1b", recipe=EAGER),
    "1b-compiled": case("1b", recipe=COMPILED),
    "1b-qv": case("1b", targets=("q", "v"), recipe=EAGER),
    "1b-float32": case("1b", recipe=EAGER | {"model.dtype": "float32"}),
    "1b-adalora": case("1b-adalora"),
    "1b-adalora-eager": case("1b-adalora", recipe=EAGER),
    "1b-dropout": case("1b", recipe=EAGER | {"adapter.lora_dropout": 0.05}),
    "1b-packed": case(
        "1b", rows="wikisql", recipe=EAGER | {"task.packing": True, "adapter.lora_dropout": 0.05}
    ),
    "roberta": case("roberta", steps=40),
    "roberta-all": case("roberta-all", steps=40),
    "roberta-eager": case("roberta-all", steps=40, recipe=EAGER),
    "roberta-checkpointing": case("roberta-all", steps=40, recipe=EAGER | CHECKPOINTING),
    "roberta-float32": case("roberta-all", steps=40, recipe=EAGER | {"model.dtype": "float32"}),
    "smollm2": case("smollm2", steps=40),
    "smollm2-eager": case("smollm2", steps=40, recipe=EAGER),
}


def main() -> None:
    arguments = parse()
    if arguments.observe:
        observe(arguments.observe)
        return
    work = Path(arguments.work)
    for name in arguments.cases:
        save_model(PLANS[name], work)
        write_rows(PLANS[name], work)
        report = {"case": name} | measure(PLANS[name], work, arguments.parts)
        print(json.dumps(report), flush=True)
        if arguments.output:
            with Path(arguments.output).open("a") as file:
                file.write(json.dumps(report) + "\n")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", nargs="+", choices=PLANS, default=[])
    parser.add_argument("--parts", action="store_true", help="report what is allocated when")
    parser.add_argument("--work", default="/tmp/bench_plan")
    parser.add_argument("--output")
    parser.add_argument("--observe", nargs="+", help=argparse.SUPPRESS)
    return parser.parse_args()


def measure(case: Case, work: Path, parts: bool) -> dict[str, Any]:
    """Plan and train a case; GiB."""
    run, options = recipe_arguments(case, work, case.recipe.get("train.compile", "auto"))
    planned = command([sys.executable, "-m", "lorakit", "plan", *options, "--json"])
    script = [
        sys.executable,
        __file__,
        "--observe",
        "train",
        *(o.replace("--", "++", 1) for o in options),
    ]
    trained = command(script if parts else [sys.executable, "-m", "lorakit", "train", *options])
    report: dict[str, Any] = {"plan": planned.get("memory_bytes", planned)}
    if "error" in trained:
        return report | trained
    record = json.loads((run / "run.json").read_text())
    peak = record["peak_memory_bytes"]
    report |= {"steps": record["steps"], "seconds": record["seconds"], "peak_gib": peak / GIB}
    if "peak" in report["plan"]:
        report["plan"] = {part: round(b / GIB, 3) for part, b in report["plan"].items()}
        report["ratio"] = round(report["plan"]["peak"] / report["peak_gib"], 3)
        report["planned_seconds"] = planned.get("seconds")
    return report | {"parts": trained} if parts else report


def command(arguments: list[str]) -> dict[str, Any]:
    """The JSON that a command prints last, or its error."""
    done = subprocess.run(arguments, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode:
        return {"error": done.stderr[-800:]}
    return dict(json.loads(lines[-1])) if lines else {}


def observe(arguments: list[str]) -> None:
    """Run a ``lorakit`` command in this process, and print what was allocated when, in GiB."""
    import torch

    from lorakit.cli.main import run
    from lorakit.distributed.strategy import Strategy
    from lorakit.training import build
    from lorakit.training.engine.eager import EagerEngine

    moments: list[tuple[str, float, float]] = []

    def noted(label: str, function: Any) -> Any:
        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            note(f"before {label}")
            result = function(*args, **kwargs)
            note(f"after {label}")
            return result

        return call

    def note(moment: str) -> None:
        if len(moments) < 40:
            allocated, peak = torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
            moments.append((moment, round(allocated / GIB, 3), round(peak / GIB, 3)))

    build.build_objective = noted("objective", build.build_objective)
    build.build_engine = noted("engine", build.build_engine)
    Strategy.backward = noted("backward", Strategy.backward)  # type: ignore[method-assign]
    EagerEngine.change_weights = noted("update", EagerEngine.change_weights)  # type: ignore[method-assign]
    torch.cuda.memory._record_memory_history(max_entries=10**6, context="alloc", stacks="python")
    code = run([argument.replace("++", "--", 1) for argument in arguments])
    if code:
        sys.exit(code)
    print(json.dumps({"moments": moments, "largest": largest_at_peak()}))


def largest_at_peak() -> dict[str, Any]:
    """What was alive when most was allocated, by size and place, from the allocator's history."""
    import torch

    events = torch.cuda.memory._snapshot()["device_traces"][0]
    live: dict[int, Any] = {}
    total = peak = at = 0
    for index, event in enumerate(events):
        if event["action"] == "alloc":
            live[event["addr"]] = event
            total += event["size"]
        elif event["action"] == "free_completed" and event["addr"] in live:
            total -= live.pop(event["addr"])["size"]
        if total > peak:
            peak, at = total, index
    live.clear()
    for event in events[: at + 1]:
        if event["action"] == "alloc":
            live[event["addr"]] = event
        elif event["action"] == "free_completed":
            live.pop(event["addr"], None)
    counts: Counter[tuple[float, str]] = Counter()
    for event in live.values():
        counts[round(event["size"] / 2**20, 2), place(event)] += 1
    order = sorted(counts.items(), key=lambda item: -item[0][0] * item[1])
    lines = [f"{count} x {size} MiB {where}" for (size, where), count in order[:28]]
    return {"gib": round(peak / GIB, 3), "at": place(events[at], 6), "alive": lines}


def place(event: Any, count: int = 2) -> str:
    """The innermost Python frames of an allocation."""
    frames = [f for f in event.get("frames", ()) if f["filename"].endswith(".py")]
    return " < ".join(f"{Path(f['filename']).name}:{f['line']}:{f['name']}" for f in frames[:count])


if __name__ == "__main__":
    main()
