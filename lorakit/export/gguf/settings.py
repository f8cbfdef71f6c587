"""A model's configuration as the keys that llama.cpp reads.

What llama.cpp would compute otherwise than transformers is refused, or said in a note where it
concerns long texts only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lorakit.errors import ModelError, shown
from lorakit.export.gguf.families import Family

if TYPE_CHECKING:
    from gguf import GGUFWriter

#: The types of RoPE scaling that llama.cpp computes as transformers does.
_ROPE_TYPES = ("default", "linear", "yarn", "llama3")


def add_settings(
    writer: GGUFWriter, family: Family, config: Mapping[str, Any], name: str
) -> list[str]:
    """Add the keys of the architecture, and return notes. ``config`` is that of the text model,
    with every default. Raises ModelError for a setting that llama.cpp does not support."""
    _check_activation(family, config, name)
    heads = config["num_attention_heads"]
    head_dim = head_size(config)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.get("num_key_value_heads") or heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    if family.arch == "llama":
        writer.add_rope_dimension_count(head_dim)
    _add_rope(writer, config, name)
    if family.full_every is None:
        return _window_notes(config)
    _add_gemma(writer, family, config, name, head_dim)
    return []


def rope_factors(config: Mapping[str, Any]) -> Tensor | None:
    """The divisors (head_dim / 2,) of RoPE's frequencies that ``rope_type: llama3`` has, which
    llama.cpp reads as a tensor; None for other types.

    A wavelength below ``original_max_position_embeddings / high_freq_factor`` is kept, one above
    ``original_max_position_embeddings / low_freq_factor`` is multiplied by ``factor``, and those
    between are interpolated.
    """
    rope = _rope(config)
    if rope.get("rope_type") != "llama3":
        return None
    head_dim = head_size(config)
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
    wavelengths = 2 * math.pi * float(rope["rope_theta"]) ** exponents
    low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
    turns = float(rope["original_max_position_embeddings"]) / wavelengths
    share = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 / ((1 - share) / float(rope["factor"]) + share)).float()


def head_size(config: Mapping[str, Any]) -> int:
    """The features of an attention head: ``head_dim``, or else hidden_size / heads."""
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def _rope(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """RoPE's parameters, in Gemma 3 those of the layers with full attention."""
    rope = config.get("rope_parameters") or {}
    found: Mapping[str, Any] = rope.get("full_attention", rope)
    return found


def _check_activation(family: Family, config: Mapping[str, Any], name: str) -> None:
    key = "hidden_activation" if config.get("hidden_activation") else "hidden_act"
    if config.get(key, family.activation) != family.activation:
        raise ModelError(
            f"{name}: {key} = {shown(config[key])}: llama.cpp does not support it in "
            f"{family.arch}; allowed: {family.activation}"
        )


def _add_rope(writer: GGUFWriter, config: Mapping[str, Any], name: str) -> None:
    rope = _rope(config)
    kind = rope.get("rope_type", "default")
    if kind not in _ROPE_TYPES:
        raise ModelError(
            f"{name}: rope_type = {shown(kind)}: cannot be written as GGUF; allowed: "
            + ", ".join(_ROPE_TYPES)
        )
    if (part := rope.get("partial_rotary_factor", 1.0)) != 1.0:
        raise ModelError(
            f"{name}: partial_rotary_factor = {part}: cannot be written as GGUF; allowed: 1.0"
        )
    writer.add_rope_freq_base(float(rope.get("rope_theta", 10000.0)))
    local = (config.get("rope_parameters") or {}).get("sliding_attention")
    if local and "rope_theta" in local:
        writer.add_rope_freq_base_swa(float(local["rope_theta"]))
    if kind in ("linear", "yarn"):
        from gguf import RopeScalingType

        writer.add_rope_scaling_type(RopeScalingType(kind))
        writer.add_rope_scaling_factor(float(rope["factor"]))
    if kind == "yarn":
        _add_yarn(writer, rope, config)


def _add_yarn(writer: GGUFWriter, rope: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    length = rope.get("original_max_position_embeddings") or config["max_position_embeddings"]
    writer.add_rope_scaling_orig_ctx_len(int(length))
    if (factor := rope.get("attention_factor")) is not None:
        writer.add_rope_scaling_yarn_attn_factor(float(factor))
    if (fast := rope.get("beta_fast")) is not None:
        writer.add_rope_scaling_yarn_beta_fast(float(fast))
    if (slow := rope.get("beta_slow")) is not None:
        writer.add_rope_scaling_yarn_beta_slow(float(slow))


def _window_notes(config: Mapping[str, Any]) -> list[str]:
    window = config.get("sliding_window")
    if not window or config.get("use_sliding_window") is False:
        return []
    return [
        f"sliding_window = {window}: llama.cpp attends to all tokens of this architecture, so "
        f"results differ for texts of more than {window:,} tokens"
    ]


def _add_gemma(
    writer: GGUFWriter, family: Family, config: Mapping[str, Any], name: str, head_dim: int
) -> None:
    layers, period = int(config["num_hidden_layers"]), int(family.full_every or 1)
    kinds = [
        "full_attention" if n % period == 0 else "sliding_attention" for n in range(1, layers + 1)
    ]
    if list(config.get("layer_types") or kinds) != kinds:
        raise ModelError(
            f"{name}: layer_types: llama.cpp supports full attention in each {period}th layer of "
            f"{family.arch} only"
        )
    scalar = head_dim
    if layers == family.largest_layers:
        scalar = int(config["hidden_size"]) // int(config["num_attention_heads"])
    if float(config["query_pre_attn_scalar"]) != scalar:
        raise ModelError(
            f"{name}: query_pre_attn_scalar = {config['query_pre_attn_scalar']}: llama.cpp does "
            f"not support it in {family.arch} of this size; allowed: {scalar}"
        )
    if config.get("sliding_window"):
        writer.add_sliding_window(config["sliding_window"])
    if (cap := config.get("attn_logit_softcapping")) is not None:
        if family.arch == "gemma3":
            raise ModelError(
                f"{name}: attn_logit_softcapping = {cap}: llama.cpp does not support it in gemma3; "
                "allowed: null"
            )
        writer.add_attn_logit_softcapping(float(cap))
    elif family.arch == "gemma2":
        raise ModelError(
            f"{name}: attn_logit_softcapping = null: llama.cpp does not support it in gemma2; "
            "allowed: a number"
        )
    if (cap := config.get("final_logit_softcapping")) is not None:
        writer.add_final_logit_softcapping(float(cap))
