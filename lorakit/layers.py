"""The one module that stands in place of an adapted one; the method gives it its mathematics."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

if TYPE_CHECKING:
    from lorakit.methods.base import Method

#: What can be adapted. Conv1D is GPT-2's linear layer with a weight of (in_features, out_features).
ADAPTABLE = (nn.Linear, Conv1D, nn.Embedding)


class AdapterLayer(nn.Module):
    """A frozen ``base_layer`` and, beside it, the parameters that a method registers.

    ``in_features`` and ``out_features`` are those of y = W x; for an embedding they are the number
    of rows and the dimension. ``r`` is the rank and ``scaling`` the factor of the update.
    """

    def __init__(self, base_layer: nn.Module, method: Method, *, r: int, scaling: float) -> None:
        assert isinstance(base_layer, ADAPTABLE), type(base_layer)
        super().__init__()
        self.base_layer = base_layer
        self.method = method
        self.r = r
        self.scaling = scaling
        self.kind: Literal["linear", "conv1d", "embedding"]
        if isinstance(base_layer, nn.Embedding):
            self.kind = "embedding"
            self.in_features, self.out_features = base_layer.weight.shape
        elif isinstance(base_layer, Conv1D):
            self.kind = "conv1d"
            self.in_features, self.out_features = base_layer.weight.shape
        else:
            self.kind = "linear"
            self.out_features, self.in_features = base_layer.weight.shape

    @property
    def weight(self) -> Tensor:
        """The frozen W: some models look at its dtype or device."""
        weight = self.base_layer.weight
        assert isinstance(weight, Tensor)
        return weight

    @property
    def bias(self) -> Tensor | None:
        bias = getattr(self.base_layer, "bias", None)
        assert bias is None or isinstance(bias, Tensor)
        return bias

    def forward(self, x: Tensor) -> Tensor:
        return self.method.forward(self, x)

    if TYPE_CHECKING:  # what the method registers: lora_A, lora_B, ...

        def __getattr__(self, name: str) -> Any: ...

    def extra_repr(self) -> str:
        return f"{self.method.name}, r={self.r}, scaling={self.scaling:g}"


def adapter_layers(model: nn.Module) -> dict[str, AdapterLayer]:
    """Name -> layer for every adapted module of the model, in the model's order."""
    return {n: m for n, m in model.named_modules() if isinstance(m, AdapterLayer)}
