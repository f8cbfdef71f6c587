"""Roles, suffixes and patterns -> the modules of a model that are adapted."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from torch import nn

from lorakit.errors import TargetError
from lorakit.fused import FUSED, fused_rows
from lorakit.layers import ADAPTABLE, Rows
from lorakit.recipe.layers import parse_layers

_ATTENTION = r"(?:^|\.)(?:\w*attn|\w*attention|SelfAttention|EncDecAttention|attention\.output)\."
#: Role -> how the families name it (Llama, Qwen, Mistral, Gemma, Phi, OPT: q_proj; BERT, RoBERTa,
#: ELECTRA, ALBERT: query; DeBERTa-v2: query_proj; DistilBERT: q_lin; T5: q).
ROLES = {
    "q": r"(?:^|\.)(?:q_proj|query|query_proj|q_lin|q)$",
    "k": r"(?:^|\.)(?:k_proj|key|key_proj|k_lin|k)$",
    "v": r"(?:^|\.)(?:v_proj|value|value_proj|v_lin|v)$",
    "o": rf"(?:^|\.)(?:o_proj|o)$|{_ATTENTION}(?:out_proj|dense|out_lin|Wo|c_proj)$",
}


@dataclass(frozen=True)
class Target:
    """``module`` of the model, or of a fused projection only ``rows``, those of a role."""

    module: nn.Module
    rows: Rows | None = None


def find_targets(
    model: nn.Module,
    target_modules: Sequence[str],
    layers: Sequence[int] | str | None = None,
    exclude: Collection[str] = (),
) -> dict[str, Target]:
    """Name -> target, in the model's order, for all that ``target_modules`` name.

    ``layers`` keeps the modules of those layer indices; ``exclude`` names modules (heads, the
    output layer) that ``all-linear`` leaves alone. A role inside a fused projection is named
    behind it (``h.0.attn.c_attn.q``). Raises TargetError if a target, or the choice of layers,
    matches nothing, or if both a projection and a part of it are named.
    """
    linear = _adaptable(model)
    chosen: dict[str, Target] = {}
    for target in target_modules:
        found = _match(target, linear, exclude, model)
        if not found:
            raise TargetError(_no_match(target, linear))
        chosen |= found
    if layers is not None:
        kept = _in_layers(set(chosen), layers)
        chosen = {name: target for name, target in chosen.items() if name in kept}
    if both := [n for n, t in chosen.items() if t.rows and n.rpartition(".")[0] in chosen]:
        raise TargetError(
            f"adapter.target_modules: {describe_modules(both)} lie inside modules that are targets "
            "as a whole; allowed: the whole or its parts"
        )
    order = {id(module): at for at, module in enumerate(linear.values())}
    return dict(sorted(chosen.items(), key=lambda item: _place(item[1], order)))


def parameters_within(
    model: nn.Module,
    names: Sequence[str],
    target_modules: Sequence[str] | None,
    layers: Sequence[int] | str | None,
    exclude: Collection[str] = (),
) -> list[str]:
    """Those of the parameters ``names`` that belong to what ``target_modules`` (None: the whole
    model) and ``layers`` choose. Raises TargetError as ``find_targets`` does, and for a target
    that is only a part of a projection."""
    if target_modules is None:
        kept = set(names) if layers is None else _in_layers(set(names), layers)
        return [name for name in names if name in kept]
    targets = find_targets(model, target_modules, layers, exclude)
    if parts := [name for name, target in targets.items() if target.rows is not None]:
        raise TargetError(
            f"adapter.target_modules: {describe_modules(parts)} lie inside larger matrices, which "
            "train as a whole or not at all; name the whole, "
            f"{parts[0].rpartition('.')[0].rpartition('.')[2]!r}"
        )
    chosen = {id(p) for target in targets.values() for p in target.module.parameters()}
    return [name for name in names if id(model.get_parameter(name)) in chosen]


def _place(target: Target, order: dict[int, int]) -> tuple[int, int]:
    return order[id(target.module)], target.rows.start if target.rows else 0


def describe_modules(names: Sequence[str]) -> str:
    """The names in short: ``model.layers.{0-29}.self_attn.q_proj``."""
    groups: dict[str, list[int]] = {}
    for name in names:
        number = re.search(r"(?<=\.)\d+(?=\.|$)", name)
        stem = f"{name[: number.start()]}{{}}{name[number.end() :]}" if number else name
        groups.setdefault(stem, []).extend([int(number.group())] if number else [])
    return ", ".join(
        stem.replace("{}", f"{{{min(found)}-{max(found)}}}") if found else stem
        for stem, found in groups.items()
    )


def _adaptable(model: nn.Module) -> dict[str, nn.Module]:
    """Modules a target may name. What nn.MultiheadAttention holds is read past ``forward``."""
    inside = tuple(
        f"{n}." for n, m in model.named_modules() if isinstance(m, nn.MultiheadAttention)
    )
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, ADAPTABLE) and not name.startswith(inside or ("\0",))
    }


def _match(
    target: str, linear: dict[str, nn.Module], exclude: Collection[str], model: nn.Module
) -> dict[str, Target]:
    if target in ROLES:
        fits = re.compile(ROLES[target])
        found = {n: Target(m) for n, m in _no_embeddings(linear).items() if fits.search(n)}
        return found | (_slices(target, linear, model) if target != "o" else {})
    return {name: Target(linear[name]) for name in _match_whole(target, linear, exclude)}


def _match_whole(target: str, linear: dict[str, nn.Module], exclude: Collection[str]) -> list[str]:
    if target == "all-linear":
        heads = tuple(f"{name}." for name in exclude)
        return [n for n in _no_embeddings(linear) if not f"{n}.".startswith(heads or ("\0",))]
    if target == "attention":
        fits = (*ROLES.values(), FUSED)
        return [n for n in _no_embeddings(linear) if any(re.search(p, n) for p in fits)]
    if target.startswith("re:"):
        return [name for name in linear if re.fullmatch(target[3:], name)]
    return [name for name in linear if name == target or name.endswith(f".{target}")]


def _slices(role: str, linear: dict[str, nn.Module], model: nn.Module) -> dict[str, Target]:
    """The rows of q, k or v in every fused projection of the model."""
    found = {}
    for name, module in _no_embeddings(linear).items():
        if re.search(FUSED, name):
            rows = fused_rows(module, model).get(role)
            if rows is None:
                raise TargetError(
                    f"adapter.target_modules: {role!r} lies inside {name}, and how "
                    f"{type(model).__name__} lays q, k and v out in it is not known; name the "
                    f"whole, {name.rpartition('.')[2]!r}"
                )
            found[f"{name}.{role}"] = Target(module, rows)
    return found


def _no_embeddings(linear: dict[str, nn.Module]) -> dict[str, nn.Module]:
    return {n: m for n, m in linear.items() if not isinstance(m, nn.Embedding)}


def _no_match(target: str, linear: dict[str, nn.Module]) -> str:
    ends = sorted({name.rpartition(".")[2] for name in linear})
    near = difflib.get_close_matches(target, [*ends, *ROLES, "attention", "all-linear"], 1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    return (
        f"adapter.target_modules: {target!r} matches no linear or embedding module{hint}; "
        f"the model has {describe_modules(list(linear)) or 'none'}"
    )


def _in_layers(names: set[str], layers: Sequence[int] | str) -> set[str]:
    wanted = set(parse_layers(layers) if isinstance(layers, str) else layers)
    index = {n: int(m.group(1)) for n in names if (m := re.search(r"\.(\d+)\.", f".{n}"))}
    missing = wanted - set(index.values())
    if missing:
        have = sorted(set(index.values()))
        raise TargetError(
            f"adapter.layers: no layer {', '.join(map(str, sorted(missing)))} among the targets; "
            f"allowed: {f'{have[0]} to {have[-1]}' if have else 'none, the targets have no layers'}"
        )
    return {name for name, number in index.items() if number in wanted}
