"""Compare rows/s of greedy generation in batches and in a loop of single ``model.generate`` calls.

    python scripts/bench_generation.py --model DIR --data DIR [--split validation] [--rows 1000]
        [--single 50] [--batches auto,64,128,256,512] [--dtypes bfloat16,float32] [--json]

``--data`` is a WikiSQL directory, or what scripts/make_wikisql_sample.py writes. Everything runs in
one process on the same prompts: the loop on the first ``--single`` rows, the batches on all of
them. Both stop at the EOS token and at the task's stop sequence, the end of the first line that is
not blank. A short generation of each kind warms up. ``ratio`` is rows/s relative to the loop.
``equal`` is the share of the loop's rows for which the batches give the same text; in bfloat16
rounding depends on the batch.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from transformers import StoppingCriteriaList

from lorakit import registry
from lorakit.evaluation.generation import generate_text
from lorakit.evaluation.prompts import encode_prompts
from lorakit.evaluation.sampling import OutputReader, StopAtEnd, eos_ids, task_decoding
from lorakit.models.load import default_device, load_pretrained
from lorakit.models.window import window
from lorakit.recipe.sections import ModelSection

COLUMNS = ("dtype", "how", "rows", "seconds", "rows/s", "ratio", "equal", "peak GiB")


def main() -> None:
    arguments = parse()
    results = []
    if not arguments.json:
        print("| " + " | ".join(COLUMNS) + " |\n" + "|---" * len(COLUMNS) + "|")
    for dtype in arguments.dtypes.split(","):
        for result in measure(arguments, dtype):
            results.append(result)
            if not arguments.json:
                cells = [f"{v:.2f}" if isinstance(v, float) else str(v) for v in result.values()]
                print("| " + " | ".join(cells) + " |", flush=True)
    if arguments.json:
        name = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
        print(json.dumps({"device": name, "torch": torch.__version__, "results": results}))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--split", default="validation")
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--single", type=int, default=50)
    parser.add_argument("--batches", default="auto,64,128,256,512")
    parser.add_argument("--dtypes", default="bfloat16,float32")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def measure(arguments: argparse.Namespace, dtype: str) -> list[dict[str, Any]]:
    loaded = load_pretrained(ModelSection(name_or_path=arguments.model, dtype=dtype), "causal")
    model, tokenizer = loaded.model.to(default_device()).eval(), loaded.tokenizer
    task = registry.task("wikisql")
    config = task.Config(name="wikisql", path=arguments.data, limit_eval=arguments.rows)
    split = task.load(config, arguments.split)
    if split is None:
        raise SystemExit(f"--data {arguments.data}: no split {arguments.split!r}")
    prompts = encode_prompts(task, config, split, tokenizer, window(model))
    decoding = task_decoding(config, task.stop_texts(config), seed=0)

    reader = OutputReader(tokenizer, frozenset(eos_ids(model, tokenizer)), decoding.stop)

    def loop(rows: int) -> list[str]:
        return [single(model, reader, prompt, decoding.max_new_tokens) for prompt in prompts[:rows]]

    def batches(rows: int, size: int | None) -> list[str]:
        return generate_text(model, tokenizer, prompts[:rows], decoding, batch_size=size)

    loop(2)
    wanted, slow = timed(dtype, "single", partial(loop, arguments.single))
    results = [slow]
    for batch in arguments.batches.split(","):
        size = None if batch == "auto" else int(batch)
        batches(4, size)
        found, fast = timed(dtype, batch, partial(batches, len(prompts), size))
        fast["ratio"] = fast["rows/s"] / slow["rows/s"]
        fast["equal"] = sum(a == b for a, b in zip(wanted, found, strict=False)) / len(wanted)
        results.append(fast)
    return results


def single(model: Any, reader: OutputReader, prompt: list[int], max_new_tokens: int) -> str:
    """One prompt, greedy, with the library's defaults."""
    ids = torch.tensor([prompt], device=model.device)
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=max_new_tokens,
        pad_token_id=reader.tokenizer.pad_token_id,
        stopping_criteria=StoppingCriteriaList([StopAtEnd(reader, len(prompt))]),
    )
    return reader.read(out[0, len(prompt) :].tolist())[0]


def timed(dtype: str, how: str, work: Callable[[], list[str]]) -> tuple[list[str], dict[str, Any]]:
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
    start = time.perf_counter()
    texts = work()  # texts are on the host: the device has been waited for
    seconds = time.perf_counter() - start
    peak = torch.cuda.max_memory_allocated() / 2**30 if on_gpu else 0.0
    row = (dtype, how, len(texts), seconds, len(texts) / seconds, 1.0, 1.0, peak)
    return texts, dict(zip(COLUMNS, row, strict=True))


if __name__ == "__main__":
    main()
