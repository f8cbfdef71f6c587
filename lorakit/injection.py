"""Replace the targets by adapter layers, freeze the rest, and say what was done."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lorakit import registry
from lorakit.errors import TargetError
from lorakit.layers import (
    AdapterLayer,
    FusedLayer,
    RowsOf,
    adapted_modules,
    adapter_layers,
    kind_of,
)
from lorakit.methods.base import Method
from lorakit.models.masters import keep_master, plain_name
from lorakit.recipe.sections import AdapterSection
from lorakit.targets import Target, describe_modules, find_targets


@dataclass(frozen=True)
class AdaptedModule:
    """``shape`` is (out_features, in_features)."""

    name: str
    shape: tuple[int, int]
    r: int


@dataclass(frozen=True)
class InjectionReport:
    """What was adapted, what is trained whole beside it, and how many parameters that is."""

    method: str
    adapted_modules: tuple[AdaptedModule, ...]
    modules_to_save: tuple[str, ...]
    trainable_parameters: int
    total_parameters: int

    def __str__(self) -> str:
        names = describe_modules([module.name for module in self.adapted_modules])
        share = self.trainable_parameters / self.total_parameters
        count = len(self.adapted_modules)
        text = f"{self.method} on {count} modules: {names}" if count else self.method
        if self.modules_to_save:
            text += f"; trained whole: {', '.join(self.modules_to_save)}"
        return (
            f"{text}; {self.trainable_parameters:,} of {self.total_parameters:,} parameters "
            f"train ({share:.3%})"
        )


def inject(
    model: nn.Module, config: AdapterSection, heads: Iterable[str] | None = None
) -> InjectionReport:
    """Adapt ``model`` in place as ``config`` says; every other parameter is frozen.

    ``heads`` are modules trained whole besides ``config.modules_to_save``; by default the
    classification head, if the model has one. Random values come from torch's default generator.
    Raises TargetError if the model is adapted already, or a target or a pattern does not fit.
    """
    if adapted_modules(model):
        raise TargetError("the model holds an adapter already; load the base again")
    method: Method = registry.methods()[config.method]
    heads = tuple(find_heads(model) if heads is None else heads)
    whole = tuple(dict.fromkeys([*heads, *_named(model, config.modules_to_save)]))
    targets = _targets(model, config, method, whole)
    trained = {id(p) for name in whole for p in model.get_submodule(name).parameters()}
    clash = [n for n, t in targets.items() if any(id(p) in trained for p in t.module.parameters())]
    if clash:
        raise TargetError(f"adapter: {describe_modules(clash)}: both a target and trained whole")
    method.check(config, tuple(targets))
    layers = {name: _wrap(method, target, config, name) for name, target in targets.items()}
    model.requires_grad_(False)
    put_in_place(model, layers)
    method.link(layers)
    base = method.trained_parameters(model, config)
    for name in whole:
        train_whole(model, name, keep_dtype=name in heads)
    inside = tuple(f"{name}." for name in whole) or ("\0",)
    for name in base:
        if not name.startswith(inside):
            keep_master(model, name)
    return report(model, config.method, whole)


def _targets(
    model: nn.Module, config: AdapterSection, method: Method, whole: Sequence[str]
) -> dict[str, Target]:
    if not method.kinds:
        return {}
    targets = find_targets(model, config.target_modules, config.layers, {*whole, *_output(model)})
    if other := [n for n, t in targets.items() if _kind(t) not in method.kinds]:
        raise TargetError(
            f"adapter.target_modules: {method.name} does not adapt {describe_modules(other)}; "
            f"allowed: {', '.join(sorted(method.kinds))} modules"
        )
    return targets


def _kind(target: Target) -> str:
    return "slice" if target.rows is not None else kind_of(target.module)


def _wrap(method: Method, target: Target, config: AdapterSection, name: str) -> AdapterLayer:
    module = target.module if target.rows is None else RowsOf(target.module, target.rows)
    return method.wrap(module, config, name)


def put_in_place(model: nn.Module, layers: Mapping[str, AdapterLayer]) -> None:
    """Let each layer stand where its base does; the parts of a fused projection go together."""
    fused: dict[str, dict[str, AdapterLayer]] = {}
    for name, layer in layers.items():
        if isinstance(layer.base_layer, RowsOf):
            whole, _, role = name.rpartition(".")
            fused.setdefault(whole, {})[role] = layer
        else:
            model.set_submodule(name, layer)
    for name, parts in fused.items():
        model.set_submodule(name, FusedLayer(model.get_submodule(name), parts))


def report(model: nn.Module, method: str, whole: Sequence[str]) -> InjectionReport:
    """Count what is in place; shared parameters count once."""
    modules = tuple(
        AdaptedModule(name, (layer.out_features, layer.in_features), layer.r)
        for name, layer in adapter_layers(model).items()
    )
    parameters = list(model.parameters())
    return InjectionReport(
        method=method,
        adapted_modules=modules,
        modules_to_save=tuple(whole),
        trainable_parameters=sum(p.numel() for p in parameters if p.requires_grad),
        total_parameters=sum(p.numel() for p in parameters),
    )


def find_heads(model: nn.Module) -> list[str]:
    """The classification head: what a transformers classifier holds besides its base model."""
    if not isinstance(model, PreTrainedModel) or "Classification" not in type(model).__name__:
        return []
    return [
        name
        for name, child in model.named_children()
        if name != model.base_model_prefix and any(True for _ in child.parameters())
    ]


def train_whole(model: nn.Module, name: str, keep_dtype: bool) -> None:
    """Train a module in float32; its input is cast on the way in.

    The output stays float32 for a head (``keep_dtype``) and is cast back elsewhere, so that the
    layers after it see what they saw before. Modules that share the parameter (tied embeddings)
    get the same casts.
    """
    module = model.get_submodule(name)
    before = next(module.parameters()).dtype
    module.to(torch.float32).requires_grad_(True)
    if before == torch.float32:
        return
    shared = {id(p) for p in module.parameters()}
    for other in model.modules():
        tied = any(id(p) in shared for p in other.parameters(recurse=False))
        if other is module or (tied and other not in set(module.modules())):
            other.register_forward_pre_hook(_cast_inputs)
            if not keep_dtype:
                other.register_forward_hook(lambda _m, _a, out: _cast(out, before))


def trained_base(model: nn.Module, whole: Sequence[str]) -> dict[str, Tensor]:
    """Name -> value of the base's own parameters that train, those of the modules ``whole`` and
    of the adapter layers aside."""
    layers = {f"{n}.": layer for n, layer in adapter_layers(model).items()}
    inside = tuple(f"{name}." for name in whole) or ("\0",)
    found: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        plain = plain_name(name)
        own = any(
            plain.startswith(prefix) and not plain.startswith(f"{prefix}base_layer.")
            for prefix in layers
        )
        if parameter.requires_grad and not own and not plain.startswith(inside):
            found[plain] = parameter
    return found


def trainable_state(model: nn.Module) -> dict[str, Tensor]:
    """Name -> parameter for all that trains."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _named(model: nn.Module, names: Sequence[str]) -> list[str]:
    found: list[str] = []
    for wanted in names:
        fitting = [n for n, _ in model.named_modules() if n == wanted or n.endswith(f".{wanted}")]
        if not fitting:
            have = sorted({n.rpartition(".")[2] for n, _ in model.named_modules()} - {""})
            names_text = ", ".join(n for n in have if not n.isdigit())
            raise TargetError(
                f"adapter.modules_to_save: {wanted!r} matches no module; allowed: {names_text}"
            )
        found.extend(fitting)
    return found


def _output(model: nn.Module) -> list[str]:
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    return [name for name, module in model.named_modules() if head is not None and module is head]


def _cast(value: object, dtype: torch.dtype) -> object:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def _cast_inputs(_module: nn.Module, inputs: tuple[object, ...]) -> tuple[object, ...]:
    return tuple(_cast(value, torch.float32) for value in inputs)
