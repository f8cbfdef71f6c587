"""What a method is: a config and the few functions that its mathematics needs.

A method file subclasses ``Method`` and exports one instance as ``METHOD``. It imports torch inside
its functions only, so that recipes are checked without loading it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar

from lorakit.recipe.sections import AdapterSection

if TYPE_CHECKING:
    from torch import Tensor, nn

    from lorakit.layers import AdapterLayer


class Method(ABC):
    """One way to adapt a weight matrix W (out_features, in_features) of the frozen base."""

    name: ClassVar[str]
    summary: ClassVar[str]
    Config: ClassVar[type[AdapterSection]]

    @abstractmethod
    def wrap(self, module: nn.Module, config: Any, name: str) -> AdapterLayer:
        """Wrap ``module``, found in the model under ``name``, in a layer that holds the
        parameters; the output is unchanged until they are trained."""

    @abstractmethod
    def forward(self, layer: AdapterLayer, x: Tensor) -> Tensor:
        """The adapted output for input ``x`` (..., in_features), or token ids for an embedding."""

    @abstractmethod
    def delta_weight(self, layer: AdapterLayer) -> Tensor:
        """What a merge adds to W, in W's own layout, float32."""

    @abstractmethod
    def to_peft(
        self, layers: dict[str, AdapterLayer], config: Any
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """PEFT's form: the method's keys of ``adapter_config.json``, and tensors by PEFT's names
        (without the prefix ``base_model.model.``)."""
