"""Keep the frozen linear layers of a base model in 8-bit floating point."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lorakit.errors import UserError
from lorakit.kernels.fp8 import Fp8Weight, fp8_linear, quantize_weight
from lorakit.models.quantized import QuantizedLinear

#: Smaller matrices, such as routers, are not worth it, and their errors weigh more.
_LEAST_FEATURES = 256


class Fp8Linear(QuantizedLinear[Fp8Weight]):
    """In bfloat16, with W in e4m3."""

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, self.in_features)
        [y] = fp8_linear(flat, self.quantized, self.bias, [], [])
        return y.view(*x.shape[:-1], self.out_features)


def can_quantize(module: nn.Module) -> bool:
    """Whether ``module`` is a frozen linear layer whose shape the fp8 product supports."""
    if type(module) is not nn.Linear or module.weight.requires_grad:
        return False
    sizes = (module.in_features, module.out_features)
    return min(sizes) >= _LEAST_FEATURES and not any(size % 16 for size in sizes)


def quantize_linear(module: nn.Linear) -> Fp8Linear:
    weight = quantize_weight(module.weight.detach())
    return Fp8Linear(weight, module.bias, module.weight.dtype)


def check_support(dtype: str) -> None:
    """Raise UserError if the device or the model's ``dtype`` does not support fp8."""
    problem = None
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9):
        problem = "needs a GPU with fp8 matrix products (compute capability 8.9 or higher)"
    elif dtype != "bfloat16":
        problem = f"needs model.dtype: bfloat16, not {dtype}"
    if problem:
        raise UserError(f'model.base_precision = "fp8": {problem}; allowed here: null')
