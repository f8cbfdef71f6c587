"""Merging and unmerging: effects of eval(), train(), state dicts, casts and copies on W."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

import lorakit
from tests.nn.cases import CASES, Case, randomized

each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


@each_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_train_restores_w_bit_for_bit(case: Case, dtype: torch.dtype) -> None:
    layer = case.build(dtype=dtype)
    parameter, base = layer.weight, layer.weight.clone()
    for _ in range(3):
        layer.eval()
        assert not torch.equal(layer.weight, base)
        layer.train()
        assert layer.weight is parameter
        assert torch.equal(layer.weight, base)
    assert list(layer.state_dict())[-2:] == ["lora_A", "lora_B"]


def test_eval_again_takes_new_factors() -> None:
    layer = CASES["linear"].build().eval()
    before = layer.weight.clone()
    randomized(layer)
    layer.eval()
    assert not torch.equal(layer.weight, before)
    unmerged = CASES["linear"].build(merge_weights=False)
    unmerged.load_state_dict(layer.state_dict())
    torch.testing.assert_close(layer.weight, unmerged.merged_weight())


@each_case
def test_a_state_dict_contains_w_and_the_factors_in_either_mode(case: Case) -> None:
    layer = case.build()
    trained = {k: v.clone() for k, v in layer.state_dict().items()}
    merged = layer.eval().state_dict()
    assert list(merged) == list(trained)
    assert all(torch.equal(merged[name], trained[name]) for name in trained)
    assert layer.state_dict(keep_vars=True)["weight"] is layer.train().weight


@each_case
@pytest.mark.parametrize("saved_in", ["train", "eval"])
@pytest.mark.parametrize("loaded_in", ["train", "eval"])
def test_saved_in_one_mode_and_loaded_in_another(case: Case, saved_in: str, loaded_in: str) -> None:
    source, target = case.build(), randomized(case.make(r=2, lora_alpha=3))
    target.train(loaded_in == "train")
    target.load_state_dict(source.train(saved_in == "train").state_dict())
    assert target.merged == (loaded_in == "eval")
    assert torch.equal(target.eval()(case.x()), source.eval()(case.x()))
    assert torch.equal(target.train().weight, source.train().weight)


def test_a_pretrained_checkpoint_loads_into_a_merged_model() -> None:
    layer, plain = CASES["linear"].build().eval(), nn.Linear(6, 10)
    layer.load_state_dict(plain.state_dict(), strict=False)
    assert layer.merged
    want = plain.weight + 1.5 * layer.lora_B @ layer.lora_A
    torch.testing.assert_close(layer.weight.detach(), want.detach())
    assert torch.equal(layer.train().weight, plain.weight)
    layer.eval().load_state_dict(nn.Linear(6, 10).state_dict(), strict=False, assign=True)
    assert not torch.equal(layer.train().weight, plain.weight)


@each_case
def test_casts_and_copies_of_a_merged_layer_keep_w(case: Case) -> None:
    layer = case.build()
    base = layer.weight.clone()
    twin = copy.deepcopy(layer.eval())
    assert twin.merged and torch.equal(twin(case.x()), layer(case.x()))
    assert torch.equal(twin.train().weight, base)
    assert torch.equal(layer.double().train().weight, base.double())
    assert torch.equal(layer.eval().to(torch.bfloat16).train().weight, base.bfloat16())
    assert layer.eval().to("meta").weight.is_meta


def test_a_tied_module_never_sees_the_merged_values() -> None:
    embedding = CASES["embedding"].build()
    head = nn.Linear(6, 10, bias=False)
    head.weight = embedding.weight
    twin = lorakit.Linear(6, 10, r=2, bias=False)
    twin.weight = embedding.weight
    model = randomized(nn.ModuleList([embedding, head, twin]))
    base = head.weight.clone()
    model.eval()
    assert torch.equal(head.weight, base)
    torch.testing.assert_close(twin.weight - base, twin.delta_weight(), rtol=0, atol=1e-6)
    model.train()
    assert embedding.weight is head.weight is twin.weight
    assert torch.equal(head.weight, base)


def test_who_reads_the_weight_directly_gets_the_merged_one() -> None:
    """In eval mode torch's encoder layer reads linear1.weight without calling linear1."""
    encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    encoder.linear1 = lorakit.Linear(8, 16, r=2)
    x = torch.randn(2, 3, 8)
    with torch.no_grad():
        before = encoder.eval()(x)
        encoder.train()
        randomized(encoder).eval()
        fast = encoder(x)
    assert (fast - before).abs().max() > 1e-3
    slow = encoder(x)  # with gradients on, torch calls the modules
    torch.testing.assert_close(fast, slow.detach(), rtol=1e-5, atol=1e-5)


def test_whether_w_trains_outlives_a_merge() -> None:
    layer = CASES["linear"].build()
    layer.weight.requires_grad_(True)
    layer.eval()
    lorakit.mark_only_lora_as_trainable(layer)
    assert not layer.train().weight.requires_grad


def test_a_merged_model_survives_saving_and_loading(tmp_path: Path) -> None:
    layer = CASES["merged-qv"].build()
    base = layer.weight.clone()
    torch.save(layer.eval(), tmp_path / "model.pt")
    read = torch.load(tmp_path / "model.pt", weights_only=False)
    assert torch.equal(read.weight, layer.weight)
    assert torch.equal(read.train().weight, base)


def test_names_of_loralib_0_1_2_are_read_for_a_convolution() -> None:
    source = CASES["conv"].build()
    theirs = {
        f"0.conv.{k}" if k in ("weight", "bias") else f"0.{k}": v
        for k, v in source.state_dict().items()
    }
    model = nn.Sequential(lorakit.Conv2d(4, 6, 3, r=2, lora_alpha=3, padding=1))
    model.load_state_dict(theirs)
    assert len(theirs) == 4
    assert torch.equal(model(CASES["conv"].x()), source(CASES["conv"].x()))
