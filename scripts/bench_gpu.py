"""Time training steps of lorakit and of its peers on one GPU, on models with random weights.

    python scripts/bench_gpu.py --cases roberta smollm2 [--peers trainer] [--output results.jsonl]

lorakit runs as a user runs it, through `lorakit train`. Every side runs in a process of its own, on
the same rows, in bfloat16, and reports real tokens per second (padding is not counted), examples
per second, the peak of the allocated memory, and losses. lorakit's speed is the mean over the log
windows of its metrics.jsonl after the first quarter, a peer's that over as many steps after its
first ones. Neither waits for the device within those steps. ``share_of_products`` is the share of
the speed at which this GPU multiplies large matrices, counting the floating-point operations that
LoRA cannot avoid (``flops_per_token``).

Peers: `trainer` (PEFT and transformers' Trainer with its default collator), `loop` (PEFT in a plain
loop), `liger` (the same with Liger's kernels), `compiled` (the same with each layer compiled),
`unsloth` and `unsloth4bit` (which quantizes the base as it loads it, for `8b-all-nf4`). They are
not dependencies of lorakit; those that are missing are reported as such.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from gpu_cases import CASES, Case, flops_per_token, save_model, write_rows
from gpu_peers import PEERS

#: What lorakit says about how it trains.
NOTES = ("CUDA graph", "compiled", "are kept in")


def main() -> None:
    arguments = parse()
    if arguments.side:
        report = PEERS[arguments.side](CASES[arguments.cases[0]], Path(arguments.work))
        print(json.dumps(report))
        return
    work = Path(arguments.work)
    for name in arguments.cases:
        case = CASES[name]
        save_model(case, work)
        write_rows(case, work)
        ceiling = product_flops_per_second() if case.rows == "dense" else None
        sides = [f"lorakit:{value}" for value in arguments.compile] + arguments.peers
        for side in sides:
            report = {"case": name, "side": side} | run_side(name, side, work)
            if ceiling and "tokens_per_second" in report:
                share = report["tokens_per_second"] * flops_per_token(case) / ceiling
                report["share_of_products"] = round(share, 3)
            print(json.dumps(report), flush=True)
            if arguments.output:
                with Path(arguments.output).open("a") as file:
                    file.write(json.dumps(report) + "\n")


def product_flops_per_second() -> float:
    """The speed of this GPU's products of two bfloat16 matrices of 8,192 x 8,192."""
    import torch

    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    for _ in range(10):
        a @ b
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(50):
        a @ b
    torch.cuda.synchronize()
    return 50 * 2 * 8192**3 / (time.perf_counter() - began)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", nargs="+", choices=CASES, required=True)
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=[])
    parser.add_argument("--compile", nargs="*", default=["auto"], help="values of train.compile")
    parser.add_argument("--work", default="/tmp/bench_gpu")
    parser.add_argument("--output")
    parser.add_argument("--side", choices=PEERS, help=argparse.SUPPRESS)
    return parser.parse_args()


def run_side(name: str, side: str, work: Path) -> dict[str, Any]:
    began = time.monotonic()
    if side.startswith("lorakit"):
        report = train_lorakit(CASES[name], work, side.partition(":")[2])
    else:
        path = os.environ.get("PEERS_PYTHONPATH", os.environ.get("PYTHONPATH", ""))
        command = [sys.executable, __file__, "--side", side, "--cases", name, "--work", str(work)]
        done = subprocess.run(
            command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path}
        )
        lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
        report = json.loads(lines[-1]) if lines else {"error": done.stderr[-500:]}
    return report | {"seconds": round(time.monotonic() - began, 1)}


def train_lorakit(case: Case, work: Path, compile_layers: str) -> dict[str, Any]:
    run, arguments = recipe_arguments(case, work, compile_layers)
    code, messages = run_timed([sys.executable, "-m", "lorakit", "train", *arguments])
    if code:
        return {"error": "".join(text for _, text in messages)[-800:]}
    return lorakit_report(run) | {
        "first_step_seconds": first_step_seconds(messages),
        "notes": [text.strip() for _, text in messages if any(n in text for n in NOTES)],
    }


def recipe_arguments(case: Case, work: Path, compile_layers: str) -> tuple[Path, list[str]]:
    """Write the case's recipe; return the run's directory and arguments of ``lorakit train``."""
    import yaml

    task = {"dense": "text", "short": "classification"}.get(case.rows, "completion")
    recipe: dict[str, Any] = {
        "model": {"name_or_path": str(work / case.shape), "dtype": "bfloat16"},
        "adapter": {"r": case.r, "lora_alpha": 2 * case.r, "target_modules": list(case.targets)},
        "task": {
            "name": task,
            "path": {"train": str(work / f"{case.shape}-{case.rows}.jsonl")},
            "max_length": case.length,
        },
        "train": {
            "output_dir": str(work / f"run-{time.time_ns()}"),
            "max_steps": case.steps,
            "per_device_batch_size": case.batch,
            "learning_rate": 1e-4,
            "lr_scheduler": "constant",
            "warmup_steps": 0,
            "log_every_steps": max(2, case.steps // 20),
            "save_every_steps": case.steps,
        },
    }
    if case.rows == "short":
        recipe["model"]["new_head"] = True
    file = work / "recipe.yaml"
    if case.recipe.get("adapter.method") == "adalora":
        r = recipe["adapter"].pop("r")
        recipe["adapter"] |= {"init_r": r, "target_r": r // 2}
    file.write_text(yaml.safe_dump(recipe))
    settings = {"train.compile": compile_layers} | case.recipe
    options = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    return Path(recipe["train"]["output_dir"]), [str(file), *options]


def lorakit_report(run: Path) -> dict[str, Any]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    logged = [line for line in lines if "tokens_per_second" in line]
    record = json.loads((run / "run.json").read_text())
    speeds = [line["tokens_per_second"] for line in logged[len(logged) // 4 :]]
    mean = statistics.harmonic_mean(speeds)  # windows have about as many tokens each
    tokens = record["data"]["train"]["tokens"] / record["data"]["train"]["rows"]
    return {
        "tokens_per_second": round(mean),
        "examples_per_second": round(mean / tokens, 1),
        "peak_gib": round(record["peak_memory_bytes"] / 2**30, 2),
        "training_seconds": record["seconds"],
        "losses": [round(line["loss"], 4) for line in logged],
    }


def run_timed(command: list[str]) -> tuple[int, list[tuple[float, str]]]:
    """The exit code, and each line of stderr with the time at which it came."""
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    lines = [(time.monotonic(), line) for line in process.stderr]
    return process.wait(), lines


def first_step_seconds(messages: list[tuple[float, str]]) -> float | None:
    """From the line that says what is trained, once the weights are loaded, to the first logged
    step, which is the second one for up to 59 steps."""
    loaded = [at for at, text in messages if "parameters are trainable (" in text]
    logged = [at for at, text in messages if text.startswith("step ")]
    return round(logged[0] - loaded[0], 1) if loaded and logged else None


if __name__ == "__main__":
    main()
