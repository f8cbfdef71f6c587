"""Measure the latency of a forward pass (base, merged, unmerged) as in Table 1 of the LoRA paper.

    python scripts/bench_latency.py --model DIR [--adapter DIR|none] [--shapes 32x512,16x256,1x128]
        [--repeats 20] [--device cpu|cuda] [--dtype float32|bfloat16|float16] [--json]

The paper measures GPT-2 medium at batch 32, 16 and 1 with length 512, 256 and 128. ``none`` is a
random LoRA, r = 8 on q and v. All models are in memory at the same time, and each repeat times them
in a different order, so that a machine that slows down affects all of them. Times are medians over
the repeats with interquartile ranges; ratios are medians of the per-repeat ratio to the base, with
quartiles. ``again`` measures the base a second time: its distance from 1 is noise, and merged
equals base if the quartiles of the two ratios overlap.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import lorakit
from lorakit.adapters.load import load
from lorakit.layers import adapted_modules, adapter_layers
from lorakit.models.hub import load_config, quiet
from lorakit.recipe.sections import ModelSection

WARMUP = 3
HEADER = (
    "| batch x length | base, ms | again, ms | ratio | merged, ms | ratio | unmerged, ms | ratio "
    "| merged equals base |\n" + "|---" * 9 + "|"
)


def main() -> None:
    arguments = parse()
    torch.manual_seed(0)
    random.seed(0)
    models = build(arguments)
    if not arguments.json:
        print(HEADER)
    rows = []
    for batch, length in arguments.shapes:
        limit = getattr(models["base"].config, "max_position_embeddings", length)
        if length > limit:
            raise SystemExit(f"--shapes {batch}x{length}: the model has {limit} positions")
        rows.append({"batch": batch, "length": length, **measure(models, batch, length, arguments)})
        if not arguments.json:
            print(line(rows[-1]), flush=True)
    if arguments.json:
        print(json.dumps({**facts(arguments), "rows": rows}, indent=2))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--adapter", default="none")
    parser.add_argument("--shapes", type=shapes, default=shapes("32x512,16x256,1x128"))
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def shapes(text: str) -> list[tuple[int, int]]:
    found = [tuple(int(size) for size in shape.split("x")) for shape in text.split(",")]
    if any(len(shape) != 2 or min(shape) < 1 for shape in found):
        raise argparse.ArgumentTypeError("allowed: BATCHxLENGTH,BATCHxLENGTH")
    return found


def build(arguments: argparse.Namespace) -> dict[str, nn.Module]:
    """Build the models; they share no memory."""
    if arguments.adapter == "none":
        unmerged = plain(arguments)
        lorakit.inject(unmerged, lorakit.LoraConfig(r=8, target_modules=["q", "v"]), heads=())
        for layer in adapter_layers(unmerged).values():
            nn.init.normal_(layer.lora_B, std=0.02)
    else:
        unmerged = load(arguments.model, arguments.adapter, dtype=arguments.dtype)
    unmerged.eval().requires_grad_(False).to(arguments.device)
    base, merged = copy.deepcopy(unmerged), copy.deepcopy(unmerged)
    for name, layer in adapted_modules(base).items():
        base.set_submodule(name, layer.base_layer)
    for name, layer in adapted_modules(merged).items():
        merged.set_submodule(name, layer.merge())
    return {"base": base, "again": copy.deepcopy(base), "merged": merged, "unmerged": unmerged}


def plain(arguments: argparse.Namespace) -> Any:
    from transformers import AutoModel, AutoModelForCausalLM

    section = ModelSection(name_or_path=arguments.model)
    causal = any("Causal" in n or "LMHead" in n for n in load_config(section).architectures or ())
    auto = AutoModelForCausalLM if causal else AutoModel
    with quiet():
        return auto.from_pretrained(arguments.model, dtype=getattr(torch, arguments.dtype))


@torch.inference_mode()
def measure(
    models: dict[str, nn.Module], batch: int, length: int, arguments: argparse.Namespace
) -> dict[str, Any]:
    """Return times and ratios to the base by model."""
    vocabulary = models["base"].config.vocab_size
    ids = torch.randint(5, vocabulary, (batch, length), device=arguments.device)
    cache = {"use_cache": False} if hasattr(models["base"].config, "use_cache") else {}
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for repeat in range(WARMUP + arguments.repeats):
        for name in random.sample(list(models), len(models)):
            took = timed(lambda model=models[name]: model(input_ids=ids, **cache), ids.device)
            if repeat >= WARMUP:
                seconds[name].append(took)
    found = {name: summary(values, seconds["base"]) for name, values in seconds.items()}
    own, noise = found["merged"], found["again"]
    overlap = own["ratio_low"] <= noise["ratio_high"] and noise["ratio_low"] <= own["ratio_high"]
    return {**found, "merged_equals_base": overlap}


def timed(run: Callable[[], object], device: torch.device) -> float:
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    began = time.perf_counter()
    run()
    wait()
    return time.perf_counter() - began


def summary(values: list[float], base: list[float]) -> dict[str, float]:
    ratios = [own / other for own, other in zip(values, base, strict=True)]
    low, middle, high = quartiles(values)
    ratio_low, ratio, ratio_high = quartiles(ratios)
    return {
        "median_ms": middle * 1e3,
        "spread_ms": (high - low) * 1e3,
        "ratio": ratio,
        "ratio_low": ratio_low,
        "ratio_high": ratio_high,
    }


def quartiles(values: list[float]) -> list[float]:
    return statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3


def line(row: dict[str, Any]) -> str:
    cells = [f"{row['batch']} x {row['length']}"]
    for name in ("base", "again", "merged", "unmerged"):
        own = row[name]
        cells.append(f"{own['median_ms']:.2f} ± {own['spread_ms'] / 2:.2f}")
        if name != "base":
            cells.append(f"{own['ratio']:.3f} [{own['ratio_low']:.3f}, {own['ratio_high']:.3f}]")
    cells.append("yes" if row["merged_equals_base"] else "no")
    return f"| {' | '.join(cells)} |"


def facts(arguments: argparse.Namespace) -> dict[str, Any]:
    cuda = arguments.device.startswith("cuda")
    return {
        "model": arguments.model,
        "adapter": arguments.adapter,
        "device": torch.cuda.get_device_name()
        if cuda
        else f"cpu, {torch.get_num_threads()} threads",
        "dtype": arguments.dtype,
        "repeats": arguments.repeats,
        "torch": torch.__version__,
    }


if __name__ == "__main__":
    main()
