"""Rotary position embedding of half-precision models, with fewer passes over memory on a GPU."""

from __future__ import annotations

import importlib.util
import inspect
import sys
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

#: transformers' name for it in the module of a model family.
_NAME = "apply_rotary_pos_emb"
_PARAMETERS = ["q", "k", "cos", "sin", "unsqueeze_dim"]

_Apply = Callable[..., tuple[Tensor, Tensor]]


def use_fast_rotary(model: PreTrainedModel) -> None:
    """Let the code of a half-precision model on a GPU rotate queries and keys by
    ``kernels.rotary_triton``, where the formula is the usual one. Other calls of that code, such as
    those of other models of the family on the CPU, stay as they are."""
    half = model.dtype in (torch.bfloat16, torch.float16)
    if not half or model.device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return
    for name in {type(module).__module__ for module in model.modules()}:
        code = sys.modules.get(name)
        original = getattr(code, _NAME, None)
        if original is not None and is_usual(original):
            setattr(code, _NAME, with_kernel(original))


def with_kernel(original: _Apply) -> _Apply:
    """``original``, but for tensors that the kernel takes."""
    from lorakit.kernels.rotary_triton import rotary  # needs triton

    @wraps(original)
    def apply(
        q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1
    ) -> tuple[Tensor, Tensor]:
        if torch.compiler.is_compiling() or unsqueeze_dim != 1 or not _fits(q, k, cos, sin):
            return original(q, k, cos, sin, unsqueeze_dim=unsqueeze_dim)
        return rotary(q, k, cos, sin)

    return apply


def _fits(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> bool:
    return (
        q.is_cuda
        and q.dim() == k.dim() == 4
        and cos.dim() == 3
        and cos.shape == sin.shape
        and cos.shape[0] in (1, q.shape[0])
        and q.shape[0] == k.shape[0]
        and q.shape[2] == k.shape[2] == cos.shape[1]
        and q.dtype in (torch.bfloat16, torch.float16)
        and q.dtype == k.dtype == cos.dtype == sin.dtype
        and q.shape[-1] == k.shape[-1] == cos.shape[-1]
        and q.shape[-1] % 2 == 0
        and not (cos.requires_grad or sin.requires_grad)
    )


def is_usual(function: Any) -> bool:
    """Whether ``function`` computes what the kernel does, to the bit, and is not replaced yet."""
    if hasattr(function, "__wrapped__"):
        return False
    try:
        if list(inspect.signature(function).parameters) != _PARAMETERS:
            return False
        generator = torch.Generator().manual_seed(0)
        q, k = (torch.randn(2, heads, 3, 8, generator=generator).bfloat16() for heads in (4, 2))
        cos, sin = (torch.randn(2, 3, 8, generator=generator).bfloat16() for _ in range(2))
        return all(
            torch.equal(result, _formula(x, cos[:, None], sin[:, None]))
            for result, x in zip(function(q, k, cos, sin), (q, k), strict=True)
        )
    except Exception:  # of another kind
        return False


def _formula(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    x1, x2 = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-x2, x1), dim=-1) * sin
