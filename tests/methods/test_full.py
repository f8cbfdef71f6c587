"""Full fine-tuning compared with plain torch for every dtype, and its files."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

import lorakit
from lorakit.errors import AdapterError, TargetError
from lorakit.injection import inject, trainable_state
from lorakit.models.master_weights import base_dtype, plain_name
from tests.families import ALL, CAUSAL, tiny
from tests.methods.pairs import config, injected, logits, loss, pair, save

FULL = config("full")


def names(model: torch.nn.Module) -> set[str]:
    return {plain_name(name) for name in trainable_state(model)}


def steps(model: torch.nn.Module, count: int, lr: float) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr)
    for _ in range(count):
        loss(model).backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_in_float32_it_is_plain_training(family: str) -> None:
    ours, plain = injected(family, FULL), tiny(family)
    steps(ours, 3, 1e-3)
    steps(plain, 3, 1e-3)
    assert all(torch.equal(v, plain.state_dict()[k]) for k, v in ours.state_dict().items())
    moved = tiny(family).state_dict()
    changed = [k for k, v in ours.named_parameters() if not torch.equal(v, moved[k])]
    assert len(changed) > len(moved) * 0.9


FLOAT32 = [(family, torch.float32) for family in ("llama", "gpt2", "bert")]
BFLOAT16 = [(family, torch.bfloat16) for family in ALL if family != "t5_encoder"]
FLOAT16 = [(family, torch.float16) for family in ("llama", "bert")]


@pytest.mark.parametrize(("family", "dtype"), [*FLOAT32, *BFLOAT16, *FLOAT16])
def test_every_parameter_trains_in_float32(family: str, dtype: torch.dtype) -> None:
    before = logits(tiny(family).to(dtype))
    model = tiny(family).to(dtype)
    shapes = {name: p.shape for name, p in model.named_parameters()}
    report = inject(model, FULL)
    found = trainable_state(model)
    assert {plain_name(n): p.shape for n, p in found.items()} == shapes
    assert {p.dtype for p in found.values()} == {torch.float32}
    assert report.trainable_parameters == report.total_parameters
    assert report.adapted_modules == ()
    assert base_dtype(model) == dtype
    torch.testing.assert_close(
        logits(model), before, atol=0 if dtype == torch.float32 else 2e-2, rtol=0
    )
    loss(model).backward()
    assert any(p.grad is not None and p.grad.any() for p in found.values())


def test_small_updates_are_not_lost_over_bfloat16() -> None:
    """Steps of 1e-4 of a weight do not change a bfloat16 weight, but they change its fp32
    master."""
    model = tiny("llama").to(torch.bfloat16)
    lost = copy.deepcopy(model)
    inject(model, FULL)
    for one in (model, lost):
        norm = dict(one.named_parameters())
        weight = next(p for n, p in norm.items() if plain_name(n) == "model.norm.weight")
        with torch.no_grad():
            for _ in range(100):
                weight += 1e-4
    assert torch.equal(lost.model.norm.weight, torch.ones(16, dtype=torch.bfloat16))
    seen = model.model.norm.weight
    assert seen.dtype == torch.bfloat16
    torch.testing.assert_close(seen.float(), torch.full((16,), 1.01), atol=4e-3, rtol=0)


def test_it_learns_over_bfloat16_where_bfloat16_alone_does_not() -> None:
    model, alone = injected("llama", FULL, torch.bfloat16), tiny("llama").to(torch.bfloat16)
    start = loss(model).item()
    for one in (model, alone):
        steps(one, 30, 1e-5)
    ours, theirs = start - loss(model).item(), start - loss(alone).item()
    assert ours > 0
    assert ours > 2 * theirs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tied_embeddings_stay_one(dtype: torch.dtype, tmp_path: Path) -> None:
    model = pair(tmp_path, "llama", FULL, dtype, tie_word_embeddings=True)
    assert "lm_head.weight" not in names(model)
    assert torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
    again = lorakit.load(tmp_path / "base", tmp_path / "adapter", trainable=True)
    assert torch.equal(again.lm_head.weight, again.model.embed_tokens.weight)
    lorakit.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    assert torch.equal(logits(merged), logits(model))


def _both(*modules: str) -> set[str]:
    return {f"bert.{module}.{end}" for module in modules for end in ("weight", "bias")}


_VALUE = "encoder.layer.{}.attention.self.value"
CHOICES: dict[str, tuple[dict[str, Any], set[str]]] = {
    "a role": ({"target_modules": ["v"]}, _both(_VALUE.format(0), _VALUE.format(1))),
    "a role in a layer": ({"target_modules": ["v"], "layers": [1]}, _both(_VALUE.format(1))),
    "a suffix": ({"target_modules": "pooler.dense"}, _both("pooler.dense")),
    "an embedding": (
        {"target_modules": ["position_embeddings"]},
        {"bert.embeddings.position_embeddings.weight"},
    ),
}


@pytest.mark.parametrize("choice", CHOICES)
def test_only_the_selected_parameters_and_the_head_are_trained(choice: str) -> None:
    keys, expected = CHOICES[choice]
    model = injected("bert", config("full", **keys))
    expected = expected | {"classifier.weight", "classifier.bias"}
    assert names(model) == expected
    loss(model).backward()
    assert {n for n, p in model.named_parameters() if p.grad is not None} == expected


def test_layers_alone_choose_all_that_lies_in_them() -> None:
    """The LoRA paper's FT-Top2, with one layer."""
    model = injected("gpt2", config("full", layers="1"))
    assert names(model) == {n for n, _ in tiny("gpt2").named_parameters() if ".h.1." in n}


