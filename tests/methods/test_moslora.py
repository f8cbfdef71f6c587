"""The MoSLoRA layer compared with its formula and with the plain LoRA that it is saved as."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from pydantic import ValidationError
from torch import nn
from transformers.pytorch_utils import Conv1D

from lorakit.adapters.peft.place import load_adapter
from lorakit.adapters.peft.write import save_adapter
from lorakit.injection import inject, trainable_state
from lorakit.layers import AdapterLayer
from lorakit.methods.lora_layer import LoraLayer
from lorakit.methods.moslora import METHOD, MosLoraConfig
from tests.families import tiny, token_ids

MODULES = {
    "linear": lambda: nn.Linear(6, 10),
    "conv1d": lambda: Conv1D(10, 6),
    "embedding": lambda: nn.Embedding(6, 10),
}
every_module = pytest.mark.parametrize("kind", MODULES)


def filled(kind: str, **config: Any) -> AdapterLayer:
    layer = METHOD.wrap(MODULES[kind]().requires_grad_(False), MosLoraConfig(**config), "layer")
    for parameter in (layer.lora_A, layer.lora_B, layer.lora_mixer):
        nn.init.normal_(parameter)
    return layer


def inputs(layer: AdapterLayer) -> tuple[torch.Tensor, torch.Tensor]:
    """Return an input of the layer, and the same as rows x of y = W x."""
    if layer.kind == "embedding":
        ids = torch.tensor([[1, 5, 3], [0, 1, 1]])
        return ids, nn.functional.one_hot(ids, 6).float()
    x = torch.randn(2, 3, 6)
    return x, x


def reference(layer: AdapterLayer, x: torch.Tensor) -> torch.Tensor:
    W = layer.dense_weight()
    y = x @ W.t() + (0 if layer.bias is None else layer.bias)
    A, M, B = layer.lora_A, layer.lora_mixer, layer.lora_B
    return y + layer.scaling * torch.einsum("or,rs,si,...i->...o", B, M, A, x)


@every_module
@pytest.mark.parametrize("training", [True, False])
def test_the_layer_is_the_formula(kind: str, training: bool) -> None:
    layer = filled(kind, r=3, lora_alpha=5).train(training)
    given, x = inputs(layer)
    W, A, M, B, x_ = (
        t.detach().double().numpy()
        for t in (
            layer.dense_weight(),
            layer.lora_A, layer.lora_mixer, layer.lora_B, x,
        )
    )  # fmt: skip
    want = x_ @ (W + 5 / 3 * B @ M @ A).T
    want += 0 if layer.bias is None else layer.bias.double().numpy()
    np.testing.assert_allclose(layer(given).detach().numpy(), want, atol=1e-4)


@every_module
def test_the_gradients_equal_autograds(kind: str) -> None:
    layer = filled(kind, r=3)
    given, x = inputs(layer)
    into = [layer.lora_A, layer.lora_mixer, layer.lora_B]
    if kind != "embedding":
        into.append(given.requires_grad_())
    got = torch.autograd.grad(layer(given).square().sum(), into)
    want = torch.autograd.grad(reference(layer, x).square().sum(), into)
    for mine, other in zip(got, want, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-3, rtol=1e-4)


@every_module
@pytest.mark.parametrize("init", ["default", "b_gaussian"])
def test_the_mixer_starts_orthogonal_and_the_output_unchanged(kind: str, init: str) -> None:
    module = MODULES[kind]()
    layer = METHOD.wrap(module, MosLoraConfig(r=5, init=init), "layer")
    M = layer.lora_mixer.detach()
    torch.testing.assert_close(M @ M.t(), torch.eye(5), atol=1e-5, rtol=0)
    assert (M - torch.eye(5)).abs().max() > 0.1
    given, _ = inputs(layer)
    assert torch.equal(layer(given), module(given))
    assert layer.lora_A.any() != layer.lora_B.any(), "one of them is zero"


@pytest.mark.parametrize("init", ["pissa", "orthogonal"])
def test_starts_that_the_mixer_would_change_are_refused(init: str) -> None:
    with pytest.raises(ValidationError, match="'default' or 'b_gaussian'"):
        MosLoraConfig(init=init)


def test_dropout_is_on_the_adapter_path_only() -> None:
    layer = filled("linear", r=3, lora_dropout=0.5).train()
    x = torch.randn(64, 6)
    with torch.no_grad():
        torch.manual_seed(0)
        got = layer(x)
        torch.manual_seed(0)
        dropped = nn.functional.dropout(x, 0.5)
        want = layer.base_layer(x) + reference(layer, dropped) - layer.base_layer(dropped)
        assert torch.equal(layer.eval()(x), layer(x))
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


@every_module
def test_in_evaluation_it_is_the_saved_lora_bit_for_bit_over_bfloat16(kind: str) -> None:
    layer = filled(kind, r=3).eval()
    layer.base_layer.to(torch.bfloat16)
    plain = LoraLayer(layer.base_layer, r=3, scaling=layer.scaling)
    plain.set_factors((layer.lora_mixer @ layer.lora_A).detach(), layer.lora_B.detach())
    given, _ = inputs(layer)
    given = given if kind == "embedding" else given.bfloat16()
    with torch.no_grad():
        assert torch.equal(layer(given), plain(given))


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "roles": ("llama", {}),
    "ranks": (
        "llama",
        {"rank_pattern": {"0.self_attn.q_proj": 2}, "alpha_pattern": {"v_proj": 3}, "use_rslora": True},
    ),
    "all": ("llama", {"target_modules": ["all-linear", "embed_tokens"]}),
    "Conv1D": ("gpt2", {"target_modules": ["c_attn", "c_proj"]}),
    "parts": ("gpt2", {"target_modules": ["q", "v"]}),
    "parts that interleave": ("bloom", {"target_modules": ["k", "v"]}),
    "scaled embeddings": ("gemma3", {"target_modules": ["embed_tokens"]}),
    "a classifier with biases": ("bert", {"bias": "lora_only"}),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES)
def test_it_is_saved_as_a_lora_that_peft_and_lorakit_load(case: str, tmp_path: Path) -> None:
    family, keys = CASES[case]
    model, config = tiny(family), MosLoraConfig(**{"r": 4, "target_modules": ["q", "v"], **keys})
    inject(model, config)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in trainable_state(model).values():
            parameter.add_(torch.randn_like(parameter) * 0.1)
        ours = model(input_ids=token_ids()).logits
        before = tiny(family)(input_ids=token_ids()).logits
    task = "SEQ_CLS" if family == "bert" else "CAUSAL_LM"
    save_adapter(tmp_path / "a", model, config, base_model_name_or_path="b", task_type=task)
    theirs = PeftModel.from_pretrained(tiny(family), str(tmp_path / "a")).eval()
    again = tiny(family)
    assert load_adapter(again, tmp_path / "a").method == "lora"
    assert (ours - before).abs().max() > 1e-3, "the adapter does something"
    with torch.no_grad():
        for other in (theirs, again):
            got = other(input_ids=token_ids()).logits
            torch.testing.assert_close(got, ours, atol=1e-5, rtol=0)


def test_over_a_bfloat16_base() -> None:
    module = nn.Linear(6, 10, dtype=torch.bfloat16)
    layer = METHOD.wrap(module, MosLoraConfig(r=2), "layer")
    nn.init.normal_(layer.lora_B)
    out = layer(torch.randn(3, 6, dtype=torch.bfloat16))
    assert out.dtype == torch.bfloat16
    out.float().square().sum().backward()
    for parameter in (layer.lora_A, layer.lora_mixer, layer.lora_B):
        assert parameter.dtype == parameter.grad.dtype == torch.float32
        assert parameter.grad.any()
