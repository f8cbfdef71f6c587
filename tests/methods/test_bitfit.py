"""BitFit trains the biases and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import lorakit
from lorakit.errors import AdapterError, TargetError
from lorakit.injection import inject, trainable_state
from lorakit.models.causal import split_model, token_losses
from lorakit.models.master_weights import plain_name
from tests.families import tiny, token_ids
from tests.methods.pairs import config, injected, logits, loss, pair

BITFIT = config("bitfit")
HEAD = {"classifier.weight", "classifier.bias"}


def biases(model: torch.nn.Module) -> set[str]:
    return {name for name, _ in model.named_parameters() if name.endswith(".bias")}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["bert", "gpt2", "phi"])
def test_a_training_moves_the_biases_and_the_head_alone(family: str, dtype: torch.dtype) -> None:
    before = dict(tiny(family).to(dtype).named_parameters())
    model = injected(family, BITFIT, dtype)
    expected = biases(tiny(family)) | (HEAD if family == "bert" else set())
    assert {plain_name(name) for name in trainable_state(model)} == expected
    assert {p.dtype for p in trainable_state(model).values()} == {torch.float32}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 1.0)
    for _ in range(2):
        loss(model).backward()
        optimizer.step()
    after = {plain_name(name): p for name, p in model.named_parameters()}
    moved = {n for n, p in after.items() if not torch.equal(p, before[n].to(p.dtype))}
    assert moved <= expected
    # A bias of the keys adds the same value to every score of a row, which softmax ignores.
    assert {n for n in expected - moved if "key" not in n and "k_proj" not in n} == set()


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        # The subset of the paper's section 4: queries, and the first layer of the MLP.
        (
            {"target_modules": ["q", "intermediate.dense"], "layers": [0]},
            {"attention.self.query.bias", "intermediate.dense.bias"},
        ),
        ({"target_modules": "re:.*intermediate.dense", "layers": "0"}, {"intermediate.dense.bias"}),
    ],
)
def test_the_biases_of_chosen_modules(keys: dict[str, Any], expected: set[str]) -> None:
    model = injected("bert", config("bitfit", **keys))
    assert set(trainable_state(model)) == HEAD | {f"bert.encoder.layer.0.{n}" for n in expected}


@pytest.mark.parametrize(
    ("family", "keys", "message"),
    [
        ("llama", {}, "LlamaForCausalLM has none; allowed: a model with biases"),
        ("qwen2", {"target_modules": ["o"]}, "finds nothing to train in Qwen2ForCausalLM"),
        ("gpt2", {"target_modules": ["v"]}, "hint: use 'c_attn'"),
    ],
)
def test_without_biases_it_is_an_error(family: str, keys: dict[str, Any], message: str) -> None:
    model = tiny(family)
    with pytest.raises(TargetError, match=message):
        inject(model, config("bitfit", **keys))
    assert all(p.requires_grad for p in model.parameters())


def test_a_trained_bias_of_the_output_layer_gets_its_gradient() -> None:
    """The chunked loss must use the bias of the output layer as well as its weight."""
    model = injected("phi", BITFIT)
    assert not model.lm_head.weight.requires_grad
    ids = token_ids()
    positions = torch.arange(6)
    token_losses(model, split_model(model), ids, positions, ids[0, 1:]).backward()
    got = model.lm_head.bias.grad.clone()
    model.lm_head.bias.grad = None
    rows = model(ids).logits[0, :6]
    torch.nn.functional.cross_entropy(rows, ids[0, 1:], reduction="sum").backward()
    torch.testing.assert_close(got, model.lm_head.bias.grad)
    assert got.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["gpt2", "roberta", "phi"])
def test_saved_and_loaded(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = pair(tmp_path, family, BITFIT, dtype)
    again = lorakit.load(tmp_path / "base", tmp_path / "adapter", trainable=True)
    saved, loaded = trainable_state(model), trainable_state(again)
    assert list(saved) == list(loaded)
    assert all(torch.equal(saved[key], loaded[key]) for key in saved)
    still = lorakit.load(tmp_path / "base", tmp_path / "adapter")
    assert not trainable_state(still)
    assert torch.equal(logits(again), logits(model))
    assert torch.equal(logits(still), logits(model))


@pytest.mark.parametrize("family", ["gpt2", "phi", "gpt_neox", "opt"])
def test_merged_equals_unmerged(family: str, tmp_path: Path) -> None:
    model = pair(tmp_path, family, BITFIT)
    report = lorakit.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert report.replaced_tensors == len(trainable_state(model))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(merged), logits(model), atol=1e-5, rtol=0)


def test_a_base_without_those_biases_is_an_error(tmp_path: Path) -> None:
    pair(tmp_path, "qwen2", BITFIT)
    tiny("llama").save_pretrained(tmp_path / "base")
    with pytest.raises(AdapterError, match=r"the model has no module for .*q_proj\.bias"):
        lorakit.load(tmp_path / "base", tmp_path / "adapter")
