"""The frozen modules under adapter layers, and access to their weight W.

Everything that depends on how a module stores W is here, so that a base with another format
(quantized, for example) needs changes in this module only.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lorakit.errors import AdapterError
from lorakit.kernels.low_rank import RowSlice
from lorakit.kernels.nf4 import nf4_linear
from lorakit.models.nf4 import Nf4Linear
from lorakit.models.quantized import QuantizedLinear

Kind = Literal["linear", "conv1d", "embedding", "parameter"]
#: What can be adapted. Conv1D is GPT-2's linear layer with a weight of (in_features, out_features).
ADAPTABLE = (nn.Linear, Conv1D, nn.Embedding)


class RowView(nn.Module):
    """A slice of the rows of ``module``, used as a linear layer. It has no parameters itself.

    Raises AdapterError if ``module`` is an embedding or does not have the rows."""

    def __init__(self, module: nn.Module, rows: RowSlice) -> None:
        super().__init__()
        size = len(dense_weight(module))
        if not rows.fit(size):
            raise AdapterError(f"{rows} does not fit a module of {size} rows")
        if kind_of(module) == "embedding":
            raise AdapterError("rows of an embedding cannot be adapted; allowed: of a linear layer")
        self._module = (module,)  # in a tuple: its parameters are not listed twice
        self.rows = rows

    @property
    def module(self) -> nn.Module:
        return self._module[0]

    def replace_module(self, module: nn.Module) -> None:
        """View the same rows of ``module``, which has the shape of the one before."""
        self._module = (module,)

    @property
    def bias(self) -> Tensor | None:
        bias = getattr(self.module, "bias", None)
        return self.rows.of(bias) if isinstance(bias, Tensor) else None

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, dense_weight(self), self.bias)


class ParameterView(nn.Module):
    """The parameter ``name`` of ``module`` as a weight: one matrix (out_features, in_features), or
    a stack of them, such as (experts, out_features, in_features). It has no parameters itself.

    As in PEFT, the matrices of a stack are transposed if ``module.is_transposed``.
    """

    def __init__(self, module: nn.Module, name: str) -> None:
        super().__init__()
        self._module = (module,)  # in a tuple: its parameters are not listed twice
        self.name = name

    @property
    def module(self) -> nn.Module:
        return self._module[0]

    @property
    def weight(self) -> Tensor:
        """The parameter as it is stored."""
        weight = getattr(self.module, self.name)
        assert isinstance(weight, Tensor), self.name
        return weight

    @property
    def is_transposed(self) -> bool:
        return self.weight.ndim == 3 and bool(getattr(self.module, "is_transposed", False))


def kind_of(module: nn.Module) -> Kind:
    """The layout in which ``module`` stores W; a ``RowView`` is linear."""
    if isinstance(module, ParameterView):
        return "parameter"
    if isinstance(module, nn.Embedding):
        return "embedding"
    return "conv1d" if isinstance(module, Conv1D) else "linear"


def as_matrix(module: nn.Module, weight: Tensor) -> Tensor:
    """Convert ``weight``, a matrix or a stack of them, from the layout of ``module`` to
    (out_features, in_features), or back."""
    if isinstance(module, ParameterView):
        return weight.mT if module.is_transposed else weight
    return weight.t() if isinstance(module, Conv1D | nn.Embedding) else weight


def dense_weight(module: nn.Module) -> Tensor:
    """W (out_features, in_features) of an adaptable module or of a ``RowView``; a stack of matrices
    for a ``ParameterView`` of one."""
    if isinstance(module, RowView):
        return module.rows.of(dense_weight(module.module))
    return as_matrix(module, stored_weight(module))


def stored_weight(module: nn.Module) -> Tensor:
    """The weight as the module stores it; for a ``RowView``, that of the whole module."""
    weight = _whole(module).weight
    assert isinstance(weight, Tensor), type(module)
    return weight


def storage(module: nn.Module) -> Tensor:
    """The tensor that holds W, or the quantized W, without dequantizing it."""
    module = _whole(module)
    if isinstance(module, QuantizedLinear):
        return next(module.buffers())
    return stored_weight(module)


def state_of(module: nn.Module) -> Hashable:
    """A value that changes when W is replaced, moved or written to."""
    held = storage(module)
    if not isinstance(held, nn.Parameter) and not isinstance(_whole(module), QuantizedLinear):
        return object()  # computed on each access
    return version_of(held)


def version_of(tensor: Tensor) -> Hashable:
    """A value that changes when the tensor is moved or written to; always another one if torch does
    not count that. Fused optimizers and CUDA graphs write to a tensor without counting it."""
    if tensor.is_inference():
        return object()
    return tensor.data_ptr(), tensor._version, tensor.device, tensor.dtype


def _whole(module: nn.Module) -> nn.Module:
    """The module under a ``RowView``, or ``module`` itself."""
    return module.module if isinstance(module, RowView) else module


def product(module: nn.Module, x: Tensor) -> Tensor:
    """W x (n, out_features) for x (n, in_features), without the bias, for a linear layer. For
    autograd, nothing is kept of a dequantized W."""
    if isinstance(module, Nf4Linear):
        return nf4_linear(x, module.quantized, None)
    return F.linear(x, dense_weight(module))
