"""Measure the time to load and tokenize many rows, and the memory that they need.

Writes a jsonl file of random words, trains a few steps on its first 1,000 rows, on all rows, and
again on all rows from the cache, each in a separate process, and prints a table. Without --model it
creates a tiny Llama and trains a BPE tokenizer on the words, which needs no network.

    python scripts/bench_large_data.py /tmp/bench --rows 1000000 --tokens 200
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

_MEBIBYTE = 1 << 20
_BASELINE_ROWS = 1000
_SAMPLE_SECONDS = 0.2


@dataclass
class Measured:
    """Figures of one run. ``own`` is the peak of the process alone;
    ``tree`` that of the process and its children, with shared pages counted once."""

    seconds: float
    until_tokens: float
    own: int
    tree: int


def main() -> None:
    arguments = _arguments()
    folder: Path = arguments.directory
    folder.mkdir(parents=True, exist_ok=True)
    data = folder / f"rows-{arguments.rows}-{arguments.tokens}.jsonl"
    if not data.exists():
        began = time.monotonic()
        _write_rows(data, arguments.rows, arguments.tokens)
        print(f"{data}: {data.stat().st_size / 1e6:,.0f} MB in {time.monotonic() - began:.0f} s")
    model = arguments.model or _tiny_model(folder / "tiny-llama", data)
    runs = (
        (f"first {_BASELINE_ROWS:,} rows", {"limit_train": _BASELINE_ROWS}),
        (f"all {arguments.rows:,} rows", {}),
        ("again, from the cache", {}),
    )
    cache = folder / f"cache-{os.getpid()}"
    baseline: Measured | None = None
    for name, task in runs:
        recipe = _recipe(folder, str(model), data, arguments, task)
        measured = _measure(recipe, cache)
        baseline = baseline or measured
        print(
            f"{name}: {measured.until_tokens:.1f} s until the tokens are there, "
            f"{measured.seconds:.1f} s in all; peak MiB: process {_mib(measured.own)} "
            f"(+{_mib(measured.own - baseline.own)}), with its children {_mib(measured.tree)} "
            f"(+{_mib(measured.tree - baseline.tree)})",
            flush=True,
        )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n", 1)[0])
    parser.add_argument("directory", type=Path, help="directory for rows, model and runs")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--tokens", type=int, default=200, help="approximate number per row")
    parser.add_argument("--model", type=Path, help="directory of a causal model")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--streaming", action="store_true", help="set task.streaming")
    return parser.parse_args()


def _write_rows(file: Path, rows: int, tokens: int) -> None:
    """Write words that are single tokens once a tokenizer is trained on them, some of them
    often."""
    generator = random.Random(0)
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["".join(generator.choices(letters, k=generator.randint(2, 9))) for _ in range(4000)]
    weights = [1 / (rank + 10) for rank in range(len(words))]
    beside = file.with_suffix(".part")
    with beside.open("w") as out:
        for _ in range(rows):
            text = generator.choices(words, weights, k=tokens)
            half = tokens // 2
            row = {"prompt": " ".join(text[:half]), "completion": " " + " ".join(text[half:])}
            out.write(json.dumps(row) + "\n")
    beside.rename(file)


def _tiny_model(folder: Path, data: Path) -> Path:
    if (folder / "config.json").exists():
        return folder
    from itertools import islice

    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=16_000, special_tokens=["<s>", "</s>"])
    with data.open() as lines:
        texts = [json.loads(line)["completion"] for line in islice(lines, 5000)]
    tokenizer.train_from_iterator(texts, trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    wrapped.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(wrapped),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        bos_token_id=wrapped.bos_token_id,
        eos_token_id=wrapped.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def _recipe(
    folder: Path, model: str, data: Path, arguments: argparse.Namespace, task: dict[str, int]
) -> Path:
    output = folder / f"run-{time.time_ns()}"
    extra = {"streaming": True} if arguments.streaming else {}
    recipe = {
        "model": {"name_or_path": model, "dtype": "float32"},
        "adapter": {"method": "lora", "r": 4},
        "task": {"name": "completion", "path": str(data), "max_length": 512, **extra, **task},
        "train": {
            "output_dir": str(output),
            "max_steps": arguments.steps,
            "per_device_batch_size": arguments.batch_size,
            "compile": False,
        },
    }
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe))
    return file


def _measure(recipe: Path, cache: Path) -> Measured:
    """Train in a separate process and sample its memory."""
    environment = {**os.environ, "LORAKIT_CACHE": str(cache)}
    log = recipe.with_suffix(".log")
    began = time.monotonic()
    until, own, tree = 0.0, 0, 0
    with log.open("w") as out:
        command = [sys.executable, "-m", "lorakit", "train", str(recipe)]
        process = subprocess.Popen(command, stdout=out, stderr=out, env=environment)
        while process.poll() is None:
            own = max(own, _status(process.pid, "VmHWM"))
            tree = max(tree, sum(_shared_once(pid) for pid in _tree(process.pid)))
            if not until and "parameters are trainable" in log.read_text():
                until = time.monotonic() - began
            time.sleep(_SAMPLE_SECONDS)
    if process.returncode:
        sys.exit(f"the run failed; its log:\n{log.read_text()}")
    return Measured(time.monotonic() - began, until, own, tree)


def _tree(pid: int) -> Iterator[int]:
    yield pid
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return
    for child in children:
        yield from _tree(int(child))


def _status(pid: int, key: str) -> int:
    return _kilobytes(Path(f"/proc/{pid}/status"), key)


def _shared_once(pid: int) -> int:
    """Return the proportional set size: a page that n processes share counts 1/n for each."""
    return _kilobytes(Path(f"/proc/{pid}/smaps_rollup"), "Pss")


def _kilobytes(file: Path, key: str) -> int:
    try:
        for line in file.read_text().splitlines():
            if line.startswith(f"{key}:"):
                return int(line.split()[1]) * 1024
    except OSError:  # the process has just ended
        pass
    return 0


def _mib(size: int) -> str:
    return f"{size / _MEBIBYTE:,.0f}"


if __name__ == "__main__":
    main()
