"""Time training steps of lorakit and of its peers on one GPU, on models with random weights.

    python scripts/bench_gpu.py --cases roberta smollm2 [--peers trainer] [--output results.jsonl]

lorakit runs as a user runs it, through `lorakit train`. Every side runs in a process of its own, on
the same rows, in bfloat16, and reports real tokens per second (padding is not counted), examples
per second, the peak of the allocated memory, and losses. lorakit's speed is the median over the log
windows of its metrics.jsonl, which starts after the first steps; a peer's is the mean over as many
steps after its first ones. Neither waits for the device within those steps.

Peers: `trainer` (PEFT and transformers' Trainer with its default collator), `loop` (PEFT in a plain
loop), `liger` (the same with Liger's kernels), `compiled` (the same with each layer compiled),
`unsloth` and `unsloth4bit` (which quantizes the base as it loads it, for `8b-all-nf4`). They are
not dependencies of lorakit; those that are missing are reported as such.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ATTENTION = ["q", "k", "v", "o"]
LLAMA = {"model_type": "llama", "max_position_embeddings": 8192, "rope_theta": 500000.0}
SHAPES: dict[str, dict[str, Any]] = {
    "llama8b": LLAMA
    | {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32}
    | {"num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 128256},
    "llama1b": LLAMA
    | {"hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32}
    | {"num_key_value_heads": 8, "intermediate_size": 8192, "vocab_size": 128256}
    | {"tie_word_embeddings": True},
    "smollm2": LLAMA
    | {"hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9}
    | {"num_key_value_heads": 3, "intermediate_size": 1536, "vocab_size": 49152}
    | {"tie_word_embeddings": True},
    "roberta": {"model_type": "roberta", "hidden_size": 1024, "num_hidden_layers": 24}
    | {"num_attention_heads": 16, "intermediate_size": 4096, "vocab_size": 50265}
    | {"max_position_embeddings": 514, "type_vocab_size": 1},
}
#: Prompt and completion tokens of a WikiSQL row (mean, standard deviation), and their least.
WIKISQL = ((52.5, 17.0, 28), (20.0, 6.0, 5))
#: What lorakit says about how it trains.
NOTES = ("CUDA graph", "compiled", "are kept in")
#: PEFT's names of the target modules.
MODULES = {
    "llama": {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "o_proj"},
    "roberta": {"q": "query", "k": "key", "v": "value", "o": "attention.output.dense"},
}


@dataclass(frozen=True)
class Case:
    """``rows``: dense (each of ``length`` tokens), short (a sentence with a label) or wikisql."""

    shape: str
    rows: str
    batch: int
    targets: tuple[str, ...]
    length: int = 512
    r: int = 16
    steps: int = 40
    recipe: dict[str, Any] = field(default_factory=dict)


OFFLOAD = {"train.gradient_checkpointing": "offload"}
CASES = {
    "8b": Case("llama8b", "dense", 4, tuple(ATTENTION), 2048),
    "8b-all": Case("llama8b", "dense", 4, ("all-linear",), 2048),
    "8b-fp8": Case(
        "llama8b",
        "dense",
        4,
        tuple(ATTENTION),
        2048,
        recipe={"model.base_precision": "fp8"},
    ),
    "8b-all-fp8": Case(
        "llama8b", "dense", 4, ("all-linear",), 2048, recipe={"model.base_precision": "fp8"}
    ),
    "8b-offload": Case("llama8b", "dense", 4, tuple(ATTENTION), 2048, steps=24, recipe=OFFLOAD),
    "8b-all-offload": Case("llama8b", "dense", 4, ("all-linear",), 2048, steps=24, recipe=OFFLOAD),
    "8b-packed": Case(
        "llama8b", "wikisql", 4, tuple(ATTENTION), 2048, recipe={"task.packing": True}
    ),
    "8b-all-nf4": Case(
        "llama8b", "dense", 4, ("all-linear",), 2048, recipe={"model.base_precision": "nf4"}
    ),
    "1b": Case("llama1b", "dense", 4, ("all-linear",), 1024),
    "1b-adalora": Case(
        "llama1b", "dense", 4, ("all-linear",), 1024, recipe={"adapter.method": "adalora"}
    ),
    "roberta": Case("roberta", "short", 32, ("q", "v"), steps=300),
    "roberta-all": Case("roberta", "short", 32, ("all-linear",), steps=300),
    "roberta-adalora": Case(
        "roberta", "short", 32, ("all-linear",), steps=300, recipe={"adapter.method": "adalora"}
    ),
    "smollm2": Case("smollm2", "wikisql", 16, ("q", "v"), steps=300),
    "smollm2-dropout": Case(
        "smollm2", "wikisql", 16, ("q", "v"), steps=300, recipe={"adapter.lora_dropout": 0.05}
    ),
}


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
        sides = [f"lorakit:{value}" for value in arguments.compile] + arguments.peers
        for side in sides:
            report = {"case": name, "side": side} | run_side(name, side, work)
            print(json.dumps(report), flush=True)
            if arguments.output:
                with Path(arguments.output).open("a") as file:
                    file.write(json.dumps(report) + "\n")


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


def save_model(case: Case, work: Path) -> None:
    """Write a model with random weights and its tokenizer."""
    import torch
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
    )

    folder = work / case.shape
    if folder.exists():
        return
    shape = SHAPES[case.shape]
    config = AutoConfig.for_model(**shape, pad_token_id=0, bos_token_id=2, eos_token_id=3)
    encoder = case.rows == "short"
    kind = AutoModelForSequenceClassification if encoder else AutoModelForCausalLM
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = kind.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    save_tokenizer(folder, shape["vocab_size"])


def save_tokenizer(folder: Path, size: int) -> None:
    """Write a tokenizer with one token for each word t5, t6, ...; its class is BertTokenizer, which
    every release of transformers loads as it is written."""
    from tokenizers import BertWordPieceTokenizer

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = {word: i for i, word in enumerate(special)}
    vocabulary |= {f"t{i}": i for i in range(len(special), size)}
    BertWordPieceTokenizer(vocabulary).save(str(folder / "tokenizer.json"))
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    names = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
    settings = {f"{name}_token": token for name, token in names.items()}
    settings |= {"eos_token": "[SEP]", "tokenizer_class": "BertTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def write_rows(case: Case, work: Path) -> None:
    draw = random.Random(0)
    tokens = range(5, SHAPES[case.shape]["vocab_size"])

    def text(count: int) -> str:
        return " ".join(f"t{i}" for i in draw.choices(tokens, k=count))

    def normal(mean: float, deviation: float, least: int) -> int:
        return max(least, round(draw.gauss(mean, deviation)))

    rows = []
    # Of WikiSQL's rows, about 28 fit into 2,048 tokens.
    per_bin = case.length // 60 if case.recipe.get("task.packing") else 1
    for index in range(case.batch * case.steps * per_bin):
        if case.rows == "dense":
            rows.append({"text": text(case.length)})
        elif case.rows == "short":
            rows.append({"text": text(draw.randint(8, 54)), "label": "ab"[index % 2]})
        else:
            prompt, completion = (text(normal(*part)) for part in WIKISQL)
            rows.append({"prompt": prompt, "completion": f" {completion}"})
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (work / f"{case.shape}-{case.rows}.jsonl").write_text(lines)


def train_lorakit(case: Case, work: Path, compile_layers: str) -> dict[str, Any]:
    import yaml

    task = {"dense": "text", "short": "classification", "wikisql": "completion"}[case.rows]
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
    command = [sys.executable, "-m", "lorakit", "train", str(file), *options]
    code, messages = run_timed(command)
    if code:
        return {"error": "".join(text for _, text in messages)[-800:]}
    run = Path(recipe["train"]["output_dir"])
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    logged = [line for line in lines if "tokens_per_second" in line]
    record = json.loads((run / "run.json").read_text())
    speeds = [line["tokens_per_second"] for line in logged[len(logged) // 4 :]]
    tokens = record["data"]["train"]["tokens"] / record["data"]["train"]["rows"]
    return {
        "tokens_per_second": round(statistics.median(speeds)),
        "examples_per_second": round(statistics.median(speeds) / tokens, 1),
        "peak_gib": round(record["peak_memory_bytes"] / 2**30, 2),
        "training_seconds": record["seconds"],
        "first_step_seconds": first_step_seconds(messages),
        "losses": [round(line["loss"], 4) for line in logged],
        "notes": [text.strip() for _, text in messages if any(n in text for n in NOTES)],
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
    loaded = [at for at, text in messages if "parameters train (" in text]
    logged = [at for at, text in messages if text.startswith("step ")]
    return round(logged[0] - loaded[0], 1) if loaded and logged else None


def peer_rows(case: Case, work: Path) -> tuple[list[dict[str, Any]], Any]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(work / case.shape)
    rows = []
    with (work / f"{case.shape}-{case.rows}.jsonl").open() as file:
        for row in map(json.loads, file):
            if case.rows == "short":
                ids = tokenizer(row["text"])["input_ids"]
                rows.append({"input_ids": ids, "labels": "ab".index(row["label"])})
            elif case.rows == "dense":
                ids = tokenizer(row["text"])["input_ids"][: case.length]
                rows.append({"input_ids": ids, "labels": ids})
            else:
                prompt = tokenizer(row["prompt"])["input_ids"]
                answer = [*tokenizer(row["completion"])["input_ids"], tokenizer.eos_token_id]
                labels = [-100] * len(prompt) + answer
                rows.append({"input_ids": prompt + answer, "labels": labels})
    return rows, tokenizer


def peft_model(case: Case, work: Path) -> Any:
    import torch
    from peft import AdaLoraConfig, LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    encoder = case.rows == "short"
    kind = AutoModelForSequenceClassification if encoder else AutoModelForCausalLM
    model = kind.from_pretrained(work / case.shape, dtype=torch.bfloat16, device_map="cuda")
    names = MODULES[SHAPES[case.shape]["model_type"]]
    targets = "all-linear" if case.targets == ("all-linear",) else [names[t] for t in case.targets]
    common = {"target_modules": targets, "lora_alpha": 2 * case.r}
    common["task_type"] = "SEQ_CLS" if encoder else "CAUSAL_LM"
    common["lora_dropout"] = case.recipe.get("adapter.lora_dropout", 0.0)
    if case.recipe.get("adapter.method") == "adalora":
        config = AdaLoraConfig(
            init_r=case.r, target_r=case.r // 2, total_step=case.steps, deltaT=10, **common
        )
    else:
        config = LoraConfig(r=case.r, **common)
    return get_peft_model(model, config)


def trainer(case: Case, work: Path) -> dict[str, Any]:
    import torch
    from transformers import (
        DataCollatorForSeq2Seq,
        DataCollatorWithPadding,
        Trainer,
        TrainerCallback,
        TrainingArguments,
    )

    rows, tokenizer = peer_rows(case, work)
    model = peft_model(case, work)
    first, losses = case.steps // 4, []

    class Timer(TrainerCallback):  # type: ignore[misc]
        began = seconds = 0.0

        def on_step_end(self, _arguments: Any, state: Any, _control: Any, **_: Any) -> None:
            if state.global_step in (first, case.steps):
                torch.cuda.synchronize()
                self.seconds, self.began = time.perf_counter() - self.began, time.perf_counter()

        def on_log(self, *_: Any, logs: Any = None, **__: Any) -> None:
            if "loss" in logs:
                losses.append(round(float(logs["loss"]), 4))

    pad = DataCollatorWithPadding if case.rows == "short" else DataCollatorForSeq2Seq
    timer = Timer()
    arguments = TrainingArguments(
        str(work / "trainer"),
        per_device_train_batch_size=case.batch,
        max_steps=case.steps,
        learning_rate=1e-4,
        lr_scheduler_type="constant",
        bf16=True,
        report_to=[],
        save_strategy="no",
        logging_steps=max(2, case.steps // 20),
        optim="adamw_torch_fused",
        disable_tqdm=True,
    )
    torch.cuda.reset_peak_memory_stats()
    Trainer(
        model=model,
        args=arguments,
        train_dataset=rows,
        data_collator=pad(tokenizer),
        callbacks=[timer],
    ).train()
    return measured(case, rows, timer.seconds, case.steps - first, losses)


def plain_loop(case: Case, work: Path, liger: bool = False, compiled: bool = False) -> Any:
    if liger:
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama(
            rope=True, swiglu=True, rms_norm=True, fused_linear_cross_entropy=True
        )
    model = peft_model(case, work)
    if compiled:
        for layer in model.base_model.model.model.layers:
            layer.compile()
    return timed_loop(case, work, model)


def unsloth(case: Case, work: Path, four_bit: bool = False) -> dict[str, Any]:
    os.environ.setdefault("UNSLOTH_DISABLE_STATISTICS", "1")
    import torch
    from unsloth import FastLanguageModel

    model, _ = FastLanguageModel.from_pretrained(
        str(work / case.shape),
        max_seq_length=case.length,
        dtype=torch.bfloat16,
        load_in_4bit=four_bit,
        local_files_only=True,
    )
    names = MODULES["llama"]
    attention = [names[target] for target in ATTENTION]
    every = [*attention, "gate_proj", "up_proj", "down_proj"]
    model = FastLanguageModel.get_peft_model(
        model,
        r=case.r,
        target_modules=every if case.targets == ("all-linear",) else attention,
        lora_alpha=2 * case.r,
        lora_dropout=0,
        bias="none",
        # Its own form of checkpointing moves the inputs of the layers to the host.
        use_gradient_checkpointing="unsloth" if "offload" in case.recipe.values() else False,
    )
    return timed_loop(case, work, model)


def timed_loop(case: Case, work: Path, model: Any) -> dict[str, Any]:
    """Take ``case.steps`` steps on dense rows and time those after the first quarter."""
    import torch

    rows, _ = peer_rows(case, work)
    model.train()
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True
    )
    torch.cuda.reset_peak_memory_stats()
    first, losses, began = case.steps // 4, [], 0.0
    for step in range(case.steps):
        if step == first:
            torch.cuda.synchronize()
            began = time.perf_counter()
        part = rows[step * case.batch : (step + 1) * case.batch]
        ids = torch.tensor([row["input_ids"] for row in part], device="cuda")
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.detach())
    torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    every = max(2, case.steps // 20)
    means = torch.stack(losses).float().view(-1, every).mean(1).tolist()
    return measured(case, rows, seconds, case.steps - first, [round(x, 4) for x in means])


def measured(
    case: Case, rows: list[dict[str, Any]], seconds: float, steps: int, losses: list[float]
) -> dict[str, Any]:
    import torch

    examples = case.batch * steps / seconds
    tokens = statistics.mean(len(row["input_ids"]) for row in rows)
    return {
        "tokens_per_second": round(examples * tokens),
        "examples_per_second": round(examples, 1),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
        "losses": losses,
    }


PEERS = {
    "trainer": trainer,
    "loop": plain_loop,
    "liger": lambda case, work: plain_loop(case, work, liger=True),
    "compiled": lambda case, work: plain_loop(case, work, liger=True, compiled=True),
    "unsloth": unsloth,
    "unsloth4bit": lambda case, work: unsloth(case, work, four_bit=True),
}


if __name__ == "__main__":
    main()
