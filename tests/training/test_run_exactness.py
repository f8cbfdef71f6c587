"""Exact training: the value of each loss, and what must not change the result."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import lorakit
from lorakit.injection import trainable_state
from lorakit.models.load import load_pretrained
from lorakit.recipe.sections import Recipe
from tests.training.engines import built
from tests.training.runs import (
    adapter_bytes,
    changed,
    completion_rows,
    learning,
    log_lines,
    recipe_for,
    run_json,
)

KINDS = ["completion", "glue/sst2"]


@pytest.fixture
def model(request: pytest.FixtureRequest, task: str) -> Path:
    name = "tiny_llama" if task == "completion" else "still_bert"
    found: Path = request.getfixturevalue(name)
    return found


def trained(recipe: Recipe, name: str, **changes: Any) -> Path:
    """Train into a directory of this name next to the recipe's own."""
    folder = Path(recipe.train.output_dir).with_name(name)
    run = lorakit.train(changed(recipe, train__output_dir=str(folder), **changes))
    return run.output_dir


def weights(run: Path) -> dict[str, Tensor]:
    return load_file(run / "adapter" / "adapter_model.safetensors")


def assert_close(one: Path, other: Path, tolerance: float) -> None:
    ours, theirs = weights(one), weights(other)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=0, atol=tolerance)


@pytest.mark.parametrize("task", KINDS)
def test_accumulation_gives_the_same_result(model: Path, task: str, tmp_path: Path) -> None:
    """30 rows of many lengths; the last step of an epoch has 6."""
    recipe = recipe_for(tmp_path, model, task)
    whole = trained(recipe, "whole")
    parts = trained(
        recipe, "parts", train__per_device_batch_size=2, train__gradient_accumulation_steps=4
    )
    assert adapter_bytes(whole) != adapter_bytes(parts), "the sums are rounded in another order"
    assert_close(whole, parts, 1e-5)
    for ours, theirs in zip(log_lines(whole), log_lines(parts), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-5)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], abs=1e-4)


@pytest.mark.parametrize("task", KINDS)
def test_gradient_checkpointing_gives_the_same_adapter(
    model: Path, task: str, tmp_path: Path
) -> None:
    recipe = recipe_for(tmp_path, model, task, train__epochs=1)
    plain = trained(recipe, "plain")
    spared = trained(recipe, "spared", train__gradient_checkpointing=True)
    assert_close(plain, spared, 1e-6)
    assert any(value.any() for name, value in weights(spared).items() if "lora_B" in name)


def test_gradient_checkpointing_drops_the_same_with_dropout(
    tiny_llama: Path, tmp_path: Path
) -> None:
    recipe = recipe_for(tmp_path, tiny_llama, adapter__lora_dropout=0.3, train__epochs=1)
    assert_close(
        trained(recipe, "plain"),
        trained(recipe, "spared", train__gradient_checkpointing=True),
        1e-6,
    )


def test_gradient_checkpointing_saves_memory(tiny_llama: Path, tmp_path: Path) -> None:
    """Compare how many values autograd saves for the backward pass."""
    kept = {}
    for spare in (False, True):
        run = built(recipe_for(tmp_path, tiny_llama, train__gradient_checkpointing=spare))
        total = 0

        def count(tensor: Tensor) -> Tensor:
            nonlocal total
            total += tensor.numel()
            return tensor

        batch = run.loader.collate([[run.prepared.train[i]] for i in range(8)])
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            loss = run.objective(batch)
        loss.backward()
        assert all(p.grad is not None for p in run.engine.parameters.values())
        kept[spare] = total
    assert kept[True] < kept[False] / 2


def test_the_same_recipe_gives_the_same_bytes(tiny_llama: Path, tmp_path: Path) -> None:
    recipe = recipe_for(tmp_path, tiny_llama, adapter__lora_dropout=0.1)
    first, second = trained(recipe, "first"), trained(recipe, "second")
    assert adapter_bytes(first) == adapter_bytes(second)
    assert learning(first) == learning(second)
    other = trained(recipe, "other", train__seed=8)
    assert adapter_bytes(other) != adapter_bytes(first)


def test_saving_evaluating_and_logging_do_not_affect_the_result(
    tiny_llama: Path, tmp_path: Path
) -> None:
    recipe = recipe_for(tmp_path, tiny_llama, adapter__lora_dropout=0.1)
    plain = trained(recipe, "plain")
    busy = trained(
        recipe, "busy", train__save_every_steps=1, train__eval_every_steps=1,
        train__log_every_steps=3, train__per_device_eval_batch_size=3,
    )  # fmt: skip
    assert run_json(busy)["best_step"] == run_json(plain)["best_step"] == 8
    assert adapter_bytes(plain) == adapter_bytes(busy)


