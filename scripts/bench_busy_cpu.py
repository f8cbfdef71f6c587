"""Measure CPU training throughput alongside other work, under different OpenMP settings.

    python scripts/bench_busy_cpu.py MODEL [--busy 0 2] [--cores 2] [--steps 20] [--repeats 3]

Each run is `lorakit train` (float32, LoRA r=8 on q and v) in a separate process, pinned to
`--cores` cores starting at `--first-core`, together with `--busy` busy loops. `lorakit` is the
default behavior; the other settings are environment variables, which lorakit respects. The result
of a run is the median tokens/s of its steps after the first quarter; the table shows the median and
the range over the repeats, which are interleaved so that all settings see the same machine load.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

#: Environment variables of each setting. lorakit keeps libgomp's default if one of these variables
#: is set; 300,000 is the default spin count that libgomp documents.
SETTINGS: dict[str, dict[str, str]] = {
    "lorakit": {},
    "libgomp default": {"GOMP_SPINCOUNT": "300000"},
    "spin 0": {"GOMP_SPINCOUNT": "0"},
    "spin 1000": {"GOMP_SPINCOUNT": "1000"},
    "spin 3000": {"GOMP_SPINCOUNT": "3000"},
    "spin 10000": {"GOMP_SPINCOUNT": "10000"},
    "spin 30000": {"GOMP_SPINCOUNT": "30000"},
    "passive": {"OMP_WAIT_POLICY": "PASSIVE"},
    "1 thread": {"OMP_NUM_THREADS": "1"},
    "4 threads, spin 0": {"OMP_NUM_THREADS": "4", "GOMP_SPINCOUNT": "0"},
}
OPENMP = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--busy", type=int, nargs="+", default=[0, 2], help="numbers of busy loops")
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--first-core", type=int, default=0)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    arguments = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))[arguments.first_core :][: arguments.cores]
    os.sched_setaffinity(0, cores)
    with tempfile.TemporaryDirectory() as folder:
        recipe = write_recipe(Path(folder), arguments.model, arguments.steps)
        for busy in arguments.busy:
            found: dict[str, list[float]] = {name: [] for name in arguments.settings}
            for _ in range(arguments.repeats):
                for name in arguments.settings:
                    found[name].append(measure(recipe, SETTINGS[name], busy))
            best = max(statistics.median(values) for values in found.values())
            print(f"{busy} busy loops on {arguments.cores} cores: tokens/s, share of the best")
            for name, values in found.items():
                middle = statistics.median(values)
                spread = f"{min(values):.0f} to {max(values):.0f}"
                print(f"  {name:20} {middle:7.1f}  {middle / best:.2f}  ({spread})", flush=True)


def write_recipe(folder: Path, model: Path, steps: int) -> Path:
    words = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa"]
    rows = [
        {
            "prompt": " ".join(words[(i + k * k) % 10] for k in range(20 + i % 7)),
            "completion": " " + " ".join(words[(i * k) % 10] for k in range(12)),
        }
        for i in range(8 * steps)
    ]
    data = folder / "train.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = {
        "model": {"name_or_path": str(model.absolute()), "dtype": "float32"},
        "adapter": {"r": 8, "target_modules": ["q", "v"]},
        "task": {"name": "completion", "path": {"train": str(data)}, "max_length": 128},
        "train": {
            "output_dir": str(folder / "run"),
            "max_steps": steps,
            "per_device_batch_size": 4,
            "log_every_steps": 1,
        },
    }
    file = folder / "recipe.yaml"
    file.write_text(json.dumps(recipe))
    return file


def measure(recipe: Path, setting: dict[str, str], busy: int) -> float:
    kept = {key: value for key, value in os.environ.items() if key not in OPENMP}
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(busy)]
    try:
        with tempfile.TemporaryDirectory() as output_dir:
            run = Path(output_dir) / "run"
            command = [sys.executable, "-m", "lorakit", "train", str(recipe)]
            subprocess.run(
                [*command, "--output-dir", str(run)],
                env=kept | setting | {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"},
                stderr=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                check=True,
            )
            lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()
    speeds = [line["tokens_per_second"] for line in lines if "tokens_per_second" in line]
    return statistics.median(speeds[len(speeds) // 4 :])


if __name__ == "__main__":
    main()
