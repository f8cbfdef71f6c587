"""Roles, suffixes and patterns -> the modules of a model that are adapted."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Sequence

from torch import nn

from lorakit.errors import TargetError
from lorakit.layers import ADAPTABLE
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
#: Projections that hold q, k and v in one matrix (GPT-2, GPT-NeoX and BLOOM, Phi-3, ModernBERT).
FUSED = r"(?:^|\.)(?:c_attn|query_key_value|qkv_proj|Wqkv)$"


def find_targets(
    model: nn.Module,
    target_modules: Sequence[str],
    layers: Sequence[int] | str | None = None,
    exclude: Collection[str] = (),
) -> dict[str, nn.Module]:
    """Name -> module, in the model's order, for every module that any of the targets names.

    ``layers`` keeps the modules of those layer indices; ``exclude`` names modules (heads, the
    output layer) that ``all-linear`` leaves alone. Raises TargetError if a target, or the choice of
    layers, matches nothing, or if a role lies inside a fused projection.
    """
    linear = _adaptable(model)
    chosen: set[str] = set()
    for target in target_modules:
        found = _match(target, linear, exclude)
        if not found:
            raise TargetError(_no_match(target, linear))
        chosen |= found
    if layers is not None:
        chosen = _in_layers(chosen, layers)
    return {name: module for name, module in linear.items() if name in chosen}


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


def _match(target: str, linear: dict[str, nn.Module], exclude: Collection[str]) -> set[str]:
    no_embeddings = [n for n, m in linear.items() if not isinstance(m, nn.Embedding)]
    if target == "all-linear":
        heads = tuple(f"{name}." for name in exclude)
        return {n for n in no_embeddings if not f"{n}.".startswith(heads or ("\0",))}
    if target == "attention":
        return {n for n in no_embeddings if any(re.search(p, n) for p in (*ROLES.values(), FUSED))}
    if target in ROLES:
        fused = [n for n in no_embeddings if re.search(FUSED, n)]
        if fused and target != "o":
            raise TargetError(
                f"adapter.target_modules: {target!r} lies inside the fused projection "
                f"{describe_modules(fused)}, and a slice of it cannot be adapted yet; name the "
                f"whole, {fused[0].rpartition('.')[2]!r}, or use 'attention'"
            )
        return {n for n in no_embeddings if re.search(ROLES[target], n)}
    if target.startswith("re:"):
        return {name for name in linear if re.fullmatch(target[3:], name)}
    return {name for name in linear if name == target or name.endswith(f".{target}")}


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
