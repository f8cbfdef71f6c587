"""Time members that are trained together against the same ones trained one by one.

    python scripts/bench_joint.py minilm-rte --members 1 4 16 --steps 20
    python scripts/bench_joint.py smollm2-wikisql --dtype bfloat16 --members 20
    python scripts/bench_joint.py 8b --dtype bfloat16 --members 8    # needs a GPU

``8b`` is a Llama with random weights, on rows as long as WikiSQL's. The members are those of Table
6 of the LoRA paper: five ranks, two sets of targets, several seeds. Both ways run in this process,
on the GPU if there is one, with the engine that ``train`` chooses.
Prints a JSON line after each run, and one with both ways for each number of members: ``seconds`` is
the time of the whole calls, ``training_seconds`` that of the steps, with what is captured or
initialized in them. It excludes loading the model and the data, inserting adapters, and writing
files, and, of joint runs, what is built from all members before the first step.
``examples_per_second`` refers to it, ``cpu_seconds`` is what the process used, and
``peak_memory_bytes`` is on the GPU, or so far of the process.

With ``--repeat N`` each way runs N times, in turn; the line of both has medians, and
``first_training_seconds`` of the first run. The very first one, of members together, also loads
kernels and initializes libraries, of which the others in this process find most; ``--only`` shows
the first run of either way in a process of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gpu_cases
import torch

import lorakit
from lorakit.recipe.sections import Recipe
from lorakit.training.joint import train_joint
from lorakit.training.record import peak_memory_bytes

MODELS = Path(__file__).resolve().parents[1] / "models"
RANKS, TARGETS = (1, 2, 4, 8, 64), (["q"], ["q", "v"])


@dataclass(frozen=True)
class Case:
    """``model`` and ``task.path`` are in ``models`` and the test data, or in the work directory
    with ``shape``, a model of random weights."""

    model: str
    task: dict[str, Any]
    rows: int
    learning_rate: float
    shape: gpu_cases.Case | None = None


LLAMA_8B = gpu_cases.Case("llama8b", "wikisql", 2, ("q", "v"), steps=1000)
CASES = {
    "minilm-rte": Case(
        "all-minilm-l6-v2",
        {"name": "glue/rte", "path": "glue/rte", "max_length": 128, "limit_eval": 16},
        16,
        5e-4,
    ),
    "smollm2-wikisql": Case(
        "smollm2-135m-instruct",
        {
            "name": "wikisql",
            "path": "wikisql",
            "max_length": 256,
            "limit_train": 2000,
            "limit_eval": 16,
            "eval_generate": "never",
        },
        8,
        2e-4,
    ),
    "8b": Case(
        "llama8b",
        {"name": "completion", "path": "llama8b-wikisql.jsonl", "max_length": 256},
        LLAMA_8B.batch,
        2e-4,
        LLAMA_8B,
    ),
}


def recipe(case: Case, member: int, folder: Path, args: argparse.Namespace) -> Recipe:
    models, data = MODELS, Path(os.environ.get("LORAKIT_TEST_DATA", ""))
    if case.shape is not None:
        models = data = args.work
    values = {
        "model": {"name_or_path": str(models / case.model), "dtype": args.dtype},
        "adapter": {
            "method": "lora",
            "r": RANKS[member % len(RANKS)],
            "target_modules": TARGETS[member // len(RANKS) % len(TARGETS)],
        },
        "task": {**case.task, "path": str(data / case.task["path"])},
        "train": {
            "output_dir": str(folder / f"member-{member}"),
            "max_steps": args.steps,
            "per_device_batch_size": args.rows or case.rows,
            "learning_rate": case.learning_rate,
            "seed": 1 + member // (len(RANKS) * len(TARGETS)),
        },
    }
    file = folder / "recipe.yaml"
    file.write_text(json.dumps(values))
    return lorakit.load_recipe(file)


@dataclass
class Timing:
    seconds: float = 0.0
    training_seconds: float = 0.0
    cpu_seconds: float = 0.0
    peak_memory_bytes: int = 0
    examples_per_second: float = field(default=0.0)


@contextmanager
def timed(device: torch.device) -> Iterator[Timing]:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    timing, wall, cpu = Timing(), time.perf_counter(), time.process_time()
    with contextlib.redirect_stderr(io.StringIO()):
        yield timing
    timing.seconds = time.perf_counter() - wall
    timing.cpu_seconds = time.process_time() - cpu
    timing.peak_memory_bytes = peak_memory_bytes(device)


def training_seconds(run: Path) -> float:
    return float(json.loads((run / "run.json").read_text())["seconds"])


def together(recipes: list[Recipe], device: torch.device) -> Timing:
    with timed(device) as timing:
        results = train_joint(recipes, None, lambda text: None, lambda index, result: None)
    for result in results:
        if isinstance(result, Exception):
            raise result
    timing.training_seconds = max(training_seconds(Path(r.train.output_dir)) for r in recipes)
    return timing


def one_by_one(recipes: list[Recipe], device: torch.device) -> Timing:
    with timed(device) as timing:
        for each in recipes:
            lorakit.train(each)
    timing.training_seconds = sum(training_seconds(Path(r.train.output_dir)) for r in recipes)
    return timing


WAYS: dict[str, Callable[[list[Recipe], torch.device], Timing]] = {
    "joint": together,
    "one_by_one": one_by_one,
}


def measured(case: Case, way: str, count: int, device: torch.device, args: Any) -> dict[str, float]:
    """The timing of one run of ``count`` members."""
    with tempfile.TemporaryDirectory() as folder:
        recipes = [recipe(case, i, Path(folder), args) for i in range(count)]
        timing = WAYS[way](recipes, device)
    examples = count * args.steps * (args.rows or case.rows)
    timing.examples_per_second = examples / timing.training_seconds
    return {key: round(value, 3) for key, value in vars(timing).items()}


def summary(runs: list[dict[str, float]]) -> dict[str, float]:
    """The medians of several runs, and what only the first one took."""
    medians = {key: round(statistics.median(run[key] for run in runs), 3) for key in runs[0]}
    return {**medians, "first_training_seconds": runs[0]["training_seconds"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("case", choices=CASES)
    parser.add_argument("--members", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--rows", type=int, help="rows per batch")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--work", type=Path, default=Path("/tmp/bench_gpu"))
    parser.add_argument("--repeat", type=int, default=1, help="runs of each way")
    parser.add_argument("--only", choices=["joint", "one_by_one"])
    args = parser.parse_args()
    if args.repeat < 1:
        parser.error("--repeat must be at least 1")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    case = CASES[args.case]
    if case.shape is not None:
        args.work.mkdir(parents=True, exist_ok=True)
        gpu_cases.save_model(case.shape, args.work)
        gpu_cases.write_rows(case.shape, args.work)
    for count in args.members:
        line: dict[str, Any] = {"case": args.case, "device": device.type, "members": count}
        runs: dict[str, list[dict[str, float]]] = {n: [] for n in WAYS if args.only in (None, n)}
        for number in range(args.repeat):
            for name, found in runs.items():
                found.append(measured(case, name, count, device, args))
                own = {**line, "way": name, "run": number + 1, **found[-1]}
                print(json.dumps(own), flush=True)
        line |= {name: summary(found) for name, found in runs.items()}
        if runs.keys() == WAYS.keys():
            joint, alone = line["joint"], line["one_by_one"]
            for key, name in (("training", "speedup"), ("first_training", "first_speedup")):
                line[name] = round(alone[f"{key}_seconds"] / joint[f"{key}_seconds"], 2)
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
