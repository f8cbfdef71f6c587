"""Time training steps of lorakit on one and several GPUs of a host, on models with random weights.

    python scripts/bench_scaling.py --cases 1b 8b --runs 1 2:ddp 4:fsdp2 --sides lorakit trainer

Every process has the case's batch, so N processes train on N times the tokens of one. lorakit is
started by ``accelerate launch`` with the files of ``configs/``, as a user starts it; its speed is
the median over the log windows of its metrics.jsonl, without the first ones. The peer is PEFT with
transformers' Trainer, started alike, whose first quarter of steps is not counted;
``trainer_torch`` is the same without Liger's kernels, which fail with FSDP2. Speeds are of all
processes together; ``peak_gib`` is that of the first.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench_gpu import lorakit_report, recipe_arguments
from gpu_cases import CASES, Case, save_model, write_rows
from gpu_peers import trainer

SIDES = ("lorakit", "trainer", "trainer_torch")
CONFIGS = Path(__file__).resolve().parents[1] / "configs"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", nargs="+", choices=CASES, required=True)
    parser.add_argument("--runs", nargs="+", required=True, help="PROCESSES[:ddp|:fsdp2]")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=["lorakit"])
    parser.add_argument("--compile", default="auto", help="value of train.compile")
    parser.add_argument("--steps", type=int, help="default: the case's")
    parser.add_argument("--work", default="/tmp/bench_gpu")
    parser.add_argument("--output")
    parser.add_argument("--side", choices=SIDES[1:], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    work = Path(arguments.work)
    cases = {name: CASES[name] for name in arguments.cases}
    if arguments.steps:
        cases = {name: replace(case, steps=arguments.steps) for name, case in cases.items()}
    if arguments.side:
        report = trainer(cases[arguments.cases[0]], work, liger=arguments.side == "trainer")
        if os.environ.get("RANK", "0") == "0":
            print(json.dumps(report))
        return
    for name, case in cases.items():
        save_model(case, work)
        write_rows(case, work)
        for run in arguments.runs:
            for side in arguments.sides:
                report = {"case": name, "run": run, "side": side}
                report |= run_side(name, case, side, run, work, arguments.compile)
                print(json.dumps(report), flush=True)
                if arguments.output:
                    with Path(arguments.output).open("a") as file:
                        file.write(json.dumps(report) + "\n")


def run_side(
    name: str, case: Case, side: str, run: str, work: Path, compile_layers: str
) -> dict[str, Any]:
    began = time.monotonic()
    processes, _, strategy = run.partition(":")
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file"]
    launch += [str(CONFIGS / f"{strategy or 'one_gpu'}.yaml"), "--num_processes", processes]
    launch += ["--main_process_port", "0"] if strategy else []
    if side == "lorakit":
        report = run_lorakit(case, work, [*launch, "-m", "lorakit", "train"], compile_layers)
    else:
        command = [__file__, "--side", side, "--cases", name, "--runs", run, "--work", str(work)]
        command += ["--steps", str(case.steps)]
        path = os.environ.get("PEERS_PYTHONPATH", os.environ.get("PYTHONPATH", ""))
        done = subprocess.run(
            [*launch, *command], capture_output=True, text=True,
            env=os.environ | {"PYTHONPATH": path},
        )  # fmt: skip
        lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
        report = json.loads(lines[-1]) if lines else {"error": done.stderr[-1500:]}
        for key in ("tokens_per_second", "examples_per_second"):
            if key in report:
                report[key] = round(report[key] * int(processes), 1)
    return report | {"seconds": round(time.monotonic() - began, 1)}


def run_lorakit(case: Case, work: Path, command: list[str], compile_layers: str) -> dict[str, Any]:
    run, arguments = recipe_arguments(case, work, compile_layers)
    done = subprocess.run([*command, *arguments], capture_output=True, text=True)
    if done.returncode:
        # torchrun's own report comes last, after those of the processes.
        return {"error": done.stderr.partition("ChildFailedError")[0][-3000:]}
    notes = [line for line in done.stderr.splitlines() if line.startswith("FSDP:")]
    return lorakit_report(run) | ({"note": notes[0]} if notes else {})


if __name__ == "__main__":
    main()
