"""Injection: what is adapted, frozen, fully trained, and reported."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from lorakit.errors import TargetError
from lorakit.injection import inject, trainable_state
from lorakit.layers import adapter_layers
from lorakit.methods.lora import LoraConfig
from tests.families import ALL, ENCODERS, tiny, token_ids


class Block(nn.Module):
    """A plain module, not a transformers model."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(4, 4)
        self.out = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(torch.relu(self.query(x)))


def test_a_plain_module() -> None:
    block = Block()
    x = torch.randn(5, 4)
    before = block(x)
    report = inject(block, LoraConfig(r=2, target_modules=["q"], modules_to_save=["out"]))
    assert [(m.name, m.shape, m.r) for m in report.adapted_modules] == [("query", (4, 4), 2)]
    assert report.modules_to_save == ("out",)
    assert report.trainable_parameters == 2 * (4 + 4) + 3 * 4 + 3
    assert report.total_parameters == report.trainable_parameters + 4 * 4 + 4
    assert torch.equal(block(x), before)
    assert "lora on 1 module: query; fully trained: out; 31 of 51" in str(report)


def test_a_rank_that_no_update_can_have() -> None:
    block = Block()
    text = str(inject(block, LoraConfig(r=5, target_modules=["query", "out"])))
    warning = (
        "warning: the rank exceeds the smaller dimension of 2 modules (5 and 4 in query), which "
    )
    assert warning in text
    assert "warning" not in str(inject(Block(), LoraConfig(r=3, target_modules=["query", "out"])))


def _logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        out = model(token_ids())
    logits = out.logits if "logits" in out else out.last_hidden_state
    assert isinstance(logits, torch.Tensor)
    return logits


