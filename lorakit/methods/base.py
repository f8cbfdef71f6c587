"""The base classes of methods: ``Method`` and the hooks of a run, ``RunHooks``."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import ValidationError

from lorakit.errors import AdapterError, UserError
from lorakit.recipe.sections import AdapterSection, TrainSection
from lorakit.user_code import load_class

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

    A method is a ``Config``, the keys of ``adapter`` in a recipe, and a ``Layer``, which owns the
    parameters and the arithmetic; everything else has a default. A built-in method, which is
    imported to check a recipe, overrides ``layer_class`` instead of setting ``Layer``, so that
    torch is not loaded for it.

    ``kinds``: the kinds of modules that the method adapts (``layers.Kind``, and ``slice`` for rows
    of a fused projection); empty for a method that trains the base's own parameters.

    The format of a saved adapter: ``adapter_config.json`` gets the keys of ``Config``,
    ``adapter_model.safetensors`` the parameters of each layer by their names. Where these are the
    names that PEFT uses, set ``peft_type`` to its name and ``peft_loads``, and PEFT loads the
    adapter. ``shared`` names the frozen parameters that all layers have in common, which are saved
    once, as ``base_model.NAME``. Other formats override ``to_peft`` and ``from_peft``. A method
    that ``folds`` is saved in the format of another.
    """

    name: ClassVar[str]
    summary: ClassVar[str] = ""
    Config: ClassVar[type[AdapterSection]]
    if TYPE_CHECKING:
        Layer: ClassVar[type[AdapterLayer]]
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "conv1d"})
    peft_type: ClassVar[str] = "LORAKIT"
    peft_loads: ClassVar[bool] = False
    shared: ClassVar[tuple[str, ...]] = ()
    folds: ClassVar[bool] = False

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
        """Whether the method reads this ``adapter_config.json``, whichever program wrote it."""
        return bool(self.peft_loads and settings["peft_type"] == self.peft_type)

    def to_peft(
        self, layers: Mapping[str, Any], config: Any
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The method's keys of ``adapter_config.json``, and the tensors of the layers by name,
        without the prefix ``base_model.model.`` and without the ``shared`` ones."""
        settings = {
            "peft_type": self.peft_type,
            **config.model_dump(mode="json", include=self._keys()),
        }
        tensors = {
            f"{name}.{key}": parameter.detach()
            for name, layer in layers.items()
            for key, parameter in layer.own_parameters().items()
            if key not in self.shared
        }
        return settings, tensors

    def unpack(
        self, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """The tensors of a file, each under the name of the module or parameter that it is for.
        Raises AdapterError if they do not fit ``settings``."""
        return dict(tensors)

    def from_peft(
        self, module: nn.Module, name: str, settings: Mapping[str, Any], tensors: dict[str, Tensor]
    ) -> AdapterLayer:
        """The layer that replaces ``module``, with the values of a file.

        ``settings`` is ``adapter_config.json``; ``tensors`` are those of the module, keyed by what
        follows its name, and the ``shared`` ones. Raises AdapterError if one is missing, unknown
        or misshapen.
        """
        import torch

        with torch.random.fork_rng(devices=[]):  # loading an adapter draws no random numbers
            layer = self.wrap(module, self._saved_config(settings), name)
        layer.load_parameters(tensors, self.shared, name)
        return layer

    def _keys(self) -> set[str]:
        return self.Config.model_fields.keys() - AdapterSection.model_fields.keys()

    def _saved_config(self, settings: Mapping[str, Any]) -> AdapterSection:
        own = {key: settings[key] for key in self._keys() if key in settings}
        try:
            return self.Config(method=self.name, **own)
        except ValidationError as error:
            [first, *_] = error.errors()
            key = ".".join(map(str, first["loc"]))
            raise AdapterError(f"adapter_config.json: {key}: {first['msg']}") from error


def load_method(spec: str) -> Method:
    """The method that ``FILE.py:CLASS`` names; the file is run. Raises UserError if it does not
    define one."""
    found = load_class(spec, Method)
    lacking = [name for name in ("Config", "Layer") if not hasattr(found, name)]
    if found.layer_class is not Method.layer_class or not found.kinds:
        lacking = [name for name in lacking if name != "Layer"]
    if lacking:
        raise UserError(
            f"{spec}: does not define {', '.join(lacking)}; allowed: a class with Config, a "
            "subclass of AdapterSection, and Layer, a subclass of AdapterLayer"
        )
    method = found()
    method.name = spec  # type: ignore[misc]  # recipes and saved adapters name it so
    return method
