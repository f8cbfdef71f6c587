"""Replace the targets with adapter layers, freeze the rest, and report what was done."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from transformers import PreTrainedModel

from lorakit import registry
from lorakit.anatomy import is_within, outside_language_model
from lorakit.base_weight import ParameterView, RowView, kind_of
from lorakit.coverage import Coverage, measure_coverage, missed_outside
from lorakit.errors import TargetError, UserError, counted, shown
from lorakit.layers import AdapterLayer, CompositeLayer, adapted_modules, adapter_layers
from lorakit.methods.base import Method
from lorakit.models.master_weights import plain_name, train_module, train_parameter
from lorakit.models.token_rows import token_rows
from lorakit.module_names import describe_modules, is_suffix
from lorakit.parameters import with_adapted_parameters
from lorakit.recipe.sections import AdapterSection
from lorakit.targets import Target, find_targets, parameters_within


@dataclass(frozen=True)
class AdaptedModule:
    """``shape`` is (out_features, in_features)."""

    name: str
    shape: tuple[int, int]
    r: int


@dataclass(frozen=True)
class InjectionReport:
    """The adapted modules, the fully trained ones (``modules_to_save``), and parameter counts.

    ``coverage`` describes which attention, MLP and expert weights the targets cover, and which they
    miss; None for a loaded adapter. It has no shares if the method trains base parameters.
    """

    method: str
    adapted_modules: tuple[AdaptedModule, ...]
    modules_to_save: tuple[str, ...]
    trainable_parameters: int
    total_parameters: int
    coverage: Coverage | None = None

    def __str__(self) -> str:
        names = describe_modules([module.name for module in self.adapted_modules])
        share = self.trainable_parameters / self.total_parameters
        count = len(self.adapted_modules)
        text = f"{self.method} on {counted(count, 'module')}: {names}" if count else self.method
        if self.modules_to_save:
            text += f"; fully trained: {', '.join(self.modules_to_save)}"
        text += (
            f"; {self.trainable_parameters:,} of {self.total_parameters:,} parameters "
            f"are trainable ({share:.3%})"
        )
        coverage = str(self.coverage) if self.coverage else ""
        return "\n".join(filter(None, (text, coverage, self._rank_warning())))

    def _rank_warning(self) -> str:
        """About ranks that no update of the module can have."""
        above = [module for module in self.adapted_modules if module.r > min(module.shape)]
        if not above:
            return ""
        first = above[0]
        return (
            f"warning: the rank exceeds the smaller dimension of {counted(len(above), 'module')} "
            f"({first.r} and {min(first.shape)} in {first.name}), which only adds parameters"
        )


def inject(
    model: nn.Module, config: AdapterSection, heads: Iterable[str] | None = None
) -> InjectionReport:
    """Adapt ``model`` in place according to ``config`` and freeze every other parameter.

    ``heads`` are fully trained in addition to ``config.modules_to_save``; the default is the
    classification head, if the model has one. Random values come from torch's default generator.
    Raises TargetError if the model is adapted already, or a target or a pattern does not fit, and
    UserError if ``config`` is that of another method or has ``init_from``, which only a training
    run reads.
    """
    if adapted_modules(model):
        raise TargetError("the model already has an adapter; load the base again")
    method: Method = registry.method(config.method)
    _check_config(method, config)
    if config.init_from is not None:
        raise UserError(
            f"adapter.init_from = {shown(config.init_from)}: allowed: in the recipe of a run; "
            "hint: lorakit.load(base, adapter, trainable=True)"
        )
    heads = tuple(find_heads(model) if heads is None else heads)
    fully_trained = find_fully_trained(model, config, heads)
    if unused := [
        n for n in fully_trained if n not in heads and is_within(n, outside_language_model(model))
    ]:
        raise TargetError(
            f"adapter.modules_to_save: {describe_modules(unused)}: outside the language model, "
            "which text does not pass through; allowed: modules of the language model"
        )
    targets = _targets(model, config, method, fully_trained)
    trained = {id(p) for name in fully_trained for p in model.get_submodule(name).parameters()}
    clash = [n for n, t in targets.items() if any(id(p) in trained for p in t.module.parameters())]
    if clash:
        key = "modules_to_save" if config.modules_to_save else "target_modules"
        raise TargetError(
            f"adapter.{key}: {describe_modules(clash)}: both a target and fully trained; allowed: "
            "one of them"
        )
    method.check(config, tuple(targets))
    coverage = _coverage(model, config, targets, fully_trained)
    layers = {name: _wrap(method, target, config, name) for name, target in targets.items()}
    replace_modules(model, layers)
    method.link(layers)
    base = _base_parameters(model, config, method, fully_trained)
    _freeze_all_but(model, layers)
    for name in fully_trained:
        train_module(model, name, float32_output=name in heads)
    for name in base:
        train_parameter(model, name)
    return dataclasses.replace(report(model, config.method, fully_trained), coverage=coverage)


def _check_config(method: Method, config: AdapterSection) -> None:
    """Raise UserError if ``config`` belongs to another method, as it does if its ``method`` was not
    set. A class of a user's file may exist twice, since the file runs once more to be imported."""
    given, expected = type(config), method.Config
    same_keys = given.model_fields.keys() == expected.model_fields.keys()
    if given is not expected and not (same_keys and "method" in config.model_fields_set):
        raise UserError(
            f"adapter.method = {config.method!r}: its configuration is {expected.__name__}, not "
            f"{given.__name__}; hint: {given.__name__}(method='FILE.py:CLASS', ...) names your own"
        )