def test_a_logged_loss_is_the_token_mean_of_the_whole_step(
    tiny_llama: Path, tmp_path: Path
) -> None:
    """One step over all rows in 15 batches compared with a forward pass of each row."""
    recipe = recipe_for(
        tmp_path, tiny_llama, train__max_steps=1, train__epochs=None,
        train__per_device_batch_size=2, train__gradient_accumulation_steps=15,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    losses: list[Tensor] = []
    for row in completion_rows(30):
        prompt, completion = (
            tokenizer(row[key], add_special_tokens=False).input_ids
            for key in ("prompt", "completion")
        )
        ids = torch.tensor([*prompt, *completion, tokenizer.eos_token_id])
        with torch.no_grad():
            log_p = model(ids[None]).logits[0].float().log_softmax(-1)
        places = torch.arange(len(prompt), len(ids))
        losses.append(-log_p[places - 1, ids[places]])
    lorakit.train(recipe)
    run = Path(recipe.train.output_dir)
    (line,) = log_lines(run)
    assert line["loss"] == pytest.approx(torch.cat(losses).mean().item(), abs=1e-5)
    record = run_json(run)
    assert record["trained_tokens"] == len(torch.cat(losses))


def test_encoder_loss_is_the_mean_over_rows(still_bert: Path, tmp_path: Path) -> None:
    settings = {"train__max_steps": 1, "train__epochs": None, "train__per_device_batch_size": 7}
    settings |= {"train__gradient_accumulation_steps": 5}
    recipe = recipe_for(tmp_path, still_bert, "glue/sst2", **settings)
    run = built(recipe)
    logits = [
        run.prepared.model(input_ids=torch.tensor(row.input_ids[None]).long()).logits[0]
        for row in (run.prepared.train[i] for i in range(30))
    ]
    labels = torch.tensor([i % 2 for i in range(30)])
    want = torch.nn.functional.cross_entropy(torch.stack(logits), labels).item()
    batches = run.loader.take(0).micro_batches
    assert run.engine.loss(batches) == pytest.approx(want, abs=1e-5)
    assert run.engine.step(batches).loss.item() == pytest.approx(want, abs=1e-5)


def test_label_smoothing_equals_torch(tiny_llama: Path, tmp_path: Path) -> None:
    recipe = recipe_for(tmp_path, tiny_llama, train__label_smoothing=0.2)
    run = built(recipe)
    batch = run.loader.collate([[run.prepared.train[i]] for i in range(5)])
    logits = run.prepared.model(input_ids=batch.input_ids).logits
    rows = logits.reshape(-1, logits.shape[-1])[batch.loss_indices]
    want = torch.nn.functional.cross_entropy(
        rows, batch.targets, reduction="sum", label_smoothing=0.2
    )
    torch.testing.assert_close(run.objective(batch), want)


def test_a_log_line_is_the_mean_of_its_steps(tiny_llama: Path, tmp_path: Path) -> None:
    recipe = recipe_for(tmp_path, tiny_llama)
    each = log_lines(trained(recipe, "each"))
    three = log_lines(trained(recipe, "three", train__log_every_steps=3))
    assert [line["step"] for line in three] == [3, 6, 8]
    assert [line["epoch"] for line in three] == [0.75, 1.5, 2.0]
    losses = [line["loss"] for line in each]
    for line, part in zip(three, (losses[:3], losses[3:6], losses[6:]), strict=True):
        assert line["loss"] == pytest.approx(sum(part) / len(part))
        assert line["grad_norm"] == each[line["step"] - 1]["grad_norm"]


@pytest.mark.parametrize("task", KINDS)
def test_the_base_is_unchanged_and_has_no_optimizer_state(
    model: Path, task: str, tmp_path: Path
) -> None:
    recipe = recipe_for(tmp_path, model, task)
    run = built(recipe)
    prepared, engine = run.prepared, run.engine
    trainable = trainable_state(prepared.model)
    labels = prepared.task.labels(recipe.task, None)
    fresh = load_pretrained(recipe.model, prepared.task.kind, labels, seed=7).model
    before = {k: v.clone() for k, v in trainable.items()}
    run.take_steps(3)
    frozen = {n: p for n, p in prepared.model.named_parameters() if not p.requires_grad}
    base = fresh.state_dict()
    assert {name.replace(".base_layer", "") for name in frozen} == base.keys() - trainable.keys()
    for name, parameter in frozen.items():
        assert torch.equal(parameter, base[name.replace(".base_layer", "")]), name
        assert parameter.grad is None
    assert all(not torch.equal(v, before[k]) for k, v in trainable.items())
    known = {id(parameter) for parameter in trainable.values()}
    assert {id(parameter) for parameter in engine.optimizer.state} == known
    listed = [id(p) for group in engine.optimizer.param_groups for p in group["params"]]
    assert sorted(listed) == sorted(known)


def test_weight_decay_is_on_matrices_only(tiny_bert: Path, tmp_path: Path) -> None:
    engine = built(recipe_for(tmp_path, tiny_bert, "glue/sst2", train__weight_decay=0.3)).engine
    decay = {
        id(parameter): group["weight_decay"]
        for group in engine.optimizer.param_groups
        for parameter in group["params"]
    }
    for name, parameter in engine.parameters.items():
        assert decay[id(parameter)] == (0.3 if parameter.ndim > 1 else 0.0), name
    assert {parameter.ndim for parameter in engine.parameters.values()} == {1, 2}


def test_clipping_bounds_the_update(tiny_llama: Path, tmp_path: Path) -> None:
    """SGD moves by rate x gradient, so the norm of a step is rate x the clipped norm."""
    recipe = recipe_for(
        tmp_path, tiny_llama, train__optimizer="sgd", train__learning_rate=1.0,
        train__lr_scheduler="constant", train__warmup_steps=0,
    )  # fmt: skip
    for limit in (1e-3, None):
        run = built(changed(recipe, train__max_grad_norm=limit))
        before = {name: weight.clone() for name, weight in run.engine.weights.items()}
        (result,) = run.take_steps()
        after = run.engine.weights
        moved = torch.cat([(after[name] - before[name]).flatten() for name in before]).norm()
        norm = result.grad_norm.item()
        assert norm > 0.01
        assert moved.item() == pytest.approx(limit or norm, rel=1e-3)
