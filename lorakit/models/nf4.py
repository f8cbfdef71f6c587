"""Keep the frozen linear layers of a base model in 4-bit NormalFloat."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lorakit.errors import UserError
from lorakit.kernels.nf4 import BLOCK, Nf4Weight, nf4_linear, quantize_weight, stacked
from lorakit.models.quantized import QuantizedLinear

#: Smaller matrices, such as routers, are not worth it, and their errors weigh more.
_LEAST_FEATURES = 128


class Nf4Linear(QuantizedLinear[Nf4Weight]):
    """In any dtype, with W in nf4."""

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, self.in_features).to(self.dtype)
        y = nf4_linear(flat, self.quantized, self.bias)
        return y.view(*x.shape[:-1], self.out_features)


@dataclass(frozen=True)
class Nf4Stack:
    """Layers of the same ``in_features``, as one: ``weight`` are the tensors of all, for
    ``kernels.nf4.dense``, and ``bias`` is (sum of out_features,)."""

    weight: list[Tensor]
    bias: Tensor | None


def stack(layers: Sequence[Nf4Linear]) -> Nf4Stack:
    """Stack ``layers``, each of which keeps a view of its rows. All or none have a bias."""
    weight = stacked([layer.quantized for layer in layers])
    rows = weight[0].split([layer.out_features for layer in layers])
    for layer, own in zip(layers, rows, strict=True):
        layer.packed = own
    biases = [layer.bias for layer in layers if layer.bias is not None]
    return Nf4Stack(weight, torch.cat(biases) if biases else None)


def can_quantize(module: nn.Module) -> bool:
    """Whether ``module`` is a frozen linear layer whose rows are whole blocks."""
    if type(module) is not nn.Linear or any(p.requires_grad for p in module.parameters()):
        return False
    sizes = (module.in_features, module.out_features)
    return min(sizes) >= _LEAST_FEATURES and module.in_features % BLOCK == 0


def quantize_linear(module: nn.Linear, device: torch.device) -> Nf4Linear:
    """``module`` on ``device``, where its weight is quantized."""
    weight = module.weight.detach()
    weight = weight if weight.is_meta else weight.to(device)
    return Nf4Linear(quantize_weight(weight), module.bias, weight.dtype)


def check_support() -> None:
    """Raise UserError if bitsandbytes is not installed."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(
            "model.base_precision = \"nf4\": needs bitsandbytes (pip install 'lorakit[gpu]'); "
            "allowed without it: fp8, null"
        )