def test_the_output_layer_means_the_tied_embeddings_too() -> None:
    section = config("full", target_modules=["lm_head"])
    model = injected("llama", section, torch.bfloat16, tie_word_embeddings=True)
    assert names(model) == {"model.embed_tokens.weight"}
    assert torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)


@pytest.mark.parametrize(
    ("family", "keys", "message"),
    [
        ("gpt2", {"target_modules": ["q"]}, r"c_attn\.q are parts of .* hint: use 'c_attn'"),
        ("llama", {"target_modules": ["qq"]}, "'qq' matches no linear"),
        ("llama", {"layers": [7]}, "no layer 7 .* allowed: 0 to 1"),
    ],
)
def test_an_invalid_selection_leaves_the_model_unchanged(
    family: str, keys: dict[str, Any], message: str
) -> None:
    model = tiny(family)
    with pytest.raises(TargetError, match=message):
        inject(model, config("full", **keys))
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "gpt_neox"])
def test_a_saved_adapter_loads(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = pair(tmp_path, family, FULL, dtype)
    again = lorakit.load(tmp_path / "base", tmp_path / "adapter", trainable=True)
    saved, loaded = trainable_state(model), trainable_state(again)
    assert list(saved) == list(loaded)
    assert all(torch.equal(saved[key], loaded[key]) for key in saved)
    assert torch.equal(logits(again), logits(model))
    still = lorakit.load(None, tmp_path / "adapter")
    assert not trainable_state(still)
    assert still.dtype == dtype
    assert torch.equal(logits(still), logits(model))
    save(tmp_path / "more", again, FULL)
    weights = "adapter/adapter_model.safetensors"
    assert (tmp_path / weights).read_bytes() == (tmp_path / "more" / weights).read_bytes()


@pytest.mark.parametrize(
    ("family", "dtype"),
    [*((f, torch.float32) for f in ("llama", "gpt2", "phi", "gpt_neox", "bloom", "roberta")),
     *((f, torch.bfloat16) for f in ("gemma3", "gpt_neox", "bert"))],
)  # fmt: skip
def test_merged_equals_unmerged(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = pair(tmp_path, family, FULL, dtype)
    lorakit.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    merged = plain(tmp_path / "out", family)
    assert merged.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 5e-2  # a head is float32 until it is merged
    torch.testing.assert_close(logits(merged), logits(model), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_a_merge_in_float32_keeps_every_bit_that_was_trained(family: str, tmp_path: Path) -> None:
    """Merging on a bfloat16 base, in files and in memory."""
    model = pair(tmp_path, family, FULL, torch.bfloat16)
    lorakit.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", dtype="float32")
    values = dict(plain(tmp_path / "out", family).named_parameters())
    trained = {plain_name(n): p for n, p in trainable_state(model).items()}
    assert values.keys() == trained.keys()
    assert all(torch.equal(values[name], trained[name]) for name in values)


def plain(folder: Path, family: str) -> PreTrainedModel:
    """Load the directory with plain transformers."""
    auto = AutoModelForCausalLM if family in CAUSAL else AutoModelForSequenceClassification
    model, info = auto.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    assert isinstance(model, PreTrainedModel)
    return model


def test_the_files_describe_their_contents(tmp_path: Path) -> None:
    pair(tmp_path, "bert", FULL, torch.bfloat16)
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert set(settings) == {
        "base_model_name_or_path", "modules_to_save", "peft_type", "revision", "task_type",
        "trained_parameters",
    }  # fmt: skip
    assert (settings["peft_type"], settings["modules_to_save"]) == ("FULL", ["classifier"])
    bare = {n for n, _ in tiny("bert").named_parameters() if not n.startswith("classifier")}
    assert set(settings["trained_parameters"]) == bare
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {t.dtype for t in tensors.values()} == {torch.float32}
    sidecar = json.loads((tmp_path / "adapter" / "lorakit.json").read_text())
    assert (sidecar["method"], sidecar["base_dtype"]) == ("full", "bfloat16")
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert "PeftModel" not in card
    assert "library_name: lorakit" in card
    assert "lorakit merge" in card


def test_peft_refuses_the_form(tmp_path: Path) -> None:
    from peft import PeftModel

    pair(tmp_path, "llama", FULL)
    with pytest.raises((KeyError, ValueError)):
        PeftModel.from_pretrained(tiny("llama"), tmp_path / "adapter")


def change(folder: Path, **settings: Any) -> None:
    file = folder / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


def test_a_tensor_that_is_missing_or_unknown_is_an_error(tmp_path: Path) -> None:
    pair(tmp_path, "llama", FULL)
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    prefix = "base_model.model.model.norm"
    save_file({k: v for k, v in tensors.items() if not k.startswith(prefix)}, file)
    for command in (refuse_load, refuse_merge):
        command(tmp_path, r"missing tensor: model\.norm\.weight")
    save_file(tensors | {f"{prefix}.bias": torch.zeros(16)}, file)
    refuse_load(tmp_path, r"unknown tensor: model\.norm\.bias")
    listed = sorted([k.removeprefix("base_model.model.") for k in tensors] + ["model.norm.bias"])
    change(tmp_path, trained_parameters=listed)
    for command in (refuse_load, refuse_merge):
        command(tmp_path, r"the model has no module for model\.norm\.bias")


@pytest.mark.parametrize("value", [None, "all", [1], {}])
def test_a_list_that_is_none_is_an_error(value: Any, tmp_path: Path) -> None:
    pair(tmp_path, "llama", FULL)
    change(tmp_path, trained_parameters=value)
    refuse_load(tmp_path, r"trained_parameters = .*allowed: a list")


def test_another_base_is_an_error(tmp_path: Path) -> None:
    pair(tmp_path, "llama", FULL)
    tiny("llama", intermediate_size=32).save_pretrained(tmp_path / "base")
    for command in (refuse_load, refuse_merge):
        command(tmp_path, "belongs to another base model")


def refuse_load(folder: Path, message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        lorakit.load(folder / "base", folder / "adapter")


def refuse_merge(folder: Path, message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        lorakit.merge(folder / "base", folder / "adapter", folder / "out")
    assert not (folder / "out").exists()
