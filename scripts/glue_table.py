"""Compare full, bitfit, lora, lora_plus and adalora on five GLUE tasks with a small encoder.

    python scripts/glue_table.py MODEL GLUE_DIR OUT --choose       # learning rates, by one seed
    python scripts/glue_table.py MODEL GLUE_DIR OUT                # then the table, by other seeds

The low-rank methods end with the same number of ranks. ``--choose`` trains every method and task
with three learning rates and writes the best, by the task's metric, to OUT/rates.json; the table
uses other seeds. As in the papers, the score of a run is that of its best epoch (for AdaLoRA, once
the ranks are final). Existing runs are not repeated; ``--workers`` runs train at a time.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import traceback
from pathlib import Path
from typing import Any

#: Metric, epochs and training rows of each task.
TASKS: dict[str, tuple[str, int, int | None]] = {
    "cola": ("matthews_correlation", 10, None),
    "mrpc": ("accuracy", 8, None),
    "rte": ("accuracy", 10, None),
    "stsb": ("pearson", 6, None),
    "sst2": ("accuracy", 3, 8000),
}
#: The six matrices of each layer, as in the AdaLoRA paper.
SIX = ["q", "k", "v", "intermediate.dense", "output.dense"]
#: Keys and candidate learning rates of each method. AdaLoRA's penalty has the form of the authors'
#: code, for which its weight was chosen.
METHODS: dict[str, tuple[dict[str, Any], list[float]]] = {
    "full": ({}, [5e-5, 1e-4, 2e-4]),
    "bitfit": ({}, [1e-3, 2e-3, 4e-3]),
    "lora": ({"r": 4, "lora_alpha": 8, "target_modules": SIX}, [5e-4, 1e-3, 2e-3]),
    "lora_plus": ({"r": 4, "lora_alpha": 8, "target_modules": SIX}, [5e-5, 1e-4, 2e-4]),
    "adalora": (
        {
            "init_r": 6,
            "target_r": 4,
            "lora_alpha": 12,
            "target_modules": SIX,
            "orth_reg_form": "mean_norm",
        },
        [2e-3, 4e-3, 8e-3],
    ),
}
CHOOSING_SEED = 100
Job = tuple[str, str, float, int]


def main() -> None:
    arguments = parse()
    rates_file = arguments.out / "rates.json"
    if arguments.choose:
        run_all(arguments, [(m, t, rate, CHOOSING_SEED) for m, t in pairs(arguments)
                            for rate in METHODS[m][1]])  # fmt: skip
        rates = {m: {} for m in arguments.methods}
        for method, task in pairs(arguments):
            scores = {
                r: score(arguments, (method, task, r, CHOOSING_SEED)) for r in METHODS[method][1]
            }
            rates[method][task] = max(scores, key=lambda rate: scores[rate])
            print(task, method, {f"{rate:g}": round(value, 4) for rate, value in scores.items()})
        rates_file.write_text(json.dumps(rates, indent=1) + "\n", encoding="utf-8")
        return
    rates = json.loads(rates_file.read_text(encoding="utf-8"))
    same = {m: dict.fromkeys(arguments.tasks, arguments.same_rate) for m in ("lora", "lora_plus")}
    jobs = [(m, t, rates[m][t], s) for s in arguments.seeds for m, t in pairs(arguments)]
    if arguments.same_rate:
        jobs += [(m, t, same[m][t], s) for s in arguments.seeds for m in same for t in same[m]]
    run_all(arguments, list(dict.fromkeys(jobs)))
    print_table(arguments, rates)
    print_speed(arguments, rates, "each at its best learning rate")
    if arguments.same_rate:
        print_speed(arguments, same, f"both at {arguments.same_rate:g}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("glue", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--choose", action="store_true")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--same-rate", type=float, help="learning rate for an extra comparison")
    parser.add_argument("--workers", type=int, default=1, help="runs at a time")
    parser.add_argument("--gpus", type=int, default=0, help="number of GPUs to use")
    return parser.parse_args()


def pairs(arguments: argparse.Namespace) -> list[tuple[str, str]]:
    return [(method, task) for task in arguments.tasks for method in arguments.methods]


def run_all(arguments: argparse.Namespace, jobs: list[Job]) -> None:
    arguments.out.mkdir(parents=True, exist_ok=True)
    left = [job for job in jobs if not (directory(arguments, job) / "done.json").is_file()]
    print(f"{len(jobs)} runs, {len(left)} remaining", flush=True)
    context = multiprocessing.get_context("spawn")
    with context.Pool(arguments.workers, take_gpu, (arguments.gpus,)) as pool:
        for job, failure in pool.imap_unordered(attempt, [(arguments, job) for job in left]):
            print(*job, failure or f"{score(arguments, job):.4f}", flush=True)


def take_gpu(gpus: int) -> None:
    """Assign a GPU to a worker; called before it loads torch."""
    os.environ["OMP_NUM_THREADS"] = "1"
    if gpus:
        number = multiprocessing.current_process()._identity[0]
        os.environ["CUDA_VISIBLE_DEVICES"] = str(number % gpus)


def attempt(work: tuple[argparse.Namespace, Job]) -> tuple[Job, str]:
    """Run a job; a failure must not end the others."""
    try:
        train(*work)
    except Exception:
        return work[1], traceback.format_exc()
    return work[1], ""


def train(arguments: argparse.Namespace, job: Job) -> None:
    import torch

    import lorakit
    from lorakit.recipe.sections import ModelSection, Recipe, TrainSection
    from lorakit.registry import methods, tasks

    torch.set_num_threads(1)
    method, task, rate, seed = job
    _, epochs, limit = TASKS[task]
    place = directory(arguments, job)
    recipe = Recipe(
        model=ModelSection(name_or_path=arguments.model, dtype="float32"),
        adapter=methods()[method].Config(method=method, **METHODS[method][0]),
        task=tasks()[f"glue/{task}"].Config(
            name=f"glue/{task}", path=str(arguments.glue / task), max_length=128, limit_train=limit
        ),
        train=TrainSection(
            output_dir=str(place / "run"),
            epochs=float(epochs),
            per_device_batch_size=32,
            per_device_eval_batch_size=256,
            learning_rate=rate,
            seed=seed,
            save_total_limit=1,
            save_every_steps=10**6,
        ),
    )
    run = lorakit.train(recipe)
    done = json.loads((place / "run" / "run.json").read_text(encoding="utf-8"))
    lines = (place / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    logged = [json.loads(line) for line in lines]
    kept = {
        "metrics": run.metrics,
        "trainable_parameters": done["trainable_parameters"],
        "seconds": done["seconds"],
        "losses": [[line["step"], line["loss"]] for line in logged if "loss" in line],
    }
    (place / "done.json").write_text(json.dumps(kept), encoding="utf-8")


def directory(arguments: argparse.Namespace, job: Job) -> Path:
    method, task, rate, seed = job
    return arguments.out / f"{task}-{method}-{rate:g}-{seed}"


def result(arguments: argparse.Namespace, job: Job) -> dict[str, Any]:
    return json.loads((directory(arguments, job) / "done.json").read_text(encoding="utf-8"))


def score(arguments: argparse.Namespace, job: Job) -> float:
    return result(arguments, job)["metrics"][TASKS[job[1]][0]]


def print_table(arguments: argparse.Namespace, rates: dict[str, dict[str, float]]) -> None:
    """Print mean and standard deviation over the seeds, and the average over the tasks."""
    print("| method | trained | " + " | ".join(arguments.tasks) + " | average |")
    print("|---" * (len(arguments.tasks) + 3) + "|")
    for method in arguments.methods:
        cells, means = [], []
        for task in arguments.tasks:
            jobs = [(method, task, rates[method][task], seed) for seed in arguments.seeds]
            scores = [100 * score(arguments, job) for job in jobs]
            means.append(statistics.mean(scores))
            spread = statistics.stdev(scores) if len(scores) > 1 else 0.0
            cells.append(f"{means[-1]:.1f} ± {spread:.1f} ({rates[method][task]:g})")
        trained = result(arguments, jobs[0])["trainable_parameters"]
        print(f"| {method} | {trained:,} | {' | '.join(cells)} | {statistics.mean(means):.2f} |")


def print_speed(
    arguments: argparse.Namespace, rates: dict[str, dict[str, float]], how: str
) -> None:
    """Print when LoRA+ reaches LoRA's final training loss, as a share of LoRA's steps."""
    if not {"lora", "lora_plus"} <= set(arguments.methods):
        return
    shares = []
    for task in arguments.tasks:
        for seed in arguments.seeds:
            curves = [
                smoothed(result(arguments, (m, task, rates[m][task], seed))["losses"])
                for m in ("lora", "lora_plus")
            ]
            goal, last = curves[0][-1][1], curves[0][-1][0]
            reached = next((step for step, loss in curves[1] if loss <= goal), None)
            shares.append(reached / last if reached else float("inf"))
        own = ", ".join(f"{share:.2f}" for share in shares[-len(arguments.seeds) :])
        print(f"{task}: LoRA+ reaches LoRA's final training loss at {own} of the steps")
    print(f"{how}: median over all {statistics.median(shares):.2f}")


def smoothed(losses: list[list[float]]) -> list[tuple[int, float]]:
    """Return the mean loss of each twentieth of the run."""
    size = max(1, len(losses) // 20)
    return [
        (int(losses[end - 1][0]), statistics.mean(loss for _, loss in losses[end - size : end]))
        for end in range(size, len(losses) + 1, size)
    ]


if __name__ == "__main__":
    main()
