"""Roles in a fused projection: they select the rows that the model's attention uses, no other row
changes, and PEFT reads the adapter as LoRA on the whole matrix.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import lorakit
from lorakit.adapters.peft.place import load_adapter
from lorakit.adapters.peft.write import save_adapter
from lorakit.anatomy import fused_rows
from lorakit.base_weight import as_matrix
from lorakit.errors import AdapterError, TargetError
from lorakit.injection import inject, trainable_state
from lorakit.layers import CompositeLayer, adapted_modules, adapter_layers
from lorakit.methods.lora import LoraConfig
from tests.families import tiny, token_ids

pytestmark = pytest.mark.filterwarnings("ignore")

#: Phi-3 has grouped queries here: 4 heads of queries, 2 of keys and values.
FAMILIES = ("gpt2", "gpt_neox", "bloom", "phi3", "modernbert")
CHOICES = (["q"], ["k"], ["v"], ["q", "v"], ["q", "k", "v"])


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model(input_ids=token_ids()).logits
    return out


def adapt(model: PreTrainedModel, roles: list[str], **keys: Any) -> LoraConfig:
    """Inject, and change everything that trains, as training would."""
    config = LoraConfig(**{"r": 4, "target_modules": roles, **keys})
    torch.manual_seed(0)
    inject(model, config)
    with torch.no_grad():
        for parameter in trainable_state(model).values():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return config


def save(model: PreTrainedModel, config: LoraConfig, folder: Path, base: Path | str = "b") -> Path:
    task: Any = "SEQ_CLS" if "Classification" in type(model).__name__ else "CAUSAL_LM"
    return save_adapter(folder, model, config, base_model_name_or_path=str(base), task_type=task)


def projections(model: nn.Module) -> dict[str, nn.Module]:
    ends = ("c_attn", "query_key_value", "qkv_proj", "Wqkv")
    return {n: m for n, m in model.named_modules() if n.endswith(ends)}


@pytest.fixture
def first_attention(monkeypatch: pytest.MonkeyPatch) -> Callable[[nn.Module], list[torch.Tensor]]:
    """Return the q, k and v (batch, heads, length, head_dim) of the first layer's attention: what
    transformers passes to its attention function, or BLOOM to its own products."""
    seen: list[list[torch.Tensor]] = []
    sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def spy(module: nn.Module, q: Any, k: Any, v: Any, *rest: Any, **keys: Any) -> Any:
        seen.append([q, k, v])
        return sdpa(module, q, k, v, *rest, **keys)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", spy)  # type: ignore[arg-type]

    def run(model: nn.Module) -> list[torch.Tensor]:
        seen.clear()
        if type(model).__name__.startswith("Bloom"):
            attention: Any = model.transformer.h[0].self_attention  # type: ignore[union-attr,index]
            reshape = type(attention)._reshape
            monkeypatch.setattr(
                attention, "_reshape", lambda x: seen.append(reshape(attention, x)) or seen[-1]
            )
        logits(model)
        return list(seen[0])

    return run


@pytest.mark.parametrize("roles", CHOICES, ids="".join)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_attention_gets_the_chosen_roles_changed_and_no_other(
    family: str, roles: list[str], first_attention: Callable[[nn.Module], list[torch.Tensor]]
) -> None:
    model = tiny(family)
    before = first_attention(model)
    adapt(model, roles)
    after = first_attention(model)
    for role, old, new in zip("qkv", before, after, strict=True):
        if role in roles:
            changed = (old != new).float().mean(dim=(0, 2))  # of every head and dimension
            assert changed.min() > 0.9, f"{role}: all of its heads and dimensions change"
        else:
            assert torch.equal(old, new), f"{role} stays bit for bit"


@pytest.mark.parametrize("family", FAMILIES)
def test_the_rows_of_a_role_act_as_a_separate_linear_layer(family: str) -> None:
    """Each part computes what LoRA computes on the role's rows of W."""
    model = tiny(family)
    adapt(model, ["q", "v"])
    name, layer = next(iter(adapted_modules(model).items()))
    assert isinstance(layer, CompositeLayer)
    rows = fused_rows(tiny(family).get_submodule(name), model)
    x = torch.randn(3, 5, layer.in_features)
    y, plain = layer(x), layer.base_layer(x)
    for role in ("q", "v"):
        part = layer.parts[role]
        update = part.scaling * x @ part.lora_A.T @ part.lora_B.T
        want = rows[role].of(plain, 2) + update
        torch.testing.assert_close(rows[role].of(y, 2), want, atol=1e-5, rtol=1e-5)
    assert torch.equal(rows["k"].of(y, 2), rows["k"].of(plain, 2))