def _coverage(
    model: nn.Module,
    config: AdapterSection,
    targets: Mapping[str, Target],
    fully_trained: Sequence[str],
) -> Coverage | None:
    if not targets:
        outside = missed_outside(model)
        return Coverage({}, outside) if outside else None
    names = config.target_modules or ()
    return measure_coverage(model, targets, names, config.layers, {*fully_trained, *_output(model)})


def _targets(
    model: nn.Module, config: AdapterSection, method: Method, fully_trained: Sequence[str]
) -> dict[str, Target]:
    given = config.target_parameters
    if given and "parameter" not in method.kinds:
        raise TargetError(
            f"adapter.target_parameters = {shown(given)}: not supported by {method.name}; allowed: "
            f"{', '.join(registry.methods_for('parameter'))}"
        )
    if not method.kinds:
        return {}
    exclude = {*fully_trained, *_output(model)}
    targets = find_targets(model, config.target_modules, config.layers, exclude, given)
    if other := [n for n, t in targets.items() if _kind(t) not in method.kinds]:
        raise TargetError(
            f"adapter.target_modules: {method.name} does not adapt {describe_modules(other)}; "
            f"allowed: {', '.join(sorted(method.kinds))} modules"
        )
    return targets


def _base_parameters(
    model: nn.Module, config: AdapterSection, method: Method, fully_trained: Sequence[str]
) -> list[str]:
    """The names of the base's own parameters that are trained, except in fully trained modules.

    A method that wraps nothing trains parameters of its targets. In a multimodal model, only
    parameters of the language model are trained.
    """
    names = method.trained_parameters(model, config)
    if unknown := set(names) - {n for n, _ in model.named_parameters(remove_duplicate=False)}:
        raise TargetError(f"{method.name}: trained_parameters: {min(unknown)}: no such parameter")
    if not method.kinds:
        exclude = {*fully_trained, *_output(model)}
        names = parameters_within(model, names, config.target_modules, config.layers, exclude)
    untrained = (*fully_trained, *outside_language_model(model))
    found = [name for name in names if not is_within(name, untrained)]
    if not method.kinds and not found:
        raise TargetError(
            f"adapter.method: {method.name} finds nothing to train in {type(model).__name__}; "
            "allowed: target_modules and layers with parameters that it trains"
        )
    return found


def _freeze_all_but(model: nn.Module, layers: Mapping[str, AdapterLayer]) -> None:
    trained = {id(p) for layer in layers.values() for p in layer.adapter_parameters().values()}
    for parameter in model.parameters():
        if id(parameter) not in trained:
            parameter.requires_grad_(False)


def _kind(target: Target) -> str:
    if target.parameter is not None:
        return "parameter"
    return "slice" if target.rows is not None else kind_of(target.module)


