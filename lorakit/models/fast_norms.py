"""RMSNorm of half-precision models, with fewer passes over memory.

transformers computes RMSNorm in float32 from seven operators, whose backward pass consists of about
fifteen more, each of which reads and writes the whole tensor. torch has a CUDA kernel for either.
"""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

_aten: Any = torch.ops.aten


class FastRmsNorm(nn.Module):
    """y = w * round(x / sqrt(mean(x^2) + eps)) for x (..., size) and a frozen w (size,), where
    ``round`` is to the dtype of x. The rest is in float32, as in transformers. Inputs of another
    dtype than w's, such as residuals in float32, take the operators of transformers."""

    def __init__(self, weight: nn.Parameter, eps: float) -> None:
        super().__init__()
        self.weight = weight
        self.variance_epsilon = eps

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype != self.weight.dtype:
            x32 = x.float()
            inverse = torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.variance_epsilon)
            return self.weight * (x32 * inverse).to(x.dtype)
        y: Tensor = _RmsNorm.apply(x, self.weight, self.variance_epsilon)  # type: ignore[no-untyped-call]
        return y


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        if _has_kernels(x):
            normalized, inverse = _aten._fused_rms_norm(x, [x.shape[-1]], None, eps)
            ctx.save_for_backward(x, weight, inverse)
            y: Tensor = normalized.mul_(weight)
            return y
        x32 = x.float()
        inverse = x32.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        return x32.mul_(inverse).to(x.dtype).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        """dx = r g - x r^3 mean(g x), where g = w dy and r = 1 / sqrt(mean(x^2) + eps)."""
        x, weight, inverse = ctx.saved_tensors
        if _has_kernels(x):
            mask = [True, False]
            g = dy * weight
            dx, _ = _aten._fused_rms_norm_backward(g, x, [x.shape[-1]], inverse, None, mask)
            return dx, None, None
        g, x32 = (dy * weight).float(), x.float()
        mean = torch.linalg.vecdot(g, x32).unsqueeze(-1).div_(x.shape[-1])
        dx = g.mul_(inverse).addcmul_(x32, mean.mul_(inverse**3), value=-1)
        return dx.to(x.dtype), None, None


def _has_kernels(x: Tensor) -> bool:
    return x.is_cuda and hasattr(_aten, "_fused_rms_norm_backward")  # from torch 2.9 on


@torch.no_grad()
def use_fast_norms(model: PreTrainedModel) -> int:
    """Replace the RMSNorms of a half-precision model by ``FastRmsNorm`` where the weight is frozen
    and the result of a trial on the CPU equal to the bit; return how many were replaced."""
    if model.dtype not in (torch.bfloat16, torch.float16):
        return 0
    replaced = 0
    for name, module in list(model.named_modules()):
        fast = _fast(module) if type(module).__name__.endswith("RMSNorm") else None
        if fast is not None:
            model.set_submodule(name, fast)
            replaced += 1
    return replaced


def _fast(module: nn.Module) -> FastRmsNorm | None:
    parameters = dict(module.named_parameters())
    weight = parameters.get("weight")
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if list(parameters) != ["weight"] or weight is None or not isinstance(eps, float):
        return None
    if len(inspect.signature(module.forward).parameters) != 1:  # such as a gate besides x
        return None
    if weight.requires_grad or weight.dim() != 1:
        return None
    generator = torch.Generator().manual_seed(0)
    trial = nn.Parameter(torch.randn(len(weight), generator=generator).to(weight.dtype))
    x32 = torch.randn(8, len(weight), generator=generator).mul_(0.1)
    fast, original = FastRmsNorm(trial, eps), copy.deepcopy(module, {id(weight): trial})
    try:
        if not all(torch.equal(fast(x), original(x)) for x in (x32.to(weight.dtype), x32)):
            return None
    except Exception:  # a norm of another kind
        return None
    return FastRmsNorm(weight, eps).train(module.training)
