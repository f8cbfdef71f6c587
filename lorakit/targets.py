"""Find the modules selected by the roles, suffixes and patterns of ``adapter.target_modules``."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from lorakit.anatomy import (
    FUSED,
    Weight,
    adaptable_modules,
    fused_rows,
    is_text_part,
    is_within,
    outside_language_model,
    part_of,
    reads_past_forward,
    weights,
)
from lorakit.base_weight import ADAPTABLE
from lorakit.errors import TargetError
from lorakit.kernels.low_rank import RowSlice
from lorakit.module_names import ROLES, base_names, describe_modules, layer_of, matches
from lorakit.parameters import find_parameters, stacked_experts
from lorakit.recipe.layer_ranges import format_layers, layer_indices

#: Parts in which ``key`` and ``value`` do not belong to attention (RWKV's feed_forward.key).
_NO_ATTENTION = ("MLP", "expert", "router")
_NOT_TEXT = re.compile(r"(?i)visual|vision|image|video|audio|speech|projector|merger|tower|mtp")


@dataclass(frozen=True)
class Target:
    """A module to adapt, the ``rows`` of a role in a fused projection, or a ``parameter`` of the
    module, which is not a linear layer."""

    module: nn.Module
    rows: RowSlice | None = None
    parameter: str | None = None


def find_targets(
    model: nn.Module,
    target_modules: Sequence[str],
    layers: Sequence[int] | str | None = None,
    exclude: Collection[str] = (),
    target_parameters: Sequence[str] = (),
) -> dict[str, Target]:
    """The targets that ``target_modules`` and ``target_parameters`` name, by the names of modules
    and parameters, in the model's order.

    ``layers`` restricts them to layer indices; ``exclude`` are modules (heads, the output layer)
    that ``all-linear`` and ``attention`` skip. A role in a fused projection has the projection's
    name as a prefix (``h.0.attn.c_attn.q``). Raises TargetError if a target or ``layers`` matches
    nothing, or if both a projection and a part of it are named.
    """
    if isinstance(model, ADAPTABLE):
        raise TargetError(
            f"adapter.target_modules: the model is itself a {type(model).__name__}, and an adapter "
            "replaces modules inside a model; wrap it, as in nn.Sequential(model)"
        )
    linear = adaptable_modules(model)
    chosen: dict[str, Target] = {}
    for target in target_modules:
        found = _match(target, linear, exclude, model)
        if not found:
            raise TargetError(_no_match(target, linear, model))
        chosen |= found
    for target in target_parameters:
        chosen |= _parameters(find_parameters(target, model))
    if layers is not None:
        kept = _in_layers(set(chosen), layers)
        chosen = {name: target for name, target in chosen.items() if name in kept}
    if both := [n for n, t in chosen.items() if t.rows and n.rpartition(".")[0] in chosen]:
        raise TargetError(
            f"adapter.target_modules: {describe_modules(both)} are parts of modules that are also "
            "targets; allowed: either a module or its parts"
        )
    order = {id(module): at for at, module in enumerate(model.modules())}
    return dict(sorted(chosen.items(), key=lambda item: _position(item[1], order)))


def parameters_within(
    model: nn.Module,
    names: Sequence[str],
    target_modules: Sequence[str] | None,
    layers: Sequence[int] | str | None,
    exclude: Collection[str] = (),
) -> list[str]:
    """Select from the parameters ``names`` those in ``target_modules`` (None: the whole model) and
    ``layers``. Raises TargetError as ``find_targets`` does, and for a target that is only a part of
    a projection."""
    if target_modules is None:
        kept = set(names) if layers is None else _in_layers(set(names), layers)
        return [name for name in names if name in kept]
    targets = find_targets(model, target_modules, layers, exclude)
    if parts := [name for name, target in targets.items() if target.rows is not None]:
        raise TargetError(
            f"adapter.target_modules: {describe_modules(parts)} are parts of larger matrices, and "
            "this method trains whole matrices only; hint: use "
            f"{parts[0].rpartition('.')[0].rpartition('.')[2]!r}"
        )
    chosen = {id(p) for target in targets.values() for p in target.module.parameters()}
    return [name for name in names if id(model.get_parameter(name)) in chosen]


def _position(target: Target, order: dict[int, int]) -> tuple[int, int]:
    names = [name for name, _ in target.module.named_parameters(recurse=False)]
    inside = names.index(target.parameter) if target.parameter else 0
    return order[id(target.module)], target.rows.start if target.rows else inside


def _match(
    target: str, linear: dict[str, nn.Module], exclude: Collection[str], model: nn.Module
) -> dict[str, Target]:
    if target in ROLES:
        found = {n: Target(linear[n]) for n in _projections(ROLES[target], linear, model)}
        return found | (_slices(target, linear, model) if target != "o" else {})
    if target == "attention":
        return {name: Target(linear[name]) for name in _attention(linear, exclude, model)}
    if target == "experts":
        classes = _classes(model)
        found = {n: Target(m) for n, m in linear.items() if part_of(n, classes) == "expert"}
        return found | _parameters(stacked_experts(model))
    if target == "all-linear":
        classes = _classes(model)
        kept = _no_embeddings(linear)
        return {
            name: Target(module)
            for name, module in kept.items()
            if not is_within(name, tuple(exclude)) and not _is_dead_router(name, model, classes)
        }
    own = {name: Target(module) for name, module in linear.items() if matches(target, name)}
    if own or not is_text_part(model):
        return own
    return {
        name: Target(module)
        for name, module in linear.items()
        if any(matches(target, alias) for alias in base_names(name))
    }


def _parameters(found: dict[str, nn.Module]) -> dict[str, Target]:
    return {name: Target(m, parameter=name.rpartition(".")[2]) for name, m in found.items()}


def _is_dead_router(name: str, model: nn.Module, classes: dict[str, str]) -> bool:
    """Whether the module is a router whose weight the model reads without calling it, as in
    LongCat-Flash: an adapter would never be trained."""
    return part_of(name, classes) == "router" and reads_past_forward(model, name)


def _projections(role: str, linear: dict[str, nn.Module], model: nn.Module) -> list[str]:
    """The modules outside MLPs whose names match the pattern ``role``."""
    classes = _classes(model)
    return [
        name
        for name in _no_embeddings(linear)
        if re.search(role, name) and part_of(name, classes) not in _NO_ATTENTION
    ]


def _classes(model: nn.Module) -> dict[str, str]:
    return {name: type(module).__name__ for name, module in model.named_modules()}


def _attention(
    linear: dict[str, nn.Module], exclude: Collection[str], model: nn.Module
) -> list[str]:
    """Projections of every kind of attention: with heads, latent (MLA), linear and gated."""
    classes = _classes(model)
    named = {n for fits in (*ROLES.values(), FUSED) for n in _projections(fits, linear, model)}
    return [
        name
        for name in _no_embeddings(linear)
        if not is_within(name, tuple(exclude))
        and (name in named or part_of(name, classes) == "attention")
    ]


def _slices(role: str, linear: dict[str, nn.Module], model: nn.Module) -> dict[str, Target]:
    """The rows of q, k or v in every fused projection of the model."""
    found = {}
    for name, module in _no_embeddings(linear).items():
        if re.search(FUSED, name):
            rows = fused_rows(module, model).get(role)
            if rows is None:
                raise TargetError(
                    f"adapter.target_modules: {role!r} is a part of {name}, and the "
                    f"layout of q, k and v in it is unknown for {type(model).__name__}; hint: use "
                    f"{name.rpartition('.')[2]!r}"
                )
            found[f"{name}.{role}"] = Target(module, rows)
    return found


def _no_embeddings(linear: dict[str, nn.Module]) -> dict[str, nn.Module]:
    return {n: m for n, m in linear.items() if not isinstance(m, nn.Embedding)}


def unreachable(
    target: str, found: Sequence[Weight], linear: Mapping[str, nn.Module]
) -> list[Weight]:
    """The weights in ``found`` that ``target``, a suffix or pattern, matches but that do not belong
    to a module of ``linear``, such as routers or experts in a 3-D parameter."""
    return [
        weight
        for weight in found
        if weight.owner not in linear and any(matches(target, name) for name in _aliases(weight))
    ]


def _aliases(weight: Weight) -> list[str]:
    """The names by which a user may refer to a weight: its own, its module's and, for stacked
    experts, the usual names of an expert's projections."""
    names = [weight.name, weight.owner]
    if weight.part == "expert" and weight.stacked:
        leaf = weight.name.removeprefix(f"{weight.owner}.")
        second = leaf == "weight" and "output" in weight.owner
        down = second or any(part in leaf for part in ("down", "w2", "output"))
        kinds = (
            ("down_proj", "w2") if down else ("gate_up_proj", "gate_proj", "up_proj", "w1", "w3")
        )
        names += [f"{weight.owner}.{kind}" for kind in kinds]
        names += [f"{weight.owner}.0.{kind}" for kind in kinds]
    return names


