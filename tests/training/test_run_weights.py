"""Messages with a loss weight: the loss of a step is sum(w * loss) / sum(w) over its tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import lorakit
from lorakit.data.plan import IndexedSteps, RowPlan, Share
from lorakit.recipe.sections import Recipe
from tests.training.engines import built
from tests.training.joint_runs import assert_equal_runs, members, train_alone, train_together
from tests.training.runs import (
    WORDS,
    changed,
    log_lines,
    metrics_lines,
    recipe_for,
    run_json,
    write_rows,
)

WEIGHTS = (0.25, 1.0, 3.0, 0, 0.5)


def chat_rows(count: int, weights: tuple[float | None, ...] = WEIGHTS) -> list[dict[str, Any]]:
    """Two answers per chat; every other chat has weights."""
    rows = []
    for i in range(count):
        chat: list[dict[str, Any]] = []
        for turn in range(2):
            weight = weights[(i + 2 * turn) % len(weights)] if i % 2 else None
            answer = " ".join(WORDS[(i + turn) % 5 : i % 7 + 6])
            chat += [
                {"role": "user", "content": " ".join(WORDS[: (i + turn) % 6 + 1])},
                {"role": "assistant", "content": answer, "weight": weight},
            ]
        rows.append({"messages": chat})
    return rows


def chat_recipe(folder: Path, model: Path, **changes: Any) -> Recipe:
    write_rows(folder / "data" / "train.jsonl", chat_rows(12))
    write_rows(folder / "data" / "validation.jsonl", chat_rows(4))
    steps = {"train__epochs": 2, "train__per_device_batch_size": 12}
    return recipe_for(folder, model, "chat", **{"task__max_length": 256, **steps, **changes})


def trained(recipe: Recipe, name: str, **changes: Any) -> Path:
    folder = Path(recipe.train.output_dir).with_name(name)
    return lorakit.train(changed(recipe, train__output_dir=str(folder), **changes)).output_dir


def expected_loss(model_dir: Path, rows: list[dict[str, Any]]) -> float:
    """The weighted mean over the answers' tokens, with transformers alone."""
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    total = weights = 0.0
    for row in rows:
        before = ""
        for message in row["messages"]:
            answer = message["role"] == "assistant"
            head = f"<{message['role']}>"
            if answer:
                weight = 1.0 if message["weight"] is None else message["weight"]
                prompt = tokenizer(before + head, add_special_tokens=False).input_ids
                text = f"{message['content']}</s>"
                ids = prompt + tokenizer(text, add_special_tokens=False).input_ids
                with torch.no_grad():
                    logits = model(torch.tensor([ids])).logits[0, len(prompt) - 1 : -1]
                losses = torch.nn.functional.cross_entropy(
                    logits, torch.tensor(ids[len(prompt) :]), reduction="none"
                )
                total += weight * float(losses.double().sum())
                weights += weight * len(losses)
            before += f"{head}{message['content']}</s>"
    return total / weights


def assert_equal(one: Path, other: Path, tolerance: float) -> None:
    ours, theirs = (load_file(run / "adapter/adapter_model.safetensors") for run in (one, other))
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=0, atol=tolerance)
    for a, b in zip(log_lines(one), log_lines(other), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)
    assert run_json(one)["trained_tokens"] == run_json(other)["trained_tokens"]


def test_the_loss_is_the_weighted_mean(tiny_llama: Path, tmp_path: Path) -> None:
    run = trained(chat_recipe(tmp_path, tiny_llama), "whole")
    expected = expected_loss(tiny_llama, chat_rows(12))
    assert log_lines(run)[0]["loss"] == pytest.approx(expected, abs=1e-5)
    base = lorakit.evaluate(chat_recipe(tmp_path, tiny_llama), base=True)
    assert base["loss"] == pytest.approx(expected_loss(tiny_llama, chat_rows(4)), abs=1e-5)


def test_accumulation_packing_and_buckets_change_nothing(tiny_llama: Path, tmp_path: Path) -> None:
    recipe = chat_recipe(tmp_path, tiny_llama)
    whole = trained(recipe, "whole")
    split = {"train__per_device_batch_size": 3, "train__gradient_accumulation_steps": 4}
    assert_equal(whole, trained(recipe, "parts", **split), 1e-5)
    packed = trained(recipe, "packed", task__packing=True)
    assert_equal(whole, packed, 1e-5)
    smoothed = trained(recipe, "smoothed", train__label_smoothing=0.1)
    assert log_lines(smoothed)[0]["loss"] != log_lines(whole)[0]["loss"]


def test_a_stream_has_the_same_weights(tiny_llama: Path, tmp_path: Path) -> None:
    """In a single step of all rows their order does not matter."""
    steps = {"train__epochs": None, "train__max_steps": 1, "train__group_by_length": False}
    recipe = chat_recipe(tmp_path, tiny_llama, **steps)
    assert_equal(
        trained(recipe, "whole"), trained(recipe, "stream", task__streaming=True), 1e-5
    )  # fmt: skip


def test_a_common_weight_has_no_effect(tiny_llama: Path, tmp_path: Path) -> None:
    recipe = chat_recipe(tmp_path, tiny_llama)
    runs = []
    for weights in ((None,), (1, 1.0), (4.0,)):
        rows = chat_rows(12, weights)
        if weights == (4.0,):
            for message in (m for row in rows for m in row["messages"] if "weight" in m):
                message["weight"] = 4.0
        write_rows(tmp_path / "data" / "train.jsonl", rows)
        runs.append(trained(recipe, f"weight-{weights[0]}"))
    plain, ones, fours = runs
    files = [run / "adapter/adapter_model.safetensors" for run in runs]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert log_lines(plain)[-1]["loss"] == log_lines(ones)[-1]["loss"]
    assert_equal(plain, fours, 1e-5)


def test_every_process_divides_by_the_weights_of_all(tiny_llama: Path, tmp_path: Path) -> None:
    rows = built(chat_recipe(tmp_path, tiny_llama)).prepared.train
    plan = RowPlan(rows.lengths, 3, 2, seed=0, group_by_length=True)
    whole = IndexedSteps(rows, plan)
    shares = [IndexedSteps(rows, plan, share=Share(rank, 2)) for rank in range(2)]
    for number in range(plan.steps_per_epoch):
        steps = [source.step(number) for source in (whole, *shares)]
        assert len({step.loss_count for step in steps}) == 1
        own = [row for step in steps[1:] for row in step.rows]
        masks = [row.loss_mask[1:] for row in own]
        assert steps[0].trained_count == sum(mask.sum() for mask in masks)
        sums = (np.float64(row.loss_weights[1:]).sum() for row in own)
        assert steps[0].loss_count == pytest.approx(sum(sums))


def test_members_of_a_joint_run(tiny_llama: Path, tmp_path: Path) -> None:
    """One with weights, and one without, whose batch is joined with that of the first."""
    write_rows(tmp_path / "data" / "train.jsonl", chat_rows(12))
    write_rows(tmp_path / "data" / "validation.jsonl", chat_rows(4))
    write_rows(tmp_path / "plain.jsonl", chat_rows(12, (1.0,)))
    files = {"train": str(tmp_path / "plain.jsonl"), "validation": str(tmp_path / "plain.jsonl")}
    changes: list[dict[str, Any]] = [{}, {"task__path": files}, {"train__seed": 9}]
    recipes = members(tmp_path, tiny_llama, "chat", changes, task__max_length=256)
    train_together(recipes)
    for recipe in recipes:
        assert_equal_runs(Path(recipe.train.output_dir), train_alone(recipe))
    assert metrics_lines(Path(recipes[0].train.output_dir))
