"""Which parameters are trained and saved, for lorakit's layers and for models adapted by inject."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorakit
from lorakit.errors import UserError
from tests.families import tiny
from tests.nn.cases import randomized


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        lorakit.Linear(4, 8, r=2), nn.LayerNorm(8), nn.Linear(8, 8), lorakit.Linear(8, 3)
    )


WANTED = {
    "none": {"0.lora_A", "0.lora_B"},
    "lora_only": {"0.lora_A", "0.lora_B", "0.bias"},
    "all": {"0.lora_A", "0.lora_B", "0.bias", "1.bias", "2.bias", "3.bias"},
}


@pytest.mark.parametrize("bias", WANTED)
def test_exactly_the_trained_parameters_are_saved(bias: Any) -> None:
    model = network()
    model[0].lora_A.requires_grad_(False)
    lorakit.mark_only_lora_as_trainable(model, bias=bias)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == WANTED[bias]
    saved = lorakit.lora_state_dict(model, bias=bias)
    assert set(saved) == WANTED[bias]
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in saved.items())


@pytest.mark.parametrize("bias", WANTED)
def test_on_a_model_adapted_by_inject(bias: Any) -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 3))
    lorakit.inject(model, lorakit.LoraConfig(r=2, target_modules=["0"]))
    lorakit.mark_only_lora_as_trainable(model, bias=bias)
    want = {name.replace("0.bias", "0.base_layer.bias") for name in WANTED[bias]}
    assert {n for n, p in model.named_parameters() if p.requires_grad} == want
    assert set(lorakit.lora_state_dict(model, bias=bias)) == want


def test_the_bias_of_a_fused_projection_is_beside_its_parts() -> None:
    model = tiny("gpt2")
    lorakit.inject(model, lorakit.LoraConfig(r=2, target_modules=["q"], layers=[0]))
    saved = lorakit.lora_state_dict(model, bias="lora_only")
    assert sum("lora_" in name for name in saved) == 2
    assert [n for n in saved if "lora_" not in n] == ["transformer.h.0.attn.c_attn.base_layer.bias"]


def test_the_default_is_none_and_others_are_refused() -> None:
    model = network()
    lorakit.mark_only_lora_as_trainable(model)
    assert set(lorakit.lora_state_dict(model)) == WANTED["none"]
    for function in (lorakit.mark_only_lora_as_trainable, lorakit.lora_state_dict):
        with pytest.raises(UserError, match='bias = "some": allowed: none, all, lora_only'):
            function(model, bias="some")  # type: ignore[operator]
    assert {n for n, p in model.named_parameters() if p.requires_grad} == WANTED["none"]


def test_a_tied_bias_trains_if_one_of_its_names_is_chosen() -> None:
    model = nn.Sequential(nn.Linear(8, 8), lorakit.Linear(8, 8, r=2))
    model[0].bias = model[1].bias
    lorakit.mark_only_lora_as_trainable(model, bias="lora_only")
    assert model[1].bias.requires_grad
    assert set(lorakit.lora_state_dict(model, bias="lora_only")) == {
        "1.lora_A",
        "1.lora_B",
        "1.bias",
    }


class Classifier(nn.Module):
    """A classifier with three labels, built from the layers of the library ``lora``."""

    def __init__(self, lora: Any, **r: int) -> None:
        super().__init__()
        self.tokens = lora.Embedding(20, 12, **r)
        some = {"enable_lora": [True, False, True]} if r else {}
        self.qkv = (lora.MergedLinear if r else lora.Linear)(12, 36, **r, **some)
        self.norm = nn.LayerNorm(12)
        self.out = lora.Linear(12, 3, **r)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids)
        q, k, v = self.qkv(x)[:, None].chunk(3, -1)
        y = nn.functional.scaled_dot_product_attention(q, k, v)[:, 0]
        return self.out(self.norm(x + y).mean(1))


def test_the_three_snippets(in_tmp: Path) -> None:
    """The documented usage of loralib, with ``import lorakit as lora``: build, train, save,
    load."""
    import lorakit as lora

    in_features, out_features = 4, 6
    layer = lora.Linear(in_features, out_features, r=16)
    assert layer(torch.randn(2, in_features)).shape == (2, out_features)

    torch.manual_seed(0)
    pretrained = Classifier(nn)
    torch.save(pretrained.state_dict(), "ckpt_pretrained.pt")

    model = Classifier(lora, r=4)
    model.load_state_dict(torch.load("ckpt_pretrained.pt"), strict=False)
    lora.mark_only_lora_as_trainable(model)
    ids = torch.randint(20, (16, 7))
    labels = ids[:, 0] % 3
    assert torch.equal(model(ids), pretrained(ids))
    optimizer = torch.optim.Adam((p for p in model.parameters() if p.requires_grad), lr=0.02)
    losses = []
    for _ in range(60):
        loss = nn.functional.cross_entropy(model.train()(ids), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        model.eval()  # merge and unmerge each step, as a run that evaluates does
    assert losses[-1] < 0.3 * losses[0]

    checkpoint_path = "ckpt_lora.pt"
    torch.save(lora.lora_state_dict(model), checkpoint_path)
    assert set(torch.load(checkpoint_path)) == {
        f"{n}.lora_{f}" for n in ("tokens", "qkv", "out") for f in "AB"
    }

    for mode in (True, False):
        again = randomized(Classifier(lora, r=4)).train(mode)
        # Load the pretrained checkpoint first
        again.load_state_dict(torch.load("ckpt_pretrained.pt"), strict=False)
        # Then load the LoRA checkpoint
        again.load_state_dict(torch.load("ckpt_lora.pt"), strict=False)
        assert torch.equal(again.eval()(ids), model.eval()(ids))
        frozen = {k: v for k, v in again.train().named_parameters() if "lora_" not in k}
        assert all(torch.equal(v, pretrained.state_dict()[k]) for k, v in frozen.items())
    assert again.norm.weight.requires_grad  # as in loralib, only marking freezes other modules


def test_names_at_the_top_are_those_of_the_package() -> None:
    for name in lorakit.nn.__all__:
        assert getattr(lorakit, name) is getattr(lorakit.nn, name)
