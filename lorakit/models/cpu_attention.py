"""Attention of half-precision models on the CPU, computed in float32.

torch's backward pass of attention in bfloat16 or float16 takes two to six times as long on a CPU
as the same pass in float32, which is also more precise.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

_NAME = "lorakit_float32"
#: With more tokens than this, bfloat16 is as fast.
_LONG_BFLOAT16 = 512


def float32_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:
    """softmax(Q K^T / sqrt(d)) V in float32, in the dtype of ``query``, which is (batch, heads,
    tokens, head_dim); the result is (batch, tokens, heads, head_dim). ``options`` are those of
    transformers' ``sdpa``."""
    dtype = query.dtype
    if dtype == torch.float16 or key.shape[2] <= _LONG_BFLOAT16:
        query, key, value = query.float(), key.float(), value.float()
        attention_mask = _in_float32(attention_mask)
        options = {name: _in_float32(option) for name, option in options.items()}
    out, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    return out.to(dtype), None


def _in_float32(value: Any) -> Any:
    is_float = isinstance(value, Tensor) and value.is_floating_point()
    return value.float() if is_float else value


def use_float32_attention(model: PreTrainedModel) -> bool:
    """Switch a half-precision model with ``sdpa`` to ``float32_attention``; return whether it was
    switched."""
    half = model.dtype in (torch.bfloat16, torch.float16)
    if not half or model.config._attn_implementation != "sdpa":
        return False
    ALL_ATTENTION_FUNCTIONS.register(_NAME, float32_attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(_NAME, sdpa_mask)
    try:
        model.set_attn_implementation(_NAME)
    except ValueError:  # the family has attention code of its own
        model.set_attn_implementation("sdpa")
        return False
    return True
