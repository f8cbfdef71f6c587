"""What a method is: a config and the few functions that its mathematics needs.

A method file subclasses ``Method`` and exports one instance as ``METHOD``. It imports torch inside
its functions only, so that recipes are checked without loading it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from lorakit.recipe.sections import AdapterSection, TrainSection

if TYPE_CHECKING:
    from torch import Tensor, nn

    from lorakit.layers import AdapterLayer


class Method(ABC):
    """One way to adapt a weight matrix W (out_features, in_features) of the frozen base.

    ``kinds`` are the modules it can adapt (as ``AdapterLayer.kind`` names them), ``peft_type`` is
    what its ``adapter_config.json`` says.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    Config: ClassVar[type[AdapterSection]]
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "conv1d", "embedding"})
    peft_type: ClassVar[str] = "LORA"

    def check(self, config: Any, targets: Sequence[str]) -> None:  # noqa: B027 (most need none)
        """Raise TargetError if ``config`` says something of modules that are none of
        ``targets``, the names of those that are about to be wrapped."""

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

    def merged_weight(self, layer: AdapterLayer, weight: Tensor) -> Tensor:
        """W with the adapter folded in, float32, in W's own layout; ``weight`` is W, since the
        layer's own base may be without values."""
        return weight.float() + self.delta_weight(layer)

    def param_groups(
        self, parameters: Mapping[str, nn.Parameter], config: Any, train: TrainSection
    ) -> list[dict[str, Any]]:
        """The optimizer's groups of all that trains, by name.

        Weight decay is on matrices only: biases and the weights of norms have one dimension.
        """
        matrices = [p for p in parameters.values() if p.ndim > 1]
        vectors = [p for p in parameters.values() if p.ndim <= 1]
        groups = [
            {"params": matrices, "weight_decay": train.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        return [group for group in groups if group["params"]]

    @abstractmethod
    def to_peft(
        self, layers: dict[str, AdapterLayer], config: Any
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """PEFT's form: the method's keys of ``adapter_config.json``, and tensors by PEFT's names
        (without the prefix ``base_model.model.``)."""

    @abstractmethod
    def from_peft(
        self, module: nn.Module, name: str, settings: Mapping[str, Any], tensors: dict[str, Tensor]
    ) -> AdapterLayer:
        """The reverse of ``to_peft`` for one module: the layer with these values in place.

        ``settings`` is ``adapter_config.json``; ``tensors`` are the module's own, by what follows
        its name (``lora_A.weight``). Raises AdapterError if one is missing, unknown or misshapen.
        """
