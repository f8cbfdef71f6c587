"""How much of a model's attention, MLPs and experts the targets cover, and what they miss."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from lorakit.anatomy import (
    Weight,
    adaptable_modules,
    is_within,
    outside_language_model,
    weights,
)
from lorakit.base_weight import dense_weight
from lorakit.module_names import ROLES, describe_modules, layer_of
from lorakit.recipe.layer_ranges import layer_indices
from lorakit.targets import Target, unreachable

#: Parts whose share is reported even if none of it is covered.
_MAIN = ("attention", "MLP", "expert")
_PARTS = (*_MAIN, "state-space")
_LABELS = {
    "expert": "experts",
    "router": "routers",
    "state-space": "state-space weights",
    "other": "other weights",
}


@dataclass(frozen=True)
class PartCoverage:
    """The number of parameters in the weights of a part of the model, and how many are covered."""

    covered: int
    total: int


@dataclass(frozen=True)
class Missed:
    """Weights that ``targets`` ask for but that are not adapted; without ``targets``, weights that
    no target can reach.

    ``modules`` lists their names, abbreviated; ``parameters`` is the number of their parameters,
    ``share`` that number as a fraction of the whole model.
    """

    targets: tuple[str, ...]
    what: str
    modules: str
    parameters: int
    share: float
    reason: str = ""

    def __str__(self) -> str:
        by = f" by {', '.join(self.targets)}" if self.targets else ""
        reason = f": {self.reason}" if self.reason else ""
        share = _percent(self.parameters, self.share)
        return f"not adapted{by}: {self.what} {self.modules} ({share} of all parameters){reason}"


@dataclass(frozen=True)
class Coverage:
    """How much of each part (attention, MLP, expert, state-space) the targets cover, and what they
    miss."""

    parts: Mapping[str, PartCoverage]
    missed: tuple[Missed, ...] = ()

    def __str__(self) -> str:
        shares = [
            f"{_percent(part.covered, part.covered / part.total)} of {name}"
            for name, part in self.parts.items()
        ]
        lines = [f"targets cover {', '.join(shares)} parameters"] if shares else []
        return "\n".join([*lines, *map(str, self.missed)])


def measure_coverage(
    model: nn.Module,
    targets: Mapping[str, Target],
    target_modules: Sequence[str],
    layers: Sequence[int] | str | None = None,
    exclude: Collection[str] = (),
) -> Coverage:
    """Measure how much of a ``model`` that is not adapted yet is covered by ``targets``, which were
    found for ``target_modules`` and ``layers``.

    The modules ``exclude`` (heads, the output layer) and everything outside the language model of a
    multimodal model are not counted. Weights outside ``layers`` do not count as missed.
    """
    outside = outside_language_model(model)
    found = weights(model, (*exclude, *outside))
    covered = _covered(model, targets)
    parts = {
        part: PartCoverage(sum(covered.get(w.name) or covered.get(w.owner, 0) for w in own), total)
        for part in _PARTS
        if (own := [w for w in found if w.part == part])
        and (total := sum(w.parameters for w in own))
    }
    everything = sum(parameter.numel() for parameter in model.parameters())
    missed = _missed(model, found, targets, target_modules, layers)
    return Coverage(parts, (*_grouped(missed, everything), *missed_outside(model)))


def _covered(model: nn.Module, targets: Mapping[str, Target]) -> dict[str, int]:
    """The number of target parameters in the weight of each module, over all parts of a fused one,
    and in each adapted parameter."""
    names = {id(module): name for name, module in model.named_modules()}
    found: dict[str, int] = {}
    for name, target in targets.items():
        if target.parameter is not None:
            found[name] = target.module.get_parameter(target.parameter).numel()
            continue
        weight = dense_weight(target.module)
        size = (weight if target.rows is None else target.rows.of(weight)).numel()
        owner = names[id(target.module)]
        found[owner] = found.get(owner, 0) + size
    return found


def _missed(
    model: nn.Module,
    found: Sequence[Weight],
    targets: Mapping[str, Target],
    target_modules: Sequence[str],
    layers: Sequence[int] | str | None,
) -> dict[str, tuple[Weight, list[str]]]:
    """The weights that are not targets, by name, with the ``target_modules`` that ask for them."""
    linear = adaptable_modules(model)
    adapted = {id(target.module) for target in targets.values() if target.parameter is None}
    free = [
        w
        for w in found
        if w.name not in targets and id(model.get_submodule(w.owner)) not in adapted
    ]
    if layers is not None:
        wanted = layer_indices(layers)
        free = [w for w in free if layer_of(w.owner) in wanted]
    missed: dict[str, tuple[Weight, list[str]]] = {}
    for target in target_modules:
        if target == "all-linear":
            own = free
        elif target == "attention":
            own = [w for w in free if w.part == "attention"]
        else:
            own = unreachable(target, free, linear)
            if (role := _role_of(target)) is not None:
                own += _beside_role(role, free, targets)
        for weight in own:
            missed.setdefault(weight.name, (weight, []))[1].append(target)
    return missed


def _role_of(target: str) -> str | None:
    """The role that ``target`` is or whose projection it names (``q_proj``); None for a longer
    suffix, which selects among these projections."""
    if "." in target:
        return None
    return next((r for r in ROLES if target == r or re.search(ROLES[r], target)), None)


def _beside_role(role: str, free: Sequence[Weight], targets: Mapping[str, Target]) -> list[Weight]:
    """The attention weights of the layers that have no module of that role."""
    has = {
        layer_of(name)
        for name, target in targets.items()
        if re.search(ROLES[role], name) or (target.rows is not None and name.endswith(f".{role}"))
    }
    return [w for w in free if w.part == "attention" and layer_of(w.owner) not in has]


def _grouped(missed: Mapping[str, tuple[Weight, list[str]]], everything: int) -> list[Missed]:
    groups: dict[tuple[tuple[str, ...], str], list[Weight]] = {}
    for weight, asked in missed.values():
        groups.setdefault((tuple(asked), _label(weight)), []).append(weight)
    return [
        Missed(
            targets=asked,
            what=what,
            modules=describe_modules([w.name.removesuffix(".weight") for w in group]),
            parameters=sum(w.parameters for w in group),
            share=sum(w.parameters for w in group) / everything,
            reason=_reason(asked, group),
        )
        for (asked, what), group in groups.items()
    ]


def _label(weight: Weight) -> str:
    if weight.stacked and weight.part == "expert":
        return "3-D expert parameters"
    if weight.linear_attention:
        return "linear attention"
    return _LABELS.get(weight.part, weight.part)


def _reason(asked: Sequence[str], group: Sequence[Weight]) -> str:
    if all(weight.stacked for weight in group):
        return "parameters, which 'experts' or adapter.target_parameters select"
    if not {"attention", "all-linear"} & set(asked) and all(w.part == "attention" for w in group):
        return "'attention' selects every kind of attention"
    if all(weight.read_past_forward for weight in group):
        return "the model reads their weights without calling them"
    return "not linear layers"


def missed_outside(model: nn.Module) -> tuple[Missed, ...]:
    """The modules of a multimodal model that no target can reach."""
    outside = outside_language_model(model)
    if not outside:
        return ()
    size = sum(p.numel() for n, p in model.named_parameters() if is_within(n, outside))
    return (
        Missed(
            targets=(),
            what="modules outside the language model",
            modules=", ".join(outside),
            parameters=size,
            share=size / sum(parameter.numel() for parameter in model.parameters()),
            reason="text does not pass through them",
        ),
    )


def _percent(count: int, share: float) -> str:
    """Format ``share`` as a percentage: 0% means none at all, and 100% means all."""
    if share in (0, 1):
        return f"{share:.0%}"
    if share < 0.001:
        return "<0.1%" if count else "0%"
    return f"{min(share, 0.999):.1%}"
