"""Where q, k and v lie in a projection that holds all three."""

from __future__ import annotations

from typing import Any

from torch import nn

from lorakit.layers import Rows, as_matrix

#: Projections that hold q, k and v in one matrix (GPT-2, GPT-NeoX and BLOOM, Phi-3, ModernBERT).
FUSED = r"(?:^|\.)(?:c_attn|query_key_value|qkv_proj|Wqkv)$"


def fused_rows(module: nn.Module, model: nn.Module) -> dict[str, Rows]:
    """Role -> its rows in ``module``, a fused projection of ``model``; empty if the model's
    layout is not known, or the matrix is not of the size that it should have."""
    config: Any = getattr(model, "config", None)
    get_text_config = getattr(config, "get_text_config", None)
    config = get_text_config() if get_text_config else config
    sizes = _LAYOUTS.get(getattr(config, "model_type", ""), _unknown)(config)
    out_features = as_matrix(module, module.weight).shape[0]  # type: ignore[arg-type]
    period = sum(sizes)
    if not sizes or out_features % period or (out_features != period and len(set(sizes)) > 1):
        return {}
    starts = (0, sizes[0], sizes[0] + sizes[1])
    return {
        role: Rows(start, start + size, period)
        for role, start, size in zip("qkv", starts, sizes, strict=True)
    }


def _thirds(config: Any) -> tuple[int, ...]:
    """All of q, then all of k, then all of v."""
    return (config.hidden_size,) * 3


def _by_head(config: Any) -> tuple[int, ...]:
    """A head's q, k and v, then the next head's."""
    return (config.hidden_size // config.num_attention_heads,) * 3


def _grouped_queries(config: Any) -> tuple[int, ...]:
    """All of q, then of k and v, which have fewer heads."""
    head_dim = getattr(config, "head_dim", None)
    head_dim = head_dim or config.hidden_size // config.num_attention_heads
    key_heads = config.num_key_value_heads
    return (config.num_attention_heads * head_dim, key_heads * head_dim, key_heads * head_dim)


def _unknown(_config: Any) -> tuple[int, ...]:
    return ()


#: The sizes of q, k and v in a period, by ``model_type``.
_LAYOUTS = {
    "gpt2": _thirds,
    "modernbert": _thirds,
    "gpt_neox": _by_head,
    "bloom": _by_head,
    "phi3": _grouped_queries,
}
