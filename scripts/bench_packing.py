"""Compare tokens/s and losses of packed and padded batches on a recipe's rows.

    python scripts/bench_packing.py RECIPE [--rows-per-step 104] [--steps 30] [--set key.path=value]

All variants train the recipe's adapter on batches of about the same number of rows: ``mixed`` pads
rows in random order, ``grouped`` pads rows of similar length (lorakit's default), ``tokens`` forms
batches by a token budget, and the last two fill bins of ``task.max_length`` tokens, with a block
mask and, where available, with ``varlen_attn``. Tokens exclude padding. Before training, each
variant computes the loss of the same rows in the recipe's precision.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import torch

import lorakit
from lorakit.data.plan import Bin
from lorakit.distributed.build import build_strategy
from lorakit.recipe.sections import Recipe
from lorakit.training import build
from lorakit.training.batching import StepLoader, build_batching
from lorakit.training.engine.eager import EagerEngine
from lorakit.training.execution import Execution
from lorakit.training.setup import Prepared, prepare

WARM_STEPS = 5
LOSS_ROWS = 512


def main() -> None:
    arguments = parse()
    recipe = lorakit.load_recipe(arguments.recipe, arguments.overrides)
    rows, length = arguments.rows_per_step, recipe.task.max_length
    by_rows: dict[str, Any] = {"task.packing": False, "train.per_device_batch_size": rows}
    budget = max(length, rows * arguments.mean_tokens)
    cases: dict[str, dict[str, Any]] = {
        "mixed": by_rows | {"train.group_by_length": False},
        "grouped": by_rows,
        "tokens": by_rows
        | {"train.per_device_batch_size": None, "train.max_tokens_per_batch": budget},
        "block mask": {"task.packing": True},
    }
    if torch.cuda.is_available():
        cases["varlen_attn"] = {"task.packing": True}
    results = {name: measure(arguments, name, changes) for name, changes in cases.items()}
    first = results["mixed"]
    for name, found in results.items():
        found["ratio"] = found["tokens_per_second"] / first["tokens_per_second"]
        print(
            f"{name:>12}: {found['tokens_per_second']:>10,.0f} tokens/s ({found['ratio']:.2f}), "
            f"{found['step_ms']:.1f} ms a step, {found['filled']:.1%} of a batch are tokens, "
            f"loss {found['loss']:.6f}, peak {found['peak_gib']:.2f} GiB"
        )
    if arguments.json:
        print(json.dumps(results))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe")
    parser.add_argument("--rows-per-step", type=int, default=104)
    parser.add_argument("--mean-tokens", type=int, default=80)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--set", dest="overrides", action="append", default=[])
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def measure(arguments: argparse.Namespace, name: str, changes: dict[str, Any]) -> dict[str, Any]:
    length = lorakit.load_recipe(arguments.recipe, arguments.overrides).task.max_length
    if changes["task.packing"]:
        bins = round(arguments.rows_per_step * arguments.mean_tokens / length)
        changes = changes | {"train.per_device_batch_size": max(1, bins)}
    texts = [*arguments.overrides, *(f"{key}={json.dumps(v)}" for key, v in changes.items())]
    recipe = lorakit.load_recipe(arguments.recipe, texts)
    prepared, engine, loader = built(recipe, varlen=name == "varlen_attn")
    loss = loss_of_rows(prepared, engine, loader, recipe.task.packing)
    padded = tokens = 0
    for step in range(WARM_STEPS + arguments.steps):
        if step == WARM_STEPS:
            synchronize()
            began = time.perf_counter()
        loaded = loader.take(step)
        engine.step(loaded.micro_batches)
        loader.prefetch(step + 1)
    synchronize()
    seconds = time.perf_counter() - began
    for step in range(WARM_STEPS, WARM_STEPS + arguments.steps):
        loader.prefetch(step)
        loaded = loader.take(step)
        tokens += loaded.token_count
        padded += sum(batch.input_ids.numel() for batch in loaded.micro_batches)
    return {
        "tokens_per_second": tokens / seconds,
        "step_ms": 1e3 * seconds / arguments.steps,
        "filled": tokens / padded,
        "loss": loss,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0,
    }


def built(recipe: Recipe, varlen: bool) -> tuple[Prepared, EagerEngine, StepLoader]:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    prepared = prepare(recipe, lambda text: None)
    strategy = build_strategy(recipe.model.dtype)
    steps = build_batching(prepared, strategy.device).steps
    total_steps = build.build_schedule(recipe, steps).total_steps
    attention = prepared.model.config._attn_implementation
    objective = build.build_objective(prepared, strategy, lambda text: None)
    if not varlen:
        prepared.model.set_attn_implementation(attention)
        objective.varlen = False
    execution = Execution("eager")
    engine = build.build_engine(
        prepared, objective, strategy, total_steps, execution, lambda text: None
    )
    loader = build.build_loader(prepared, objective, steps, strategy.device, execution)
    return prepared, engine, loader


def loss_of_rows(
    prepared: Prepared, engine: EagerEngine, loader: StepLoader, packing: bool
) -> float:
    """Return the mean loss over the trained tokens of the first rows."""
    rows = [prepared.train[i] for i in range(min(LOSS_ROWS, len(prepared.train)))]
    bins: list[Bin] = []
    for row in rows:
        room = prepared.recipe.task.max_length - sum(len(r.input_ids) for r in (bins or [[]])[-1])
        if packing and bins and len(row.input_ids) <= room:
            bins[-1].append(row)
        else:
            bins.append([row])
    batches = [loader.collate(bins[start : start + 16]) for start in range(0, len(bins), 16)]
    return engine.loss([batch.to(loader.device) for batch in batches])


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
