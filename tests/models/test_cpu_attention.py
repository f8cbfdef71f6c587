"""Attention of half-precision models in float32: for every family, close to the float32 model."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lorakit.models.cpu_attention import float32_attention, use_float32_attention
from tests import families

IDS = families.token_ids(4, 12)
MASK = torch.ones_like(IDS)
MASK[1, 7:] = MASK[2, 3:] = 0


def outputs(model: PreTrainedModel) -> Tensor:
    """The logits or hidden states of the tokens that are not padding."""
    with torch.no_grad():
        out = model(input_ids=IDS, attention_mask=MASK)[0].float()
    return out[MASK.bool()] if out.dim() == 3 else out


def error(model: PreTrainedModel, expected: Tensor) -> float:
    return float((outputs(model) - expected).norm() / expected.norm())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", families.ALL)
def test_it_is_as_close_to_float32_as_before(family: str, dtype: torch.dtype) -> None:
    half = families.tiny(family).eval().to(dtype)
    expected = outputs(copy.deepcopy(half).float())
    before = error(half, expected)
    switched = use_float32_attention(half)
    assert switched == (half.config._attn_implementation == "lorakit_float32")
    assert error(half, expected) <= 1.1 * before + 1e-6


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "bert", "roberta", "modernbert"])
def test_the_usual_families_are_switched(family: str) -> None:
    assert use_float32_attention(families.tiny(family).to(torch.bfloat16))


def test_float32_models_are_not() -> None:
    model = families.tiny("llama")
    assert not use_float32_attention(model)
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    ("dtype", "tokens", "in_float32"),
    [(torch.bfloat16, 512, True), (torch.bfloat16, 513, False), (torch.float16, 513, True)],
)
def test_long_bfloat16_rows_stay_in_bfloat16(
    dtype: torch.dtype, tokens: int, in_float32: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[torch.dtype] = []
    attention = nn.functional.scaled_dot_product_attention

    def noted(query: Tensor, *arguments: Tensor, **options: object) -> Tensor:
        seen.append(query.dtype)
        return attention(query, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", noted)
    query = torch.randn(1, 2, tokens, 4, dtype=dtype)
    out, _ = float32_attention(nn.Module(), query, query, query, None, is_causal=True)
    assert out.dtype == dtype
    assert seen == [torch.float32 if in_float32 else dtype]
