"""Attention of short rows without cuDNN, which takes long to start."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

#: Longer rows, whose attention takes more of a pass, gain more from cuDNN than its plans take.
SHORT_TOKENS = 128


def use_short_attention(model: PreTrainedModel) -> None:
    """Keep cuDNN out of the model's passes over rows of up to ``SHORT_TOKENS`` tokens.

    cuDNN plans each new shape of a batch, which takes 0.1 to 1 s; other kernels need no plan, and
    on rows this short take between 0.6 and 1.6 times as long. For layers that are neither compiled,
    since code is compiled once for all lengths, nor recomputed, which is after the model's call.
    """
    switch = _Switch(torch.backends.cuda.cudnn_sdp_enabled())
    called: dict[int, nn.Module] = {id(model.base_model): model.base_model}
    decoder = model.get_decoder()  # of some families, a causal model calls this part directly
    if isinstance(decoder, nn.Module):
        called[id(decoder)] = decoder
    for module in called.values():
        module.register_forward_pre_hook(switch.enter, with_kwargs=True)
        module.register_forward_hook(switch.leave, always_call=True)


@dataclass(frozen=True)
class _Switch:
    """Hooks of a module; ``enabled`` is torch's setting outside of its calls."""

    enabled: bool

    def enter(self, _module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        torch.backends.cuda.enable_cudnn_sdp(self.enabled and not _is_short(args, kwargs))

    def leave(self, _module: Any, _args: tuple[Any, ...], _output: Any) -> None:
        torch.backends.cuda.enable_cudnn_sdp(self.enabled)


def _is_short(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Not while text is generated, where a row continues one that is cached."""
    ids = args[0] if args else kwargs.get("input_ids")
    is_short = isinstance(ids, Tensor) and ids.dim() > 0 and ids.shape[-1] <= SHORT_TOKENS
    return is_short and not kwargs.get("use_cache")