@pytest.mark.parametrize("family", ALL)
def test_the_output_is_unchanged_at_the_start(family: str) -> None:
    model = tiny(family)
    before = _logits(model)
    inject(model, LoraConfig(target_modules=["attention"]))
    torch.testing.assert_close(_logits(model), before, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("family", ["llama", "gpt2", *ENCODERS])
def test_only_adapters_and_head_get_gradients(family: str) -> None:
    model = tiny(family).train()
    inject(model, LoraConfig(target_modules=["attention"]))
    for layer in adapter_layers(model).values():
        nn.init.normal_(layer.lora_B, std=0.1)
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    model(token_ids()).logits.square().mean().backward()
    with_grad = {n for n, p in model.named_parameters() if p.grad is not None}
    assert with_grad == set(trainable_state(model))
    assert all("lora_" in n or "classifier" in n or "head" in n or "pooler" in n for n in with_grad)
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
    assert all(torch.equal(value, model.get_parameter(n)) for n, value in frozen.items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_trains_is_float32_over_a_half_precision_base(dtype: torch.dtype) -> None:
    for family in ("llama", "bert"):
        model = tiny(family).to(dtype)
        inject(model, LoraConfig(target_modules=["q", "v"]))
        assert {p.dtype for p in trainable_state(model).values()} == {torch.float32}
        assert {p.dtype for p in model.parameters() if not p.requires_grad} == {dtype}
        _logits(model)


def test_a_classification_head_takes_half_precision_and_gives_float32() -> None:
    model = tiny("roberta").to(torch.bfloat16)
    inject(model, LoraConfig(target_modules=["q", "v"]))
    assert _logits(model).dtype == torch.float32


def test_gradient_checkpointing_gives_gradients() -> None:
    model = tiny("llama").train()
    inject(model, LoraConfig(target_modules=["q", "v"]))
    for layer in adapter_layers(model).values():
        nn.init.normal_(layer.lora_B, std=0.1)

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        model(token_ids()).logits.square().mean().backward()
        return {n: p.grad.clone() for n, p in trainable_state(model).items()}

    plain = gradients()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for name, value in gradients().items():
        torch.testing.assert_close(value, plain[name])
        assert value.any(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tied_embeddings_that_train_whole_stay_one_and_keep_their_output_dtype(
    dtype: torch.dtype,
) -> None:
    model = tiny("llama", tie_word_embeddings=True).to(dtype)
    before = _logits(model)
    config = LoraConfig(target_modules=["q"], modules_to_save=["embed_tokens"])
    report = inject(model, config)
    assert report.modules_to_save == ("model.embed_tokens",)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.lm_head.weight.dtype == torch.float32
    after = _logits(model)
    assert after.dtype == dtype
    torch.testing.assert_close(
        after, before, atol=1e-2 if dtype is torch.bfloat16 else 0, rtol=1e-2
    )
    model.train()(token_ids()).logits.float().square().mean().backward()
    assert model.lm_head.weight.grad.any()


def test_a_target_that_shares_a_trained_weight_is_an_error() -> None:
    config = LoraConfig(target_modules=["lm_head"], modules_to_save=["embed_tokens"])
    with pytest.raises(
        TargetError, match=r"^adapter\.modules_to_save: lm_head: both a target and fully trained"
    ):
        inject(tiny("llama", tie_word_embeddings=True), config)
    inject(tiny("llama", tie_word_embeddings=False), config)


def test_shared_parameters_count_once() -> None:
    tied, parted = (tiny("llama", tie_word_embeddings=tie) for tie in (True, False))
    config = LoraConfig(target_modules=["q"])
    totals = [inject(model, config).total_parameters for model in (tied, parted)]
    assert totals[1] - totals[0] == 64 * 16


def test_a_second_injection_is_an_error() -> None:
    model = tiny("llama")
    inject(model, LoraConfig())
    with pytest.raises(TargetError, match="already has an adapter"):
        inject(model, LoraConfig())


def test_a_module_to_save_that_is_not_there_is_an_error() -> None:
    with pytest.raises(
        TargetError, match=r"'embed_token' matches no module; allowed: .*embed_tokens"
    ):
        inject(tiny("llama"), LoraConfig(modules_to_save=["embed_token"]))


def test_an_error_leaves_the_model_as_it_was() -> None:
    model = tiny("llama")
    with pytest.raises(TargetError):
        inject(model, LoraConfig(target_modules=["q", "nothing"]))
    assert not adapter_layers(model)
    assert all(p.requires_grad for p in model.parameters())


def test_the_same_seed_gives_the_same_adapter() -> None:
    states = []
    for seed in (1, 1, 2):
        model = tiny("llama")
        torch.manual_seed(seed)
        inject(model, LoraConfig())
        states.append(torch.cat([p.flatten() for p in trainable_state(model).values()]))
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])


@pytest.mark.parametrize("pattern", ["rank_pattern", "alpha_pattern"])
def test_a_pattern_that_matches_no_target_is_an_error(pattern: str) -> None:
    model = tiny("llama")
    config = LoraConfig(target_modules=["q", "v"], **{pattern: {"q_proj": 2, "k_proj": 2}})
    message = f"{pattern}: 'k_proj' matches no adapted module; allowed: q_proj, v_proj"
    with pytest.raises(TargetError, match=message):
        inject(model, config)
    assert not adapter_layers(model)


def test_the_report_names_and_counts_the_parts_of_a_fused_projection() -> None:
    model = tiny("phi3")  # 4 heads of queries, 2 of keys and values, of dimension 4
    report = inject(model, LoraConfig(r=2, target_modules=["v", "q"], layers=[1]))
    stem = "model.layers.1.self_attn.qkv_proj"
    assert [(m.name, m.shape, m.r) for m in report.adapted_modules] == [
        (f"{stem}.q", (16, 16), 2),
        (f"{stem}.v", (8, 16), 2),
    ]
    assert report.trainable_parameters == 2 * (16 + 16) + 2 * (8 + 16)
    assert set(trainable_state(model)) == {f"{stem}.{role}.lora_{f}" for role in "qv" for f in "AB"}


def test_a_part_of_a_projection_that_trains_whole_is_an_error() -> None:
    model = tiny("gpt2")
    with pytest.raises(TargetError, match=r"c_attn\.q: both a target and fully trained"):
        inject(model, LoraConfig(target_modules=["q"], modules_to_save=["c_attn"]))
    assert not adapter_layers(model)
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "bloom", "phi3", "modernbert"])
def test_parts_train_under_gradient_checkpointing_and_generate(family: str) -> None:
    model = tiny(family).train()
    inject(model, LoraConfig(target_modules=["q", "v"]))
    for layer in adapter_layers(model).values():
        nn.init.normal_(layer.lora_B, std=0.1)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model(token_ids()).logits.square().mean().backward()
    assert all(p.grad is not None and p.grad.any() for p in trainable_state(model).values())
    model.gradient_checkpointing_disable()
    if family != "modernbert":  # with its cache a model gets one row at a time
        prompt = token_ids(rows=1)
        keys = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        cached = model.eval().generate(prompt, **keys)
        assert torch.equal(cached, model.generate(prompt, use_cache=False, **keys))


def test_a_layer_that_cannot_be_saved_as_a_part_is_an_error(in_tmp: Path) -> None:
    """The method's wrap returns another layer than its Layer, which defines join and split."""
    (in_tmp / "own.py").write_text(
        """
from lorakit.layers import AdapterLayer
from lorakit.methods.lora import LoraConfig
from lorakit.methods.base import Method
from lorakit.methods.lora_layer import LoraLayer

class Offset(AdapterLayer):
    def delta_weight(self):
        return self.dense_weight() * 0.0

class Own(Method):
    Config = LoraConfig
    Layer = LoraLayer
    kinds = {"linear", "slice"}

    def wrap(self, module, config, name):
        return Offset(module)
"""
    )
    model = tiny("phi3")
    config = LoraConfig(method="./own.py:Own", target_modules=["q", "o"])
    with pytest.raises(TargetError, match=r"own\.py:Own cannot save .*q, a part .*split of Offset"):
        inject(model, config)
    assert not adapter_layers(model)