@pytest.mark.parametrize("roles", [["k"], ["v", "q"], ["q", "k", "v"]], ids="".join)
@pytest.mark.parametrize("family", FAMILIES)
def test_peft_reads_the_parts_as_lora_on_the_fused_projection(
    family: str, roles: list[str], tmp_path: Path
) -> None:
    model, base = tiny(family), tiny(family)
    save(model, adapt(model, roles), tmp_path / "a")
    ours, before = logits(model), logits(base)
    theirs = PeftModel.from_pretrained(base, str(tmp_path / "a")).eval()
    assert (ours - before).abs().max() > 2e-4, "the adapter does something"
    torch.testing.assert_close(logits(theirs), ours, atol=1e-5, rtol=0)


@pytest.mark.parametrize("use_rslora", [False, True])
def test_parts_of_different_ranks_and_alphas(use_rslora: bool, tmp_path: Path) -> None:
    model = tiny("gpt2")
    config = adapt(
        model,
        ["q", "v"],
        use_rslora=use_rslora,
        rank_pattern={"q": 3, "1.attn.c_attn.v": 5},
        alpha_pattern={"v": 7.0, "0.attn.c_attn.q": 2.0},
    )
    ranks = {name: layer.r for name, layer in adapter_layers(model).items()}
    stem = "transformer.h.{}.attn.c_attn.{}"
    assert ranks == {
        stem.format(0, "q"): 3,
        stem.format(0, "v"): 4,
        stem.format(1, "q"): 3,
        stem.format(1, "v"): 5,
    }
    save(model, config, tmp_path / "a")
    theirs = PeftModel.from_pretrained(tiny("gpt2"), str(tmp_path / "a")).eval()
    torch.testing.assert_close(logits(theirs), logits(model), atol=1e-5, rtol=0)
    again = tiny("gpt2")
    load_adapter(again, tmp_path / "a")
    assert {name: layer.r for name, layer in adapter_layers(again).items()} == ranks
    torch.testing.assert_close(logits(again), logits(model), atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_from_disk_the_parts_train_again_and_a_merge_changes_only_their_rows(
    family: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    model = tiny(family).to(dtype)
    model.save_pretrained(tmp_path / "base")
    config = adapt(model, ["k", "q"])
    save(model, config, tmp_path / "a", tmp_path / "base")

    again = lorakit.load(tmp_path / "base", tmp_path / "a", trainable=True)
    mine, loaded = trainable_state(model), trainable_state(again)
    assert list(loaded) == list(mine)
    assert all(torch.equal(mine[name], loaded[name]) for name in mine)
    assert torch.equal(logits(again), logits(model))

    lorakit.merge(tmp_path / "base", tmp_path / "a", tmp_path / "out", dtype="float32")
    auto = AutoModelForSequenceClassification if family == "modernbert" else AutoModelForCausalLM
    merged = auto.from_pretrained(tmp_path / "out")
    base = tiny(family).to(dtype)
    layers = adapted_modules(model)
    for name, module in projections(base).items():
        old, new = (as_matrix(module, m.get_submodule(name).weight.float()) for m in (base, merged))
        rows = fused_rows(module, base)
        assert torch.equal(rows["v"].of(new), rows["v"].of(old)), "bit for bit"
        layer = layers[name]
        assert isinstance(layer, CompositeLayer)
        for role, part in layer.parts.items():
            update = part.scaling * part.lora_B @ part.lora_A
            torch.testing.assert_close(rows[role].of(new), rows[role].of(old) + update)
    torch.testing.assert_close(logits(merged), logits(model.float()), atol=1e-5, rtol=1e-5)


def test_pissa_of_a_part_is_the_svd_of_its_rows(tmp_path: Path) -> None:
    model, base = tiny("gpt_neox"), tiny("gpt_neox")
    inject(model, config := LoraConfig(r=2, target_modules=["v"], init="pissa"))
    torch.testing.assert_close(logits(model), logits(base), atol=1e-6, rtol=1e-6)
    part = next(iter(adapter_layers(model).values()))
    U, S, Vt = torch.linalg.svd(part.dense_weight().detach())
    torch.testing.assert_close(
        part.scaling * part.lora_B @ part.lora_A, U[:, :2] * S[:2] @ Vt[:2], atol=1e-5, rtol=1e-4
    )
    with torch.no_grad():
        for parameter in trainable_state(model).values():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    save(model, config, tmp_path / "a")
    theirs = PeftModel.from_pretrained(base, str(tmp_path / "a")).eval()
    torch.testing.assert_close(logits(theirs), logits(model), atol=1e-5, rtol=0)
    again = tiny("gpt_neox")
    load_adapter(again, tmp_path / "a")
    torch.testing.assert_close(logits(again), logits(model), atol=1e-5, rtol=0)


@pytest.mark.parametrize("targets", [["q", "c_attn"], ["attention", "v"]])
def test_a_projection_and_a_part_of_it_are_an_error(targets: list[str]) -> None:
    with pytest.raises(
        TargetError, match=r"h\.\{0-1\}\.attn\.c_attn\.. are parts of .* either a module or"
    ):
        inject(tiny("gpt2"), LoraConfig(target_modules=targets))


def test_a_projection_of_unknown_layout_is_an_error_that_suggests_the_fused_one() -> None:
    model = tiny("gpt2")
    model.config.model_type = "gpt_bigcode"
    with pytest.raises(
        TargetError, match=r"'q' is a part of .*h\.0\.attn\.c_attn.*unknown.*'c_attn'"
    ):
        inject(model, LoraConfig(target_modules=["q"]))
    inject(model, LoraConfig(target_modules=["c_attn"]))


def test_keys_and_values_of_a_cross_attention_are_an_error() -> None:
    """GPT-2's ``crossattention.c_attn`` contains only k and v."""
    model = tiny("gpt2", add_cross_attention=True)
    with pytest.raises(
        TargetError, match=r"'k' is a part of .*h\.0\.crossattention\.c_attn.*unknown"
    ):
        inject(model, LoraConfig(target_modules=["k"]))
    assert not adapted_modules(model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda parts: parts.pop("v"), "the parts q do not cover all of lora_B"),
        (lambda parts: parts["v"].update(r=3), "the parts q, v do not cover all of lora_B"),
        (lambda parts: parts["v"].update(start=16, stop=32), "do not cover all of lora_B"),
        (lambda parts: parts["v"].update(stop=60), r"lorakit.json: parts = .*stop <= period"),
        (
            lambda parts: [part.update(period=50) for part in parts.values()],
            "the part q, .* does not fit 48 rows",
        ),
        (lambda parts: parts["v"].update(period=50, stop=50), "parts = .*one period"),
        (
            lambda parts: parts["v"].pop("r"),
            r"lorakit.json: parts = .*allowed: for each module, q, k",
        ),
        (
            lambda parts: parts.update(v=3),
            r"lorakit.json: parts = .*allowed: for each module, q, k",
        ),
    ],
)
def test_parts_that_do_not_fit_the_tensors_are_an_error(
    change: Callable[[Any], Any], message: str, tmp_path: Path
) -> None:
    model = tiny("gpt2")
    save(model, adapt(model, ["q", "v"]), tmp_path / "a")
    sidecar = tmp_path / "a" / "lorakit.json"
    info = json.loads(sidecar.read_text())
    for parts in info["parts"].values():
        change(parts)
    sidecar.write_text(json.dumps(info))
    base = tiny("gpt2")
    with pytest.raises(AdapterError, match=message):
        load_adapter(base, tmp_path / "a")
    assert not adapted_modules(base), "the model is as it was"
