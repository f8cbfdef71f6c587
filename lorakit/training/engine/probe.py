"""Check in the first step that every adapted module receives a gradient."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from lorakit.anatomy import (
    adaptable_modules,
    is_routed_expert,
    is_within,
    layer_drops,
)
from lorakit.errors import TargetError
from lorakit.layers import (
    AdapterLayer,
    CompositeLayer,
    adapter_layers,
)
from lorakit.module_names import as_yaml_list, covering_targets, describe_modules, layer_of
from lorakit.parameters import AdaptedParameters, Replacement, replaced_modules


class GradientProbe:
    """Watches the adapted modules of ``model`` up to ``check``, which is called once, when the
    gradients of the first step have been computed.

    ``fully_trained`` names modules that train without an adapter and must get gradients too. With
    ``count_calls``, forward hooks count the input elements of each module; they are not used with a
    compiled model. ``say`` receives warnings.
    """

    def __init__(
        self,
        model: nn.Module,
        say: Callable[[str], None],
        fully_trained: Sequence[str] = (),
        count_calls: bool = True,
    ) -> None:
        self._say = say
        self._layers = adapter_layers(model)
        self._model = model
        self._fully_trained = {name: model.get_submodule(name) for name in fully_trained}
        self._inputs: dict[str, int] | None = (
            dict.fromkeys(self._layers, 0) if count_calls else None
        )
        modules = replaced_modules(model) if count_calls else {}
        self._hooks = [m.register_forward_hook(self._counter(n, m)) for n, m in modules.items()]
        # Layers that are dropped at random may miss a step.
        self._drops_layers = bool(layer_drops(getattr(model, "config", None)))

    def check(self) -> None:
        """Raise TargetError for modules that would never train, because no gradient reaches them:
        the model reads their weight without calling them, or ignores their output. Experts that got
        no token in this step are not reported.

        Warns about modules whose gradient is exactly zero, which can be caused by a gate that is
        initialized to zero or by rows of a single token. Waits for the device once.
        """
        for hook in self._hooks:
            hook.remove()
        if dead := [name for name, layer in self._layers.items() if self._is_dead(name, layer)]:
            raise TargetError(
                f"adapter.target_modules: no gradient reaches {describe_modules(dead)}: "
                f"{self._cause(dead)}, so the adapter there would never train; "
                f"{self._advice(dead)}"
            )
        if dead := [name for name, module in self._fully_trained.items() if not _gradients(module)]:
            raise TargetError(
                f"adapter.modules_to_save: no gradient reaches {describe_modules(dead)}: the model "
                "does not use it in this task; leave it out"
            )
        if zero := _zero_gradients(self._layers):
            self._say(
                f"the gradient of {describe_modules(zero)} is exactly zero in the first step; if "
                "it stays zero, the adapter there does not train"
            )

    def _is_dead(self, name: str, layer: AdapterLayer) -> bool:
        expert = is_routed_expert(name)
        if self._inputs is not None and not self._inputs[name]:
            return not (expert or self._drops_layers)
        trained = [p for p in layer.adapter_parameters().values() if p.requires_grad]
        lacks = bool(trained) and all(parameter.grad is None for parameter in trained)
        return lacks and not (expert and self._inputs is None)

    def _cause(self, dead: Sequence[str]) -> str:
        if self._inputs is not None and not any(self._inputs[name] for name in dead):
            return "the model never calls these modules (it reads their weights, or skips them)"
        return "the model reads their weights without calling them, or ignores their output"

    def _advice(self, dead: Sequence[str]) -> str:
        """Suggest targets that exclude ``dead`` and nothing else."""
        rest = [name for name in self._layers if name not in set(dead)]
        if not rest:
            return "name other targets"
        linear = adaptable_modules(self._model)
        others = [n for n in linear if not is_within(n, tuple(self._layers))]
        layers = {None, *map(layer_of, rest)}  # the recipe may choose some
        targets = covering_targets(rest, [*dead, *(n for n in others if layer_of(n) in layers)])
        return f"to adapt the rest: target_modules: {as_yaml_list(targets)}"

    def _counter(
        self, name: str, module: Replacement
    ) -> Callable[[nn.Module, tuple[object, ...], object], None]:
        parts = module.parts if isinstance(module, CompositeLayer | AdaptedParameters) else ()
        names = [f"{name}.{role}" for role in parts] or [name]

        def count(_module: nn.Module, inputs: tuple[object, ...], _output: object) -> None:
            assert self._inputs is not None
            for each in names:
                self._inputs[each] += sum(x.numel() for x in inputs if isinstance(x, Tensor))

        return count


def _gradients(module: nn.Module) -> list[Tensor]:
    return [p.grad for p in module.parameters() if p.grad is not None]


def _zero_gradients(layers: Mapping[str, AdapterLayer]) -> list[str]:
    largest = {
        name: torch.stack([gradient.abs().max().float() for gradient in gradients]).max()
        for name, layer in layers.items()
        if (gradients := _gradients(layer))
    }
    values = torch.stack(list(largest.values())).tolist() if largest else []
    return [name for name, value in zip(largest, values, strict=True) if value == 0]
