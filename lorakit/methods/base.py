"""The base classes of methods: ``Method`` and the hooks of a run, ``RunHooks``."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import ValidationError

from lorakit.errors import AdapterError
from lorakit.recipe.sections import AdapterSection, TrainSection

if TYPE_CHECKING:
    from torch import Tensor, nn

    from lorakit.layers import AdapterLayer


class RunHooks:
    """What a method does in a run besides the forward pass; by default nothing.

    ``device_values`` names the scalars that ``before_step`` returns. They stay on the device and
    are logged once they are computed. ``adds_same_terms``: ``before_step`` launches the same
    operations on the same tensors in every step, without waiting for the device, so that they may
    be replayed.
    """

    device_values: tuple[str, ...] = ()
    adds_same_terms: bool = False

    def before_step(self, scale: Callable[[Tensor], Tensor]) -> list[Tensor]:
        """Called after all gradients of the step are computed, before they are clipped. Anything
        that is added to them must be passed through ``scale`` (float16 loss scaling)."""
        return []

    def after_step(self, step: int, scaled: bool = False) -> None:
        """Called after step ``step``, counted from 1, while its gradients still exist. With
        ``scaled`` they may not be finite: the float16 loss scaler skips such a step on the device,
        which the host does not see."""

    def is_final_form(self, step: int) -> bool:
        """Whether the adapter after ``step`` can be the result of the run."""
        return True

    def logged(self, step: int, optimizer: Any) -> dict[str, float]:
        """Additional values for a line of ``metrics.jsonl``."""
        return {}

    def changed_ranks(self, first: int, last: int) -> Tensor | None:
        """The rank of each adapted matrix, in the order of the layers, if the steps ``first`` to
        ``last``, which was the latest, have chosen them. It stays on the device."""
        return None

    def state(self) -> dict[str, Tensor]:
        """Tensors that an exact resume needs, for ``load_state``."""
        return {}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Restore ``state``. Raises KeyError if a tensor is missing."""

    def ranks(self) -> dict[str, int] | None:
        """The final rank of each adapted matrix by name, if the run determines them."""
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

    ``joins``: whether runs of the method are trained together with others over one base, which pays
    if an update costs less than the product with W.
    """

    name: ClassVar[str]
    summary: ClassVar[str] = ""
    #: The paper that a built-in method is from, as ``Author YEAR``, and its number on arXiv.
    source: ClassVar[str] = ""
    arxiv: ClassVar[str] = ""
    Config: ClassVar[type[AdapterSection]]
    if TYPE_CHECKING:
        Layer: ClassVar[type[AdapterLayer]]
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "conv1d"})
    peft_type: ClassVar[str] = "LORAKIT"
    peft_loads: ClassVar[bool] = False
    shared: ClassVar[tuple[str, ...]] = ()
    folds: ClassVar[bool] = False
    joins: ClassVar[bool] = True
    #: The hash of a user's code, without comments and formatting; None for a built-in method.
    digest: str | None = None

    def check(self, config: Any, targets: Collection[str]) -> None:
        """Raise TargetError if ``config`` has settings for modules that are not in ``targets``, the
        names of the modules to be wrapped."""

    def layer_class(self) -> type[AdapterLayer]:
        """The class of the layers. Built-in methods import theirs here, since it imports torch."""
        return self.Layer

    def wrap(self, module: nn.Module, config: Any, name: str) -> AdapterLayer:
        """The layer that replaces ``module``, called ``name`` in the model. Before training, its
        output equals the module's. The default is ``Layer(module, config, name)``."""
        build: Any = self.layer_class()
        layer: AdapterLayer = build(module, config, name)
        return layer

    def link(self, layers: Mapping[str, Any]) -> None:
        """Called after all layers have been placed in the model, to set up what they share."""

    def trained_parameters(self, model: nn.Module, config: Any) -> list[str]:
        """The names of the base's own parameters to train; called after wrapping."""
        return []

    def param_groups(
        self,
        parameters: Mapping[str, nn.Parameter],
        layers: Mapping[str, AdapterLayer],
        config: Any,
        train: TrainSection,
    ) -> list[dict[str, Any]]:
        """The optimizer's parameter groups for the trained ``parameters``, given by name.

        The learning rate of the first group is the one that is logged. Weight decay is applied to
        matrices only, not to biases and the weights of norms, which have one dimension.
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
        """The hooks for a run of ``total_steps`` optimizer steps."""
        return RunHooks()

    def depends_on_length(self) -> bool:
        """Whether the ``hooks`` of a run depend on its number of steps, which can then not change
        when it resumes. The default: whether the method has hooks of its own."""
        return type(self).hooks is not Method.hooks

    def advice(self, config: Any) -> str | None:
        """A setting besides ``train.learning_rate`` that makes a run diverge if it is too high."""
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
            **config.model_dump(mode="json", include=self.keys()),
        }
        tensors = {
            f"{name}.{key}": parameter.detach()
            for name, layer in layers.items()
            for key, parameter in layer.adapter_parameters().items()
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

    def check_shared(
        self,
        modules: Mapping[str, nn.Module],
        settings: Mapping[str, Any],
        tensors: Mapping[str, Tensor],
    ) -> None:
        """Raise AdapterError unless the ``shared`` tensors of a file have the shapes that ``link``
        gives them in new layers of ``modules``."""
        if not tensors or not modules:
            return
        import torch

        from lorakit.io.tensors import check_shape

        config = self._saved_config(settings)
        with torch.random.fork_rng(devices=[]):
            layers = {name: self.wrap(module, config, name) for name, module in modules.items()}
            self.link(layers)
        own = next(iter(layers.values())).adapter_parameters()
        for name, value in tensors.items():
            check_shape(name, value, own[name])

    def keys(self) -> set[str]:
        """The method's own keys of ``adapter``."""
        return self.Config.model_fields.keys() - AdapterSection.model_fields.keys()

    def _saved_config(self, settings: Mapping[str, Any]) -> AdapterSection:
        own = {key: settings[key] for key in self.keys() if key in settings}
        try:
            return self.Config(method=self.name, **own)
        except ValidationError as error:
            [first, *_] = error.errors()
            key = ".".join(map(str, first["loc"]))
            raise AdapterError(f"adapter_config.json: {key}: {first['msg']}") from error
