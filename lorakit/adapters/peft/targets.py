"""Which modules an ``adapter_config.json`` adapts, according to PEFT's rules (0.21)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from lorakit.adapters.peft.schema import modules_to_save

#: Conversion of transformers -> the names that PEFT takes for those of experts.
_EXPERT_NAMES = {
    "mixtral": frozenset({"gate", "w1", "w2", "w3"}),
    "qwen2_moe": frozenset({"gate", "gate_proj", "up_proj", "down_proj"}),
}
#: Model types with a state space, and the modules that PEFT refuses to adapt in them.
_STATE_SPACE = frozenset({"falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h"})
_REFUSED = frozenset({"out_proj", "conv1d"})


def misread_by_peft(model: nn.Module, adapted: Iterable[str]) -> list[str]:
    """The ends of the names ``adapted`` that PEFT takes for experts, although they are none.

    PEFT 0.19 to 0.21 with transformers 5 turns targets named as the experts of transformers 4 were
    into ``target_parameters`` of the stacked experts, for the model types that transformers
    converts as Mixtral or Qwen2-MoE: an adapter of dense layers or shared experts of that name is
    put on the experts, or refused.
    """
    from transformers import conversion_mapping

    conversions: Mapping[str, str] = getattr(conversion_mapping, "_MODEL_TO_CONVERSION_PATTERN", {})
    model_type = getattr(getattr(model, "config", None), "model_type", "")
    kind = "mixtral" if model_type == "mixtral" else conversions.get(model_type, "")
    taken = _EXPERT_NAMES.get(kind, frozenset())
    return sorted(taken & {name.rpartition(".")[2] for name in adapted})


def misread_note(misread: Iterable[str]) -> str:
    """What ``misread_by_peft`` found, as it is said."""
    return (
        f"PEFT 0.19 to 0.21 with transformers 5 takes {', '.join(misread)} for experts and "
        "misreads the adapter; lorakit does not"
    )


def refused_by_peft(model: nn.Module, adapted: Iterable[str]) -> list[str]:
    """The ends of the names ``adapted`` that PEFT from 0.16 on refuses to adapt in the model."""
    model_type = getattr(getattr(model, "config", None), "model_type", "")
    taken = _REFUSED if model_type in _STATE_SPACE else frozenset()
    return sorted(taken & {name.rpartition(".")[2] for name in adapted})


def refused_note(refused: Iterable[str]) -> str:
    """What ``refused_by_peft`` found, as it is said."""
    return (
        f"PEFT from 0.16 on does not load an adapter of {' and '.join(refused)} for models with "
        "Mamba layers; lorakit does"
    )


def unadapted_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules as they were before adaption: adapter layers count as what they wrap."""
    from lorakit.layers import BaseWrapper  # imports transformers

    found: dict[str, nn.Module] = {}
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if name and not name.startswith(inside or ("\0",)):
            adapted = isinstance(module, BaseWrapper)
            found[name] = module.base_layer if adapted else module
            inside += (f"{name}.",) if adapted else ()
    return found


def matched_modules(config: Mapping[str, Any], model: nn.Module) -> set[str]:
    """The modules that PEFT would adapt with this configuration."""
    from lorakit.layers import ADAPTABLE

    names = unadapted_modules(model)
    targets = config.get("target_modules")
    if isinstance(targets, str) and targets.lower() == "all-linear":
        linear = [n for n, m in names.items() if isinstance(m, ADAPTABLE[:2])]
        return {n for n in linear if not _excluded(config, n) and not n.endswith("lm_head")}
    return {name for name in names if is_targeted(config, name)}


def target_modules(
    adapted: Sequence[str], names: Iterable[str], config: Mapping[str, Any]
) -> list[str] | str:
    """The shortest dotted ends with which PEFT adapts exactly ``adapted`` among ``names``, or,
    where there are none, a regular expression."""
    wanted = set(adapted)
    others = [n for n in names if n not in wanted and not _excluded(config, n)]
    taken = {end for name in others for end in _ends(name)}
    chosen: set[str] = set()
    for name in adapted:
        end = next((end for end in _ends(name) if end not in taken), None)
        if end is None:
            return "|".join(re.escape(name) for name in adapted)
        chosen.add(end)
    return sorted(chosen)


def exact_patterns(patterns: Mapping[str, Any], adapted: Iterable[str]) -> dict[str, Any]:
    """Name -> value as PEFT's expressions: the names themselves, anchored where one would also
    fit another module."""
    names = set(adapted)
    clash = any(
        name not in patterns or patterns[name] != value
        for pattern, value in patterns.items()
        for name in names
        if name != pattern and re.match(rf"(.*\.)?({pattern})$", name)
    )
    return {f"^{re.escape(n)}": v for n, v in patterns.items()} if clash else dict(patterns)


def _ends(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[i:]) for i in reversed(range(len(parts)))]


def _excluded(config: Mapping[str, Any], name: str) -> bool:
    excluded = config.get("exclude_modules") or []
    if isinstance(excluded, str):
        if re.fullmatch(excluded, name):
            return True
    elif any(name == end or name.endswith(f".{end}") for end in excluded):
        return True
    saved = modules_to_save(config)
    return any(re.match(rf"(^|.*\.){module}($|\..*)", name) for module in saved)


def is_targeted(config: Mapping[str, Any], name: str) -> bool:
    """Whether PEFT would adapt the module of that name, were it of a kind that it adapts."""
    targets = config.get("target_modules") or []
    if _excluded(config, name):
        return False
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    if not any(name == end or name.endswith(f".{end}") for end in targets):
        return False
    layers = config.get("layers_to_transform")
    # As in PEFT, a name that is listed in full is adapted whatever its layer.
    if layers is None or layers == [] or name in targets:
        return True
    index = _layer_index(config, name)
    return index is not None and index in ([layers] if isinstance(layers, int) else layers)


def _layer_index(config: Mapping[str, Any], name: str) -> int | None:
    patterns = config.get("layers_pattern") or [r"[^.]*"]
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        start = r".*?\." if pattern == r"[^.]*" else r"(?:^|.*?\.)"
        if match := re.match(rf"{start}{pattern}\.(?P<index>\d+)\.", name):
            return int(match["index"])
    return None