def _no_match(target: str, linear: dict[str, nn.Module], model: nn.Module) -> str:
    start = f"adapter.target_modules: {target!r}"
    outside = outside_language_model(model)
    found = weights(model)
    allowed = f"allowed: {describe_modules(list(linear)) or 'none'}"
    if missed := unreachable(target, [w for w in found if not is_within(w.name, outside)], linear):
        names = describe_modules([w.name.removesuffix(".weight") for w in missed])
        if all(w.stacked for w in missed):
            return (
                f"{start} names experts, which this model stores as 3-D parameters and not as "
                f"linear layers ({names}); hint: 'experts' adapts all of them, and "
                f"adapter.target_parameters names single ones; {allowed}"
            )
        if any(matches(target, w.name) for w in missed):
            return _names_parameters(start, [w.name for w in missed], model, allowed)
        classes = sorted({type(model.get_submodule(w.owner)).__name__ for w in missed})
        return (
            f"{start} names {names}, of class {', '.join(classes)}, which is not a plain "
            f"linear layer and cannot be adapted; {allowed}"
        )
    if [n for n, _ in model.named_modules() if is_within(n, outside) and matches(target, n)]:
        return (
            f"{start} matches only modules of {', '.join(outside)}, which text does not pass "
            f"through; {allowed}"
        )
    if own := [n for n, _ in model.named_parameters() if matches(target, n)]:
        return _names_parameters(start, own, model, allowed)
    if is_text_part(model) and _NOT_TEXT.search(target):
        return (
            f"{start}: only the language model of this multimodal base is loaded for text, without "
            f"its vision or audio tower and its other parts; {allowed}"
        )
    ends = {name.rpartition(".")[2] for name in linear}
    roles = {role for role, fits in ROLES.items() if any(re.search(fits, n) for n in linear)}
    others = sorted({*ends, *roles, "attention", "experts", "all-linear"} - {target})
    near = [n for n in others if n.lower() == target.lower()]
    near = near or difflib.get_close_matches(target, others, 1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    if target in ROLES and (
        own := sorted({n.rpartition(".")[2] for n in _attention(linear, (), model)})
    ):
        hint = f" (the attention modules are {', '.join(own)}; 'attention' selects all of them)"
    return f"{start} matches no linear or embedding module{hint}; {allowed}"


def _names_parameters(start: str, names: Sequence[str], model: nn.Module, allowed: str) -> str:
    owners = [model.get_submodule(name.rpartition(".")[0]) for name in names]
    classes = ", ".join(sorted({type(owner).__name__ for owner in owners}))
    what = "is a parameter" if len(names) == 1 else "are parameters"
    return (
        f"{start}: {describe_modules(names)} {what} of {classes}, not a linear layer: only linear "
        f"layers and embeddings can be adapted; {allowed}"
    )


def _in_layers(names: set[str], layers: Sequence[int] | str) -> set[str]:
    wanted = layer_indices(layers)
    index = {name: layer for name in names if (layer := layer_of(name)) is not None}
    missing = wanted - set(index.values())
    if missing:
        have = format_layers(index.values())
        have = have if "," in have else have.replace("-", " to ")
        raise TargetError(
            f"adapter.layers: no layer {', '.join(map(str, sorted(missing)))} among the targets; "
            f"allowed: {have or 'none, the targets have no layers'}"
        )
    return {name for name, number in index.items() if number in wanted}
