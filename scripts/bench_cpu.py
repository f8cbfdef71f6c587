"""Compare the speed of lorakit on the CPU with PEFT and transformers' Trainer.

    python scripts/bench_cpu.py --sst2 DIR_OF_SST2 [--cases encoder sql] [--repeats 3]

`encoder` trains MiniLM on the first 2,000 rows of SST-2, in float32; `sql` trains SmolLM2-135M on
the quickstart's questions, in bfloat16 with float32 factors (without autocast, which makes Trainer
slower). lorakit runs as a user runs it, through `lorakit train`. The peers are Trainer with its
default collator, which pads a batch to its longest row (`trainer`), and the same with rows of
similar length in a batch (`grouped`). All sides take the same number of AdamW steps over the same
tokenized rows, in batches of the same size, with the same schedule, rank and clipping, and without
evaluation. Each run is a process of its own, and the sides alternate, so that they see the same
load. CPU time varies less than time on a busy machine, best with OMP_NUM_THREADS=1.

The times are those of all training steps, from the first batch to the last update; loading and
saving are excluded. Losses are means over the first and the last ten steps.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LOG_STEPS = 10


@dataclass(frozen=True)
class Case:
    recipe: str
    rows: int
    batch: int
    learning_rate: float
    dtype: str
    modules: tuple[str, ...]
    task_type: str


CASES = {
    "encoder": Case(
        "recipes/quickstart-encoder.yaml", 2000, 32, 2e-3, "float32", ("query", "value"), "SEQ_CLS"
    ),
    "sql": Case(
        "recipes/quickstart.yaml", 1000, 8, 3e-3, "bfloat16", ("q_proj", "v_proj"), "CAUSAL_LM"
    ),
}
PEERS = ("trainer", "grouped")


def main() -> None:
    arguments = parse()
    if arguments.side:
        case, work = CASES[arguments.cases[0]], Path(arguments.work)
        run = write_rows if arguments.side == "rows" else train_peer
        print(json.dumps(run(arguments, case, work)))
        return
    for name in arguments.cases:
        with tempfile.TemporaryDirectory() as folder:
            compare(arguments, name, Path(folder))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rows", type=int, help="at least ten batches; default: as described")
    parser.add_argument("--encoder", default="models/all-minilm-l6-v2")
    parser.add_argument("--decoder", default="models/smollm2-135m-instruct")
    parser.add_argument("--sst2", default="data/sst2")
    parser.add_argument("--wikisql", default="data/wikisql-sample")
    parser.add_argument("--side", choices=("rows", *PEERS), help=argparse.SUPPRESS)
    parser.add_argument("--work", help=argparse.SUPPRESS)
    return parser.parse_args()


def compare(arguments: argparse.Namespace, name: str, work: Path) -> None:
    """Run all sides of a case in turn, and print each run and the ratios."""
    case = CASES[name]
    child(name, "rows", work)
    sides = ["lorakit", *arguments.peers]
    reports: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    for repeat in range(arguments.repeats):
        for side in sides:
            if side == "lorakit":
                report = train_lorakit(arguments, case, work / f"run-{repeat}")
            else:
                report = child(name, side, work)
            reports[side].append(report)
            print(name, side, json.dumps(report), flush=True)
    for side in sides:
        line = f"{name}, {side}:"
        for key in ("per_second", "per_cpu_second"):
            values = [report[key] for report in reports[side]]
            own = [report[key] for report in reports["lorakit"]]
            pairs = [a / b for a, b in zip(own, values, strict=True)]
            line += f" {statistics.median(values):.2f} {key}, lorakit is "
            line += f"{statistics.median(pairs):.2f} x ({', '.join(f'{p:.2f}' for p in pairs)});"
        print(line, flush=True)


def child(name: str, side: str, work: Path) -> dict[str, Any]:
    """Run a side of this script in a process of its own and return its report."""
    options = ["--cases", name, "--side", side, "--work", str(work)]
    command = [sys.executable, __file__, *sys.argv[1:], *options]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def settings(arguments: argparse.Namespace, case: Case, output_dir: Path) -> list[str]:
    """The changes to the case's recipe: local models and data, and no evaluation."""
    encoder = case.task_type == "SEQ_CLS"
    folder = Path(arguments.sst2 if encoder else arguments.wikisql)
    data = next(folder.glob("train.jsonl*"))
    return [
        f"model.name_or_path={arguments.encoder if encoder else arguments.decoder}",
        f"task.path={json.dumps({'train': str(data)})}",
        f"train.output_dir={output_dir}",
        f"train.log_every_steps={LOG_STEPS}",
        "train.save_every_steps=100000",
        f"task.limit_train={arguments.rows or case.rows}",
    ]


