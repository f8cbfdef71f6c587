"""Compare accuracy and examples/s of a small run in lorakit and in PEFT with transformers' Trainer.

    python scripts/bench_encoder.py MODEL SST2_DIR [--rows 2000] [--seeds 0 1 2]

Both train LoRA r=8 on query and value and the classification head, one epoch, batch 32, linear
schedule, in float32 on the CPU. Trainer pads each batch to its longest row (its default collator
when it is given a tokenizer). The runs are separate processes, interleaved so that both see the
same machine load; the time is that of the training steps, without loading and evaluation.
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


def main() -> None:
    arguments = parse()
    if arguments.side:
        run = train_lorakit if arguments.side == "lorakit" else train_peft
        print(json.dumps(run(arguments)))
        return
    results = {"lorakit": [], "peft": []}
    for seed in arguments.seeds:
        for side, found in results.items():
            command = [sys.executable, __file__, *sys.argv[1:], "--side", side, "--seed", str(seed)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            found.append(json.loads(done.stdout.splitlines()[-1]))
            print(side, "seed", seed, json.dumps(found[-1]), flush=True)
    ratios = [
        a["examples_per_second"] / b["examples_per_second"]
        for a, b in zip(*results.values(), strict=True)
    ]
    for side, found in results.items():
        accuracies = [run["accuracy"] for run in found]
        print(f"{side}: accuracy {statistics.mean(accuracies):.4f} (each: {accuracies})")
    print(f"examples/s, lorakit / Trainer: {', '.join(f'{ratio:.2f}' for ratio in ratios)}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("sst2")
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--side", choices=("lorakit", "peft"))
    parser.add_argument("--seed", type=int)
    return parser.parse_args()


def files(folder: str) -> dict[str, str]:
    return {
        split: str(next(Path(folder).glob(f"{split}.jsonl*"))) for split in ("train", "validation")
    }


def train_lorakit(arguments: argparse.Namespace) -> dict[str, float]:
    import lorakit

    data = files(arguments.sst2)
    with tempfile.TemporaryDirectory() as folder:
        recipe = Path(folder) / "recipe.yaml"
        recipe.write_text(
            json.dumps(
                {
                    "model": {"name_or_path": arguments.model, "dtype": "float32"},
                    "adapter": {"r": 8, "lora_alpha": 16, "target_modules": ["q", "v"]},
                    "task": {
                        "name": "glue/sst2",
                        "path": {"train": data["train"]},
                        "max_length": 128,
                        "limit_train": arguments.rows,
                    },
                    "train": {
                        "output_dir": f"{folder}/run",
                        "epochs": 1,
                        "per_device_batch_size": 32,
                        "learning_rate": arguments.learning_rate,
                        "seed": arguments.seed,
                    },
                }
            )
        )
        run = lorakit.train(lorakit.load_recipe(recipe))
        seconds = json.loads((run.output_dir / "run.json").read_text())["seconds"]
        measured = lorakit.load_recipe(recipe, {"task.path": data})
        metrics = lorakit.evaluate(measured, adapter=run.adapter_dir)
    return result(metrics["accuracy"], arguments.rows / seconds)


def train_peft(arguments: argparse.Namespace) -> dict[str, float]:
    import datasets
    from peft import LoraConfig, get_peft_model
    from transformers import (
        AutoModelForSequenceClassification,
        AutoTokenizer,
        Trainer,
        TrainingArguments,
        set_seed,
    )

    set_seed(arguments.seed)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    data = datasets.load_dataset("json", data_files=files(arguments.sst2))
    train = data["train"].select(range(arguments.rows))
    encode = {"fn_kwargs": {"truncation": True, "max_length": 128}}
    train = train.map(lambda rows, **k: tokenizer(rows["sentence"], **k), batched=True, **encode)
    dev = data["validation"].map(
        lambda rows, **k: tokenizer(rows["sentence"], **k), batched=True, **encode
    )
    model = AutoModelForSequenceClassification.from_pretrained(arguments.model, num_labels=2)
    config = LoraConfig(task_type="SEQ_CLS", r=8, lora_alpha=16, target_modules=["query", "value"])
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=get_peft_model(model, config),
            args=TrainingArguments(
                folder,
                num_train_epochs=1,
                per_device_train_batch_size=32,
                per_device_eval_batch_size=32,
                learning_rate=arguments.learning_rate,
                lr_scheduler_type="linear",
                warmup_steps=-(-6 * -(-arguments.rows // 32) // 100),
                seed=arguments.seed,
                report_to=[],
                save_strategy="no",
                disable_tqdm=True,
                use_cpu=True,
            ),
            train_dataset=train,
            eval_dataset=dev,
            processing_class=tokenizer,
            compute_metrics=lambda p: {"accuracy": float((p[0].argmax(-1) == p[1]).mean())},
        )
        seconds = trainer.train().metrics["train_runtime"]
        accuracy = trainer.evaluate()["eval_accuracy"]
    return result(accuracy, arguments.rows / seconds)


def result(accuracy: float, examples_per_second: float) -> dict[str, float]:
    return {
        "accuracy": round(accuracy, 4),
        "examples_per_second": round(examples_per_second, 1),
        "threads": int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)),
    }


if __name__ == "__main__":
    main()