def _wrap(method: Method, target: Target, config: AdapterSection, name: str) -> AdapterLayer:
    if target.parameter is not None:
        return method.wrap(ParameterView(target.module, target.parameter), config, name)
    if target.rows is None:
        return method.wrap(target.module, config, name)
    layer = method.wrap(RowView(target.module, target.rows), config, name)
    if not layer.can_be_part():
        raise TargetError(
            f"adapter.target_modules: {method.name} cannot save {name}, a part of a module; "
            f"allowed: whole modules, or join and split of {type(layer).__name__}"
        )
    return layer


def replace_modules(model: nn.Module, layers: Mapping[str, AdapterLayer]) -> None:
    """Replace each base module with its layer, and fused projections and modules of which
    parameters are adapted with one layer each."""
    fused: dict[str, dict[str, AdapterLayer]] = {}
    whole: dict[str, AdapterLayer] = {}
    for name, layer in layers.items():
        if isinstance(layer.base_layer, RowView):
            projection, _, role = name.rpartition(".")
            fused.setdefault(projection, {})[role] = layer
        else:
            whole[name] = layer
    for name, replacement in with_adapted_parameters(model, whole).items():
        model.set_submodule(name, replacement)
    for name, parts in fused.items():
        model.set_submodule(name, CompositeLayer(model.get_submodule(name), parts))


def report(model: nn.Module, method: str, fully_trained: Sequence[str]) -> InjectionReport:
    """Describe the adapter that ``model`` has; a shared parameter is counted once."""
    modules = tuple(
        AdaptedModule(name, layer.base_shape, layer.r)
        for name, layer in adapter_layers(model).items()
    )
    parameters = list(model.parameters())
    return InjectionReport(
        method=method,
        adapted_modules=modules,
        modules_to_save=tuple(fully_trained),
        trainable_parameters=sum(p.numel() for p in parameters if p.requires_grad),
        total_parameters=sum(p.numel() for p in parameters),
    )


def find_heads(model: nn.Module) -> list[str]:
    """The classification head: the children of a transformers classifier except its base model."""
    if not isinstance(model, PreTrainedModel) or "Classification" not in type(model).__name__:
        return []
    return [
        name
        for name, child in model.named_children()
        if name != model.base_model_prefix and any(True for _ in child.parameters())
    ]


def find_fully_trained(
    model: nn.Module, config: AdapterSection, heads: Iterable[str] | None = None
) -> tuple[str, ...]:
    """The fully trained modules: ``heads`` (default: the classification head), then
    ``config.modules_to_save``. Raises TargetError if one does not exist."""
    heads = find_heads(model) if heads is None else heads
    return tuple(dict.fromkeys([*heads, *_named(model, config.modules_to_save)]))


def trained_base_parameters(model: nn.Module, fully_trained: Sequence[str]) -> dict[str, Tensor]:
    """The base's own parameters that are trained, by name, except those of adapter layers, rows of
    tokens and the modules ``fully_trained``."""
    layers = [f"{name}." for name in (*adapter_layers(model), *token_rows(model))]
    inside = tuple(f"{name}." for name in fully_trained)
    found: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        plain = plain_name(name)
        in_adapter = any(
            plain.startswith(prefix) and not plain.startswith(f"{prefix}base_layer.")
            for prefix in layers
        )
        if parameter.requires_grad and not in_adapter and not plain.startswith(inside):
            found[plain] = parameter
    return found


def trainable_state(model: nn.Module) -> dict[str, Tensor]:
    """All trained parameters, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _named(model: nn.Module, names: Sequence[str]) -> list[str]:
    found: list[str] = []
    for wanted in names:
        matching = [n for n, _ in model.named_modules() if is_suffix(wanted, n)]
        if not matching:
            last_parts = sorted({n.rpartition(".")[2] for n, _ in model.named_modules()} - {""})
            allowed = ", ".join(part for part in last_parts if not part.isdigit())
            raise TargetError(
                f"adapter.modules_to_save: {wanted!r} matches no module; allowed: {allowed}"
            )
        found.extend(matching)
    return found


def _output(model: nn.Module) -> list[str]:
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    return [name for name, module in model.named_modules() if head is not None and module is head]
