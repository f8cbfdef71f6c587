"""``bias: none | lora_only | all``: which biases train, in which dtype, and which are saved."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

import lorakit
from lorakit.adapters.peft.place import load_adapter
from lorakit.adapters.peft.write import save_adapter
from lorakit.injection import inject, trainable_state
from lorakit.methods.lora import LoraConfig
from lorakit.models.master_weights import plain_name
from tests.families import tiny, token_ids

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
#: Family, targets: a classifier with a head, Conv1D, a part of a fused projection.
MODELS = pytest.mark.parametrize(
    ("family", "targets"),
    [("bert", ["q", "v"]), ("gpt2", ["c_attn"]), ("gpt_neox", ["v"])],
    ids=str,
)
BIASES = pytest.mark.parametrize("bias", ["lora_only", "all"])


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model(input_ids=token_ids()).logits
    return out


def trained_biases(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the trained biases by the base model's names, without the head's."""
    return {
        plain_name(name).replace(".base_layer", ""): p
        for name, p in trainable_state(model).items()
        if plain_name(name).endswith(".bias") and not name.startswith("classifier")
    }


def move(model: nn.Module, by: float) -> None:
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in trainable_state(model).values():
            parameter.add_(torch.randn_like(parameter) * by)


@DTYPES
@MODELS
def test_which_biases_train(family: str, targets: list[str], dtype: torch.dtype) -> None:
    ends = {"bert": ("query.bias", "value.bias"), "gpt2": ("c_attn.bias",)}
    adapted = ends.get(family, ("query_key_value.bias",))
    every = {n for n, _ in tiny(family).named_parameters() if n.endswith(".bias")}
    every -= {"classifier.bias"}
    for bias, want in {
        "none": set(),
        "lora_only": {n for n in every if n.endswith(adapted)},
        "all": every,
    }.items():
        model = tiny(family).to(dtype)
        before = logits(model)
        inject(model, LoraConfig(target_modules=targets, bias=bias))
        found = trained_biases(model)
        assert set(found) == want
        assert {p.dtype for p in trainable_state(model).values()} == {torch.float32}
        assert {p.dtype for p in model.parameters() if not p.requires_grad} == {dtype}
        tolerance = 0.0 if family != "bert" else 1e-2  # a float32 head rounds differently
        torch.testing.assert_close(logits(model).to(dtype), before, atol=tolerance, rtol=tolerance)


@DTYPES
@BIASES
@MODELS
def test_they_get_gradients_and_nothing_else_changes(
    family: str, targets: list[str], bias: str, dtype: torch.dtype
) -> None:
    model = tiny(family).to(dtype).train()
    inject(model, LoraConfig(target_modules=targets, bias=bias))
    before = {n: value.clone() for n, value in model.state_dict().items()}
    model(input_ids=token_ids()).logits.float().square().sum().backward()
    trains = trainable_state(model)
    assert {n for n, p in model.named_parameters() if p.grad is not None} <= set(trains)
    assert all(p.grad is not None for p in trained_biases(model).values())
    torch.optim.SGD(trains.values(), lr=1e-2).step()
    changed = {n for n, value in model.state_dict().items() if not torch.equal(value, before[n])}
    assert changed <= set(trains)
    assert any("bias" in name for name in changed)


@DTYPES
@BIASES
@MODELS
def test_they_are_saved_in_float32_loaded_and_merged(
    family: str, targets: list[str], bias: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    model: PreTrainedModel = tiny(family).to(dtype)
    model.save_pretrained(tmp_path / "base")
    config = LoraConfig(r=4, target_modules=targets, bias=bias)
    torch.manual_seed(0)
    inject(model, config)
    move(model, 0.1)
    classifies = family == "bert"
    save_adapter(
        tmp_path / "a",
        model,
        config,
        base_model_name_or_path=str(tmp_path / "base"),
        task_type="SEQ_CLS" if classifies else "CAUSAL_LM",
    )
    stored = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert {value.dtype for value in stored.values()} == {torch.float32}

    again = lorakit.load(tmp_path / "base", tmp_path / "a", trainable=True)
    mine, loaded = trainable_state(model), trainable_state(again)
    assert mine.keys() == loaded.keys()
    assert all(torch.equal(mine[name], loaded[name]) for name in mine)
    frozen = lorakit.load(tmp_path / "base", tmp_path / "a")
    assert not trainable_state(frozen)
    for other in (again, frozen):
        assert torch.equal(logits(other), logits(model))

    lorakit.merge(tmp_path / "base", tmp_path / "a", tmp_path / "out", dtype="float32")
    auto = AutoModelForSequenceClassification if classifies else AutoModelForCausalLM
    merged = auto.from_pretrained(tmp_path / "out")
    for name, value in trained_biases(model).items():
        assert torch.equal(merged.get_parameter(name), value), name
    unmerged = lorakit.load(tmp_path / "base", tmp_path / "a", dtype="float32")
    torch.testing.assert_close(logits(merged), logits(unmerged), atol=1e-5, rtol=1e-5)


def test_a_bias_with_a_different_dtype_in_the_merged_checkpoint_is_rounded_once(
    tmp_path: Path,
) -> None:
    model = tiny("gpt2").to(torch.bfloat16)
    model.save_pretrained(tmp_path / "base")
    inject(model, config := LoraConfig(target_modules=["c_attn"], bias="all"))
    move(model, 0.1)
    save_adapter(tmp_path / "a", model, config, base_model_name_or_path="b", task_type="CAUSAL_LM")
    lorakit.merge(tmp_path / "base", tmp_path / "a", tmp_path / "out")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    for name, value in trained_biases(model).items():
        assert torch.equal(merged.get_parameter(name), value.to(torch.bfloat16)), name


def test_fully_trained_modules_keep_their_biases_to_themselves(tmp_path: Path) -> None:
    model = tiny("opt")
    whole = [f"model.decoder.layers.{i}.fc1" for i in (0, 1)]
    config = LoraConfig(target_modules=["q"], bias="all", modules_to_save=["fc1"])
    report = inject(model, config)
    assert list(report.modules_to_save) == whole
    names = [plain_name(name) for name in trainable_state(model)]
    assert len(names) == len(set(names))
    assert {f"{name}.bias" for name in whole} <= set(names)
    move(model, 0.1)
    save_adapter(tmp_path, model, config, base_model_name_or_path="b", task_type="CAUSAL_LM")
    again = tiny("opt")
    assert load_adapter(again, tmp_path).modules_to_save == tuple(whole)
    assert torch.equal(logits(again), logits(model))


def test_layers_choose_the_adapted_modules_and_their_biases() -> None:
    model = tiny("gpt2")
    inject(model, LoraConfig(target_modules=["c_attn"], bias="lora_only", layers=[1]))
    assert set(trained_biases(model)) == {"transformer.h.1.attn.c_attn.bias"}


@BIASES
def test_a_model_without_biases_trains_none(bias: str) -> None:
    model = tiny("llama")
    inject(model, LoraConfig(bias=bias))
    assert not trained_biases(model)