def train_lorakit(arguments: argparse.Namespace, case: Case, run: Path) -> dict[str, Any]:
    options = [x for value in settings(arguments, case, run) for x in ("--set", value)]
    command = [sys.executable, "-m", "lorakit", "train", case.recipe, *options]
    cpu_seconds = watch(command, run / "metrics.jsonl")
    record = json.loads((run / "run.json").read_text())
    lines = (run / "metrics.jsonl").read_text().splitlines()
    losses = [line["loss"] for line in map(json.loads, lines) if "loss" in line]
    rows, parameters = record["data"]["train"]["rows"], record["trainable_parameters"]
    return report_of(rows, parameters, record["steps"], record["seconds"], cpu_seconds, losses)


def watch(command: list[str], metrics: Path) -> float:
    """Run a training and return its CPU time from the creation of ``metrics`` to its last line."""
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    sizes: dict[int, float] = {}
    while process.poll() is None:
        if metrics.exists():
            fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
            ticks = int(fields[11]) + int(fields[12])
            sizes.setdefault(metrics.stat().st_size, ticks / os.sysconf("SC_CLK_TCK"))
        time.sleep(0.02)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}: exit code {process.returncode}")
    return max(sizes.values()) - min(sizes.values())


def report_of(
    rows: int, parameters: int, steps: int, seconds: float, cpu: float, losses: list[float]
) -> dict[str, Any]:
    return {
        "trained_parameters": parameters,
        "steps": steps,
        "rows": rows,
        "per_second": round(rows / seconds, 2),
        "per_cpu_second": round(rows / cpu, 2),
        "first_loss": round(losses[0], 4),
        "last_loss": round(losses[steps // LOG_STEPS - 1], 4),
    }


def write_rows(arguments: argparse.Namespace, case: Case, work: Path) -> dict[str, Any]:
    """Write the tokenized rows of lorakit's run for the peers."""
    import lorakit
    from lorakit.training.setup import prepare

    recipe = lorakit.load_recipe(case.recipe, settings(arguments, case, work / "rows"))
    encoded = prepare(recipe, lambda text: None).train
    with (work / "rows.jsonl").open("w") as file:
        for index in range(len(encoded)):
            row = encoded[index]
            ids, mask = row.input_ids.tolist(), row.loss_mask
            labels = row.label
            if labels is None:
                labels = [i if trained else -100 for i, trained in zip(ids, mask, strict=True)]
            fields = {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}
            file.write(json.dumps(fields) + "\n")
    return {"rows": len(encoded)}


def train_peer(arguments: argparse.Namespace, case: Case, work: Path) -> dict[str, Any]:
    import torch
    import transformers as tf
    from peft import LoraConfig, get_peft_model

    tf.set_seed(42)
    encoder = case.task_type == "SEQ_CLS"
    kind = tf.AutoModelForSequenceClassification if encoder else tf.AutoModelForCausalLM
    name = arguments.encoder if encoder else arguments.decoder
    model = kind.from_pretrained(name, dtype=getattr(torch, case.dtype))
    factors = {"r": 8, "lora_alpha": 16, "target_modules": list(case.modules)}
    model = get_peft_model(model, LoraConfig(task_type=case.task_type, **factors))
    rows = [json.loads(line) for line in (work / "rows.jsonl").open()]
    steps = math.ceil(len(rows) / case.batch)
    losses: list[float] = []

    class Timer(tf.TrainerCallback):  # type: ignore[misc]
        began = seconds = cpu_began = cpu_seconds = 0.0

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.began, self.cpu_began = time.monotonic(), time.process_time()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.seconds = time.monotonic() - self.began
            self.cpu_seconds = time.process_time() - self.cpu_began

        def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
            losses.extend([logs["loss"]] if "loss" in logs else [])

    timer = Timer()
    sampling = "group_by_length" if arguments.side == "grouped" else "random"
    collator = tf.DataCollatorWithPadding if encoder else tf.DataCollatorForSeq2Seq
    tf.Trainer(
        model=model,
        args=tf.TrainingArguments(
            str(work / "trainer"),
            max_steps=steps,
            per_device_train_batch_size=case.batch,
            learning_rate=case.learning_rate,
            lr_scheduler_type="linear",
            warmup_steps=math.ceil(0.06 * steps),
            train_sampling_strategy=sampling,
            logging_steps=LOG_STEPS,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
        ),
        train_dataset=rows,
        data_collator=collator(tf.AutoTokenizer.from_pretrained(name)),
        callbacks=[timer],
    ).train()
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return report_of(len(rows), parameters, steps, timer.seconds, timer.cpu_seconds, losses)


if __name__ == "__main__":
    main()
