"""Attention of half-precision models on the CPU: for every family, close to the float32 model."""

from __future__ import annotations

import copy
import importlib
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import FalconConfig, FalconForCausalLM, PreTrainedModel

from lorakit.models.cpu_attention import cpu_attention, use_cpu_attention
from tests import families

IDS = families.token_ids(4, 12)
MASK = torch.ones_like(IDS)
MASK[1, 7:] = MASK[2, 3:] = 0


def outputs(model: PreTrainedModel) -> Tensor:
    """The logits or hidden states of the tokens that are not padding."""
    out: Tensor = model(input_ids=IDS, attention_mask=MASK)[0].detach().float()
    return out[MASK.bool()] if out.dim() == 3 else out


def error(model: PreTrainedModel, expected: Tensor) -> float:
    return float((outputs(model) - expected).norm() / expected.norm())


def set_amx(there: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the time of products depends on AMX."""
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: there)


@pytest.mark.parametrize(
    ("dtype", "amx"), [(torch.bfloat16, True), (torch.bfloat16, False), (torch.float16, True)]
)
@pytest.mark.parametrize("family", families.ALL)
def test_it_is_as_close_to_float32_as_before(
    family: str, dtype: torch.dtype, amx: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_amx(amx, monkeypatch)
    half = families.tiny(family).eval().to(dtype)
    expected = outputs(copy.deepcopy(half).float())
    before = error(half, expected)
    switched = use_cpu_attention(half)
    assert switched == (half.config._attn_implementation == "lorakit_cpu")
    assert error(half, expected) <= (1.25 if amx else 1.1) * before + 1e-6


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "bert", "roberta", "modernbert"])
def test_the_usual_families_are_switched(family: str) -> None:
    assert use_cpu_attention(families.tiny(family).to(torch.bfloat16))


def test_a_family_with_attention_of_its_own_is_not() -> None:
    config = FalconConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
    )  # fmt: skip
    model = FalconForCausalLM(config).to(torch.bfloat16)
    assert not use_cpu_attention(model)
    assert model.config._attn_implementation == "sdpa"


def test_a_family_that_masks_for_known_names_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sparse_llama.py").write_text(
        "from transformers import LlamaForCausalLM\n"
        "class SparseLlama(LlamaForCausalLM):\n"
        "    def mask(self):\n"
        '        if self.config._attn_implementation in ("eager", "sdpa"):\n'
        "            return None\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    sparse = importlib.import_module("sparse_llama").SparseLlama
    llama = families.tiny("llama")
    assert use_cpu_attention(copy.deepcopy(llama).to(torch.bfloat16))
    model = sparse(llama.config).to(torch.bfloat16)
    assert not use_cpu_attention(model)
    assert model.config._attn_implementation == "sdpa"


def test_float32_models_are_not() -> None:
    model = families.tiny("llama")
    assert not use_cpu_attention(model)
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    ("dtype", "tokens", "in_float32"),
    [(torch.bfloat16, 512, True), (torch.bfloat16, 513, False), (torch.float16, 513, True)],
)
def test_long_bfloat16_rows_stay_in_bfloat16(
    dtype: torch.dtype, tokens: int, in_float32: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_amx(False, monkeypatch)
    seen: list[torch.dtype] = []
    attention = nn.functional.scaled_dot_product_attention

    def noted(query: Tensor, *arguments: Tensor, **options: object) -> Tensor:
        seen.append(query.dtype)
        return attention(query, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", noted)
    query = torch.randn(1, 2, tokens, 4, dtype=dtype)
    out, _ = cpu_attention(nn.Module(), query, query, query, None, is_causal=True)
    assert out.dtype == dtype
    assert seen == [torch.float32 if in_float32 else dtype]


@pytest.mark.parametrize("mask", ["none", "causal", "boolean", "float"])
def test_products_are_as_close_to_float64_as_torch(
    mask: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_amx(True, monkeypatch)
    torch.manual_seed(0)
    batch, tokens, dim = 3, 40, 24
    query, key, value = (
        torch.randn(batch, heads, tokens, dim, dtype=torch.bfloat16, requires_grad=True)
        for heads in (6, 2, 2)
    )
    seen = torch.ones(tokens, tokens, dtype=torch.bool)
    if mask != "none":
        seen = seen.tril()
    seen = seen.expand(batch, 1, tokens, tokens).clone()
    if mask in ("boolean", "float"):
        seen[1, ..., 30:] = False
    given = {"boolean": seen, "float": torch.zeros(seen.shape).masked_fill(~seen, -1e30)}.get(mask)
    module = nn.Module()
    module.num_key_value_groups = 3  # type: ignore[assignment]
    d_out = torch.randn(batch, tokens, 6, dim, dtype=torch.bfloat16)

    def errors(out: Tensor, inputs: list[Tensor]) -> list[float]:
        found = [out, *torch.autograd.grad(out, inputs, d_out.to(out.dtype))]
        return [
            float(((a.double() - b).norm() / b.norm()).detach())
            for a, b in zip(found, exact, strict=True)
        ]

    def torchs(inputs: list[Tensor]) -> Tensor:
        q, k, v = inputs[0], *(each.repeat_interleave(3, dim=1) for each in inputs[1:])
        return nn.functional.scaled_dot_product_attention(q, k, v, seen).transpose(1, 2)

    inputs = [query, key, value]
    doubles = [each.detach().double().requires_grad_() for each in inputs]
    out = torchs(doubles)
    exact = [out, *torch.autograd.grad(out, doubles, d_out.double())]
    theirs = errors(torchs(inputs), inputs)
    out, _ = cpu_attention(module, *inputs, given, is_causal=mask != "none")
    assert out.dtype == torch.bfloat16
    assert out.is_contiguous()
    ours = errors(out, inputs)
    assert max(ours) < 0.004
    assert all(one < 1.5 * other for one, other in zip(ours, theirs, strict=True)), (ours, theirs)


def attended(query: Tensor, mask: Tensor | None = None) -> Tensor:
    """With a key and a value like ``query``, which share no memory with it."""
    out, _ = cpu_attention(nn.Module(), query, query.clone(), query.clone(), mask)
    return out


def test_a_row_that_sees_no_token_stays_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    set_amx(True, monkeypatch)
    query = torch.randn(2, 2, 8, 4, dtype=torch.bfloat16, requires_grad=True)
    mask = torch.full((2, 1, 8, 8), -torch.inf, dtype=torch.bfloat16).triu(1)
    mask[1, :, :, :3] = -torch.inf
    out = attended(query, mask)
    assert out.isfinite().all()
    out.sum().backward()
    assert query.grad is not None
    assert query.grad.isfinite().all()


def test_a_second_derivative_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    set_amx(True, monkeypatch)
    query = torch.randn(2, 2, 8, 4, dtype=torch.bfloat16, requires_grad=True)
    (first,) = torch.autograd.grad(attended(query).square().sum(), query, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


@pytest.mark.parametrize(
    ("trains", "tokens", "products"), [(True, 256, True), (True, 257, False), (False, 8, False)]
)
def test_products_are_for_short_rows_with_gradients(
    trains: bool, tokens: int, products: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_amx(True, monkeypatch)
    query = torch.randn(1, 2, tokens, 4, dtype=torch.bfloat16, requires_grad=trains)
    found: set[str] = set()
    nodes = [attended(query).grad_fn]
    while nodes:
        if (node := nodes.pop()) is not None:
            found.add(type(node).__name__)
            nodes += [before for before, _ in node.next_functions]
    assert any("Products" in name for name in found) == products


def test_a_mask_that_is_trained_gets_its_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    set_amx(True, monkeypatch)
    query = torch.randn(2, 2, 8, 4, dtype=torch.bfloat16)
    mask = torch.zeros(2, 1, 8, 8, dtype=torch.bfloat16, requires_grad=True)
    attended(query, mask).square().sum().backward()
    assert mask.grad is not None


def test_dropout_is_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    set_amx(True, monkeypatch)
    query = torch.randn(2, 2, 8, 4, dtype=torch.bfloat16, requires_grad=True)
    torch.manual_seed(0)
    dropped, _ = cpu_attention(nn.Module(), query, query, query, None, dropout=0.5)
    whole, _ = cpu_attention(nn.Module(), query, query, query, None)
    assert not torch.allclose(dropped, whole, atol=0.1)
