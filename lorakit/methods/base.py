"""What a method is: a config and the few functions that its mathematics needs.

A method file subclasses ``Method`` and exports one instance as ``METHOD``. It imports torch inside
its functions only, so that recipes are checked without loading it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from lorakit.recipe.sections import AdapterSection, TrainSection

if TYPE_CHECKING:
    from torch import Tensor, nn

    from lorakit.layers import AdapterLayer


class RunHooks:
    """What a method does in a run beside the forward pass. As it stands here, it does nothing.

    ``device_values`` names what ``before_step`` returns: scalars on the device, which are logged
    when they have arrived there.
    """

    device_values: tuple[str, ...] = ()

    def before_step(self, scale: Callable[[Tensor], Tensor]) -> list[Tensor]:
        """All gradients of the step are there, and not yet clipped. What is added to them goes
        through ``scale`` (float16's loss scaling)."""
        return []

    def after_step(self, step: int, scaled: bool = False) -> None:
        """Step number ``step``, from 1, is over and its gradients are still there. With ``scaled``
        they may not be finite: float16's scaler leaves such a step out, and the host does not
        know."""

    def is_final_form(self, step: int) -> bool:
        """Whether what stands after ``step`` may be the run's result."""
        return True

    def logged(self, step: int, optimizer: Any) -> dict[str, float]:
        """What a line of metrics.jsonl gets besides the device's values."""
        return {}

    def state(self) -> dict[str, Tensor]:
        """What an exact resume needs; ``load_state`` takes it back."""
        return {}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Raises KeyError if something is missing."""

    def ranks(self) -> dict[str, int] | None:
        """Name -> rank of each adapted matrix at the end, if the run chose them."""
        return None


class Method:
    """One way to adapt weight matrices W (out_features, in_features) of the frozen base.

    ``kinds`` are what it can adapt: the kinds of ``layers.kind_of`` and ``slice``, rows of a fused
    projection; none for a method that trains the base's own parameters. ``peft_type`` is what its
    ``adapter_config.json`` says, ``folds`` whether what it saves is another method's form, into
    which its own is folded. ``peft_loads``: whether PEFT has a place for that form. A function that
    is not implemented here is left to those methods whose kinds need it.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    Config: ClassVar[type[AdapterSection]]
    if TYPE_CHECKING:
        Layer: ClassVar[type[AdapterLayer]]
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "conv1d", "embedding", "slice"})
    peft_type: ClassVar[str] = "LORA"
    folds: ClassVar[bool] = False
    peft_loads: ClassVar[bool] = True

    def check(self, config: Any, targets: Collection[str]) -> None:
        """Raise TargetError if ``config`` says something of modules that are none of
        ``targets``, the names of those that are about to be wrapped."""

    def layer_class(self) -> type[AdapterLayer]:
        """The class of the layers. Built-in methods import theirs here, since it imports torch."""
        return self.Layer

    def wrap(self, module: nn.Module, config: Any, name: str) -> AdapterLayer:
        """The layer that replaces ``module``, which the model has under ``name``; its output is the
        module's until it is trained. By default ``Layer(module, config, name)``."""
        build: Any = self.layer_class()
        layer: AdapterLayer = build(module, config, name)
        return layer

    def link(self, layers: Mapping[str, Any]) -> None:
        """All layers of the model are there: share among them what they have in common."""

    def trained_parameters(self, model: nn.Module, config: Any) -> list[str]:
        """The names of the base's own parameters that train; called when all is wrapped."""
        return []

    def param_groups(
        self,
        parameters: Mapping[str, nn.Parameter],
        layers: Mapping[str, AdapterLayer],
        config: Any,
        train: TrainSection,
    ) -> list[dict[str, Any]]:
        """The optimizer's groups of all that trains, by name, ``layers`` being what was wrapped;
        the first has the learning rate that the log calls so.

        Weight decay is on matrices only: biases and the weights of norms have one dimension.
        """
        matrices = [p for p in parameters.values() if p.ndim > 1]
        vectors = [p for p in parameters.values() if p.ndim <= 1]
        groups = [
            {"params": matrices, "weight_decay": train.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        return [group for group in groups if group["params"]]

    def check_steps(self, config: Any, total_steps: int) -> None:
        """Raise UserError if ``config`` does not fit a run of ``total_steps``."""

    def hooks(self, layers: Mapping[str, Any], config: Any, total_steps: int) -> RunHooks:
        """What the method does in a run of ``total_steps`` optimizer steps."""
        return RunHooks()

    def advice(self, config: Any) -> str | None:
        """What else than ``train.learning_rate`` may be too high if a run diverges."""
        return None

    def reads(self, settings: Mapping[str, Any]) -> bool:
        """Whether an ``adapter_config.json`` that another program wrote is of this method."""
        return False

    def to_peft(
        self, layers: Mapping[str, Any], config: Any
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """PEFT's form: the method's keys of ``adapter_config.json``, and tensors by PEFT's names
        (without the prefix ``base_model.model.``)."""
        raise NotImplementedError

    def unpack(
        self, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """For a form that PEFT does not load: the file's tensors, each under the name of the
        module or parameter it is for. Raises AdapterError unless they are what ``settings`` say.
        """
        raise NotImplementedError

    def from_peft(
        self, module: nn.Module, name: str, settings: Mapping[str, Any], tensors: dict[str, Tensor]
    ) -> AdapterLayer:
        """The reverse of ``to_peft`` for one module: the layer with these values in place.

        ``settings`` is ``adapter_config.json``; ``tensors`` are the module's own, by what follows
        its name (``lora_A.weight``). Raises AdapterError if one is missing, unknown or misshapen.
        """
        raise NotImplementedError
