"""Replace the targets by adapter layers, freeze the rest, and say what was done."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lorakit import registry
from lorakit.errors import TargetError
from lorakit.layers import adapter_layers
from lorakit.recipe.sections import AdapterSection
from lorakit.targets import describe_modules, find_targets


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
        text = f"{self.method} on {len(self.adapted_modules)} modules: {names}"
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
    if adapter_layers(model):
        raise TargetError("the model holds an adapter already; load the base again")
    method = registry.methods()[config.method]
    heads = tuple(find_heads(model) if heads is None else heads)
    whole = tuple(dict.fromkeys([*heads, *_named(model, config.modules_to_save)]))
    targets = find_targets(model, config.target_modules, config.layers, {*whole, *_output(model)})
    trained = {id(p) for name in whole for p in model.get_submodule(name).parameters()}
    clash = [n for n, m in targets.items() if any(id(p) in trained for p in m.parameters())]
    if clash:
        raise TargetError(f"adapter: {describe_modules(clash)}: both a target and trained whole")
    method.check(config, tuple(targets))
    model.requires_grad_(False)
    for name, module in targets.items():
        model.set_submodule(name, method.wrap(module, config, name))
    for name in whole:
        train_whole(model, name, keep_dtype=name in heads)
    return report(model, config.method, whole)


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
