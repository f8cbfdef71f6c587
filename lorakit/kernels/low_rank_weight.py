"""A weight W + left right as a tensor that multiplies activations without being summed.

Whatever forward pass a module has, its products become x W + (x left) right, and neither they nor
their gradients need a matrix of W's size. Every other operation gets the sum.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map_only

#: Operators f(x, W) for matrices, batches of them, and groups of rows.
_PRODUCTS: tuple[Any, ...] = (
    torch.matmul, torch.mm, torch.bmm, torch._grouped_mm, Tensor.matmul, Tensor.mm, Tensor.bmm,
    Tensor.__matmul__,
)  # fmt: skip
_TRANSPOSES: tuple[Any, ...] = (torch.transpose, Tensor.transpose)
#: What is the same for W and the sum.
_FACTS: tuple[Any, ...] = (
    *(vars(torch._C.TensorBase)[name].__get__
      for name in ("shape", "dtype", "device", "ndim", "requires_grad", "is_cuda", "layout")),
    Tensor.size, Tensor.dim, Tensor.stride, Tensor.numel, Tensor.data_ptr, Tensor.__len__,
)  # fmt: skip


class LowRankWeight(Tensor):
    """W + left right for W (m, n), left (m, r) and right (r, n), or stacks of these."""

    left: Tensor
    right: Tensor

    @staticmethod
    def of(W: Tensor, left: Tensor, right: Tensor) -> LowRankWeight:
        found = W.as_subclass(LowRankWeight)
        found.left, found.right = left, right
        return found

    def plain(self) -> Tensor:
        """W."""
        return self.as_subclass(Tensor)

    def dense(self) -> Tensor:
        """W + left right."""
        add = torch.baddbmm if self.left.ndim == 3 else torch.addmm
        total: Tensor = add(self.plain(), self.left, self.right)
        return total

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            return _apply(func, args, dict(kwargs or {}))


def _apply(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    first, second = (*args, None, None)[:2]
    options = {key: value for key, value in kwargs.items() if value is not None}
    if isinstance(first, LowRankWeight):
        if func in _FACTS:
            return func(first.plain(), *args[1:], **kwargs)
        last_two = {first.ndim - 2, first.ndim - 1}
        if func in _TRANSPOSES and {dim % first.ndim for dim in args[1:]} == last_two:
            return LowRankWeight.of(first.plain().mT, first.right.mT, first.left.mT)
        if func is Tensor.__getitem__ and first.ndim == 3 and isinstance(second, int | Tensor):
            return LowRankWeight.of(first.plain()[second], first.left[second], first.right[second])
        if func in _PRODUCTS and not options and type(second) is Tensor:
            y = func(first.plain(), second)
            return y.add_(func(first.left, func(first.right, second)))
    elif isinstance(second, LowRankWeight):
        if func in _PRODUCTS and len(args) == 2 and not set(options) - {"offs"}:
            y = func(first, second.plain(), **options)
            return y.add_(func(func(first, second.left, **options), second.right, **options))
        if func is F.linear:
            y = F.linear(first, second.plain(), *args[2:], **kwargs)
            return y.add_(F.linear(F.linear(first, second.right), second.left))
    args, kwargs = tree_map_only(LowRankWeight, LowRankWeight.dense, (args, kwargs))
    return func(*args, **kwargs)
