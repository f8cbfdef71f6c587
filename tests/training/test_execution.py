"""How the steps of a run are executed, by the recipe, the model and the device."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lorakit.distributed.strategy import Strategy
from lorakit.training import build, run
from lorakit.training.batch_size import trial_share
from lorakit.training.execution import Execution, choose_execution, replays_joint_passes
from lorakit.training.setup import Prepared, prepare
from tests.families import tiny
from tests.hybrids import hybrid
from tests.training.runs import recipe_for, write_rows

GPU, CPU = torch.device("cuda"), torch.device("cpu")


BY_TOKENS = {"train__per_device_batch_size": None, "train__max_tokens_per_batch": 128}


def prepared(model: Path, folder: Path, **changes: Any) -> Prepared:
    return prepare(recipe_for(folder, model, "completion", **changes), lambda text: None)


@pytest.mark.parametrize(
    ("changes", "mode"),
    [
        ({}, "cuda_graphs"),
        ({"train__compile": False}, "eager"),
        ({"train__compile": True}, "compiled_layers"),
        ({"train__gradient_checkpointing": True}, "eager"),
        ({"task__packing": True}, "eager"),
        (BY_TOKENS, "cuda_graphs"),
        (BY_TOKENS | {"train__deterministic": True}, "eager"),
        ({"train__deterministic": True}, "cuda_graphs"),
    ],
)
def test_a_small_model_on_a_gpu(
    tiny_llama: Path, tmp_path: Path, changes: dict[str, Any], mode: str
) -> None:
    assert choose_execution(prepared(tiny_llama, tmp_path, **changes), GPU, 100).mode == mode


def test_the_cpu_runs_eagerly(tiny_llama: Path, tmp_path: Path) -> None:
    chosen = choose_execution(prepared(tiny_llama, tmp_path), CPU, 100)
    assert chosen.mode == "eager"
    assert chosen.note is None


def test_experts_run_eagerly(tiny_llama: Path, tmp_path: Path) -> None:
    model = hybrid("mixtral")
    run = replace(prepared(tiny_llama, tmp_path), model=model)
    assert choose_execution(run, GPU, 100).mode == "eager"


def test_layers_that_are_dropped_at_random_run_eagerly(tiny_llama: Path, tmp_path: Path) -> None:
    """A graph would drop those that were dropped when it was captured."""
    run = replace(prepared(tiny_llama, tmp_path), model=tiny("opt", layerdrop=0.1))
    assert choose_execution(run, GPU, 100).mode == "eager"
    assert not replays_joint_passes(run, GPU, 2)
    run.model.config.layerdrop = 0.0
    assert choose_execution(run, GPU, 100).mode == "cuda_graphs"
    assert replays_joint_passes(run, GPU, 2)


ONE_LENGTH, SEVERAL = [6], [5, 6]


def write_lengths(folder: Path, lengths: list[int]) -> None:
    rows = [{"prompt": "red", "completion": " blue" * count} for count in lengths * 8]
    write_rows(folder / "data" / "train.jsonl", rows)


@pytest.mark.parametrize(
    ("rows", "lengths", "total_steps", "changes", "mode"),
    [
        (256, ONE_LENGTH, 10, {}, "cuda_graphs"),
        (256, ONE_LENGTH, 100_000, {}, "compiled_layers"),
        (256, ONE_LENGTH, 100_000, {"train__deterministic": True}, "cuda_graphs"),
        (256, SEVERAL, 100_000, {}, "cuda_graphs"),
        (256, SEVERAL, 100_000, {"train__gradient_checkpointing": True}, "compiled_layers"),
        (1000, SEVERAL, 100_000, {}, "cuda_graphs"),
        (1500, SEVERAL, 10, {}, "cuda_graphs"),
        (1500, SEVERAL, 100_000, {}, "compiled_layers"),
        (4096, SEVERAL, 10, {}, "eager"),
        (4096, SEVERAL, 100_000, {}, "compiled_layers"),
        (4096, SEVERAL, 100_000, {"train__deterministic": True}, "eager"),
    ],
)
def test_compiling_a_large_model_must_pay(
    rows: int, lengths: list[int], total_steps: int, changes: dict[str, Any], mode: str,
    tiny_llama: Path, tmp_path: Path,
) -> None:  # fmt: skip
    write_lengths(tmp_path, lengths)
    changes = {"model__dtype": "bfloat16", "train__per_device_batch_size": rows} | changes
    run = prepared(tiny_llama, tmp_path, **changes)
    with torch.device("meta"):
        model = tiny("llama", hidden_size=4096, intermediate_size=14336).to(torch.bfloat16)
    run = replace(run, model=model)
    chosen = choose_execution(run, GPU, total_steps)
    assert chosen.mode == mode
    if mode == "cuda_graphs":  # of a large pass, if there is room
        assert chosen.if_room == (rows > 256)
        assert trial_share(chosen) == (1.0 if rows > 256 else 0.5)


@pytest.mark.parametrize(
    ("lengths", "device", "hint"),
    [(ONE_LENGTH, GPU, False), (SEVERAL, GPU, True), (SEVERAL, CPU, False)],
)
def test_compiled_layers_that_are_slower_are_not_recommended(
    tiny_llama: Path, tmp_path: Path, lengths: list[int], device: torch.device, hint: bool
) -> None:
    write_lengths(tmp_path, lengths)
    run = prepared(tiny_llama, tmp_path, train__compile=True)
    chosen = choose_execution(run, device, 100)
    assert chosen.mode == "compiled_layers"
    assert ("auto would be faster" in (chosen.note or "")) == hint


@pytest.mark.parametrize(
    ("lengths", "changes", "replays"),
    [
        (ONE_LENGTH, {}, True),
        (ONE_LENGTH, {"task__packing": True}, False),
        (ONE_LENGTH, {"train__gradient_checkpointing": True}, False),
        (ONE_LENGTH, BY_TOKENS, False),
        (ONE_LENGTH, {"train__compile": False}, False),
        (ONE_LENGTH, {"model__base_precision": "nf4"}, False),
        (SEVERAL, {}, False),
    ],
)
def test_passes_of_compiled_layers_are_replayed_if_all_batches_have_one_shape(
    tiny_llama: Path, tmp_path: Path, lengths: list[int], changes: dict[str, Any], replays: bool
) -> None:
    write_lengths(tmp_path, lengths)
    run = prepared(tiny_llama, tmp_path, **({"train__compile": True} | changes))
    assert choose_execution(run, GPU, 100).replays == replays
    assert not choose_execution(run, CPU, 100).replays
    assert not choose_execution(run, GPU, 100, is_sharded=True).replays


@pytest.mark.parametrize("begin", [run.start_unwritten, run.train])
def test_it_is_chosen_once_the_model_is_placed(
    begin: Any, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only then FSDP knows whether the weights are sharded."""
    place = Strategy.place
    sharded: list[bool] = []

    def shards(strategy: Strategy, *arguments: Any, **options: Any) -> str | None:
        strategy.is_sharded = True
        return place(strategy, *arguments, **options)

    def noted(
        prepared: Prepared, device: torch.device, steps: int, is_sharded: bool = False
    ) -> Execution:
        sharded.append(is_sharded)
        return choose_execution(prepared, device, steps, is_sharded)

    monkeypatch.setattr(Strategy, "place", shards)
    monkeypatch.setattr(build, "choose_execution", noted)
    begin(recipe_for(tmp_path, tiny_llama, "completion", train__epochs=1), say=lambda text: None)
    assert sharded == [True]
