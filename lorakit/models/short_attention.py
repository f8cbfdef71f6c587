"""Attention of short rows without cuDNN, which takes long to start."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

#: Longer rows, whose attention takes more of a pass, gain more from cuDNN than its plans take.
SHORT_TOKENS = 128


def use_short_attention(model: PreTrainedModel) -> None:
    """Keep cuDNN out of the model's passes over rows of up to ``SHORT_TOKENS`` tokens.

    cuDNN plans each new shape of a batch, which takes 0.1 to 1 s; other kernels need no plan, and
    on rows this short take between 0.6 and 1.6 times as long. For layers that are neither compiled,
    since code is compiled once for all lengths, nor recomputed, which is after the model's call.
    """
    before: list[bool] = []

    def enter(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        before.append(torch.backends.cuda.cudnn_sdp_enabled())
        if _is_short(args, kwargs):
            torch.backends.cuda.enable_cudnn_sdp(False)

    def leave(_module: Any, _args: tuple[Any, ...], _output: Any) -> None:
        torch.backends.cuda.enable_cudnn_sdp(before.pop())

    model.base_model.register_forward_pre_hook(enter, with_kwargs=True)
    model.base_model.register_forward_hook(leave, always_call=True)


def _is_short(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Not while text is generated, where a row continues one that is cached."""
    ids = args[0] if args else kwargs.get("input_ids")
    is_short = isinstance(ids, Tensor) and ids.shape[-1] <= SHORT_TOKENS
    return is_short and not kwargs.get("use_cache")
