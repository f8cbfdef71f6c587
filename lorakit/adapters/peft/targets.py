"""Match an adapter's configuration with the modules of a model, by the rules of PEFT 0.21.

A multimodal base and its text part name the same modules differently: ``model.layers`` where the
text part was loaded alone is ``model.language_model.layers`` in the base's own class. Two names
refer to the same module if they are equal without their leading wrappers.

Importing this module does not import transformers, which a merge can do without.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from lorakit.adapters.peft.ranks import peft_alpha, peft_rank
from lorakit.adapters.peft.read import AdapterFiles, split_key
from lorakit.adapters.peft.schema import (
    EMBEDDING_FACTORS,
    LINEAR_FACTORS,
    modules_to_save,
)
from lorakit.errors import AdapterError
from lorakit.module_names import is_suffix, without_wrappers

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

#: Conversion scheme of transformers -> module names that PEFT takes for those of experts.
_EXPERT_NAMES = {
    "mixtral": frozenset({"gate", "w1", "w2", "w3"}),
    "qwen2_moe": frozenset({"gate", "gate_proj", "up_proj", "down_proj"}),
}
#: State-space model types, and the modules that PEFT refuses to adapt in them.
_STATE_SPACE = frozenset({"falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h"})
_REFUSED = frozenset({"out_proj", "conv1d"})

#: First parts of a tensor's name after that of its module, apart from ``lora_*``.
_OWN = frozenset({"weight", "bias", "base_layer", "token_adapter"})


def is_targeted(config: Mapping[str, Any], name: str) -> bool:
    """Whether PEFT would adapt the module ``name``, given that it can adapt its class."""
    targets = config.get("target_modules") or []
    if _is_excluded(config, name):
        return False
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    if not any(is_suffix(suffix, name) for suffix in targets):
        return False
    layers = config.get("layers_to_transform")
    # As in PEFT, a name that is listed in full is adapted in any layer.
    if layers is None or layers == [] or name in targets:
        return True
    index = _layer_index(config, name)
    return index is not None and index in ([layers] if isinstance(layers, int) else layers)


def matched_modules(config: Mapping[str, Any], model: nn.Module) -> set[str]:
    """Return the names of the modules that PEFT would adapt in ``model``."""
    from lorakit.base_weight import ADAPTABLE

    modules = unadapted_modules(model)
    targets = config.get("target_modules")
    if isinstance(targets, str) and targets.lower() == "all-linear":
        linear = [n for n, m in modules.items() if isinstance(m, ADAPTABLE[:2])]
        return {n for n in linear if not _is_excluded(config, n) and not n.endswith("lm_head")}
    return {name for name in modules if is_targeted(config, name)}


def target_modules(
    adapted: Sequence[str], names: Iterable[str], config: Mapping[str, Any]
) -> list[str] | str:
    """Return the shortest suffixes for which PEFT adapts exactly ``adapted`` among ``names``, or a
    regular expression where no suffixes do."""
    wanted = set(adapted)
    others = [n for n in names if n not in wanted and not _is_excluded(config, n)]
    taken = {suffix for name in others for suffix in _suffixes(name)}
    chosen: set[str] = set()
    for name in adapted:
        found = next((suffix for suffix in _suffixes(name) if suffix not in taken), None)
        if found is None:
            return "|".join(re.escape(name) for name in adapted)
        chosen.add(found)
    return sorted(chosen)


def exact_patterns(patterns: Mapping[str, Any], adapted: Iterable[str]) -> dict[str, Any]:
    """Turn names into PEFT's regular expressions: the names themselves, anchored if one of them
    would also match another module of ``adapted``."""
    names = set(adapted)
    ambiguous = any(
        name not in patterns or patterns[name] != value
        for pattern, value in patterns.items()
        for name in names
        if name != pattern and re.match(rf"(.*\.)?({pattern})$", name)
    )
    return {f"^{re.escape(n)}": v for n, v in patterns.items()} if ambiguous else dict(patterns)


def _suffixes(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[i:]) for i in reversed(range(len(parts)))]


def _is_excluded(config: Mapping[str, Any], name: str) -> bool:
    excluded = config.get("exclude_modules") or []
    if isinstance(excluded, str):
        if re.fullmatch(excluded, name):
            return True
    elif any(is_suffix(suffix, name) for suffix in excluded):
        return True
    saved = modules_to_save(config)
    return any(re.match(rf"(^|.*\.){module}($|\..*)", name) for module in saved)


def _layer_index(config: Mapping[str, Any], name: str) -> int | None:
    patterns = config.get("layers_pattern") or [r"[^.]*"]
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        start = r".*?\." if pattern == r"[^.]*" else r"(?:^|.*?\.)"
        if match := re.match(rf"{start}{pattern}\.(?P<index>\d+)\.", name):
            return int(match["index"])
    return None


def unadapted_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules by name as they were before they were adapted: an adapter layer counts as
    the module that it wraps."""
    from lorakit.layers import BaseWrapper
    from lorakit.models.token_rows import TokenRows
    from lorakit.parameters import AdaptedParameters

    found: dict[str, nn.Module] = {}
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if name and not name.startswith(inside):
            adapted = isinstance(module, BaseWrapper | AdaptedParameters | TokenRows)
            found[name] = module.base_layer if adapted else module
            inside += (f"{name}.",) if adapted else ()
    return found


def misread_by_peft(model: nn.Module, adapted: Iterable[str]) -> list[str]:
    """Return the last parts of the names ``adapted`` that PEFT mistakes for experts.

    With transformers 5, PEFT 0.19 to 0.21 turns targets with the names of transformers 4's experts
    into ``target_parameters`` of the stacked experts, for every model type that
    transformers converts like Mixtral or Qwen2-MoE. An adapter of dense layers or shared experts
    with such a name is then applied to the experts, or rejected.
    """
    from transformers import conversion_mapping

    conversions: Mapping[str, str] = getattr(conversion_mapping, "_MODEL_TO_CONVERSION_PATTERN", {})
    model_type = getattr(getattr(model, "config", None), "model_type", "")
    kind = "mixtral" if model_type == "mixtral" else conversions.get(model_type, "")
    taken = _EXPERT_NAMES.get(kind, frozenset())
    return sorted(taken & {name.rpartition(".")[2] for name in adapted})


def misread_note(misread: Iterable[str]) -> str:
    """The note about ``misread_by_peft``."""
    return (
        f"PEFT 0.19 to 0.21 with transformers 5 mistakes {', '.join(misread)} for experts and "
        "misreads the adapter; lorakit does not"
    )


def refused_by_peft(model: nn.Module, adapted: Iterable[str]) -> list[str]:
    """Return the last parts of the names ``adapted`` that PEFT 0.16 and later refuse to adapt."""
    model_type = getattr(getattr(model, "config", None), "model_type", "")
    taken = _REFUSED if model_type in _STATE_SPACE else frozenset()
    return sorted(taken & {name.rpartition(".")[2] for name in adapted})


def refused_note(refused: Iterable[str]) -> str:
    """The note about ``refused_by_peft``."""
    return (
        f"PEFT 0.16 and later do not load an adapter of {' and '.join(refused)} for models with "
        "Mamba layers; lorakit does"
    )


def names_in_base(model: nn.Module, config: PreTrainedConfig) -> BaseNames | None:
    """Return the names of ``model``'s modules in the class that ``config``, the base's
    configuration, names; None if they are the same, because ``model`` is not only its text part.

    Raises AdapterError if that class lacks a module of ``model``.
    """
    import transformers

    from lorakit.models.hub import quiet

    named = list(config.architectures or ())
    text = config.get_text_config()
    part_config: Any = getattr(model, "config", None)
    if text is config or type(model).__name__ in named or type(part_config) is not type(text):
        return None
    own = getattr(transformers, named[0], None) if named else None
    if not isinstance(own, type) or not issubclass(own, transformers.PreTrainedModel):
        return None
    with torch.device("meta"), quiet():
        return BaseNames(model, own(config))


class BaseNames:
    """Translates names of a text part's modules into those of ``own``, the base's whole model.

    Raises AdapterError if ``own`` lacks a parameter of ``model``, or has it in another shape.
    """

    def __init__(self, model: nn.Module, own: PreTrainedModel) -> None:
        self.own = own
        self._roots = _roots(own)
        state = {name: value.shape for name, value in own.state_dict(keep_vars=True).items()}
        for name, module in unadapted_modules(model).items():
            for key, value in module.named_parameters(recurse=False):
                if state.get(f"{self(name)}.{key}") != value.shape:
                    raise AdapterError(
                        f"{type(own).__name__}, the base's class, has no {self(name)}.{key} of "
                        f"shape {tuple(value.shape)} for {name} of {type(model).__name__}"
                    )

    def __call__(self, name: str) -> str:
        return _renamed(name, self._roots)


def renamed_for(model: nn.Module, files: AdapterFiles) -> AdapterFiles:
    """Return ``files`` with the module names of ``model``. Names without a counterpart in ``model``
    are not changed."""
    from lorakit.anatomy import is_within, outside_language_model

    roots = _roots(model)
    files = _with_current_names(model, files, roots)
    renamed = {key: _renamed(key, roots) for key in files.tensors}
    unchanged = all(key == name for key, name in renamed.items())
    if unchanged or len(set(renamed.values())) < len(renamed):
        return files
    config = dict(files.config)
    name_in_file = _reversed(renamed, roots)
    if (names := config.get("target_modules")) and names != "all-linear":
        # The names refer to the text part, not to modules outside of it.
        outside = outside_language_model(model)
        config["target_modules"] = [
            name
            for name in unadapted_modules(model)
            if is_targeted(config, name_in_file(name)) and not is_within(name, outside)
        ]
        config.pop("exclude_modules", None)
        config.pop("layers_to_transform", None)
    if config["peft_type"] == "LORA":
        config |= _patterns(files.config, renamed)
    elif isinstance(config.get("rank_pattern"), dict):
        config["rank_pattern"] = {_renamed(k, roots): v for k, v in config["rank_pattern"].items()}
    for key in ("modules_to_save", "trained_parameters", "matrices"):
        if isinstance(config.get(key), list):
            config[key] = [_renamed(name, roots) for name in config[key]]
    sidecar = files.sidecar
    if sidecar and isinstance(sidecar.get("parts"), dict):
        parts = {_renamed(name, roots): part for name, part in sidecar["parts"].items()}
        sidecar = sidecar | {"parts": parts}
    tensors = {renamed[key]: value for key, value in files.tensors.items()}
    return dataclasses.replace(files, config=config, tensors=tensors, sidecar=sidecar)


def _with_current_names(
    model: nn.Module, files: AdapterFiles, roots: Mapping[str, str]
) -> AdapterFiles:
    """Rename tensors without a module in ``model`` as transformers renames those of checkpoints
    from before it renamed the modules. The adapted modules are then those with tensors."""
    modules = dict(model.named_modules())
    placed = {key: _is_placed(_renamed(key, roots), modules) for key in files.tensors}
    if all(placed.values()) or not hasattr(model, "base_model_prefix"):
        return files
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    found = get_model_conversion_mapping(cast("PreTrainedModel", model))
    steps = [step for step in found if isinstance(step, WeightRenaming)]
    renamed = {k: k if placed[k] else rename_source_key(k, steps, [])[0] for k in files.tensors}
    changed = {k for k, new in renamed.items() if new != k and _is_placed(new, modules)}
    if not changed or len(set(renamed.values())) < len(renamed):
        return files
    tensors = {renamed[key]: value for key, value in files.tensors.items()}
    config = {**files.config, "target_modules": sorted({split_key(n, modules)[0] for n in tensors})}
    if config["peft_type"] == "LORA":
        config |= _patterns(files.config, renamed)
    for key in ("exclude_modules", "layers_to_transform"):
        config.pop(key, None)
    return dataclasses.replace(files, config=config, tensors=tensors)


def _is_placed(key: str, modules: Mapping[str, nn.Module]) -> bool:
    """Whether ``key`` is a tensor of one of ``modules``."""
    name, end = split_key(key, modules)
    first = end.partition(".")[0]
    return bool(name) and (first.startswith("lora_") or first in _OWN)


def _patterns(config: Mapping[str, Any], renamed: Mapping[str, str]) -> dict[str, Any]:
    """Rank and alpha of every adapted module, under its new name."""
    suffixes = (f".{LINEAR_FACTORS.A}", f".{EMBEDDING_FACTORS.A}")
    names = {
        key.removesuffix(suffix): new.removesuffix(suffix)
        for key, new in renamed.items()
        for suffix in suffixes
        if key.endswith(suffix)
    }
    return {
        "rank_pattern": {f"^{re.escape(n)}": peft_rank(config, old) for old, n in names.items()},
        "alpha_pattern": {f"^{re.escape(n)}": peft_alpha(config, old) for old, n in names.items()},
    }


def _roots(model: nn.Module) -> dict[str, str]:
    """First part of a name without wrappers -> its full name in ``model``, if it is unique."""
    found: dict[str, set[str]] = {}
    for name in unadapted_modules(model):
        parts = without_wrappers(name)
        if len(parts) == 1:
            found.setdefault(parts[0], set()).add(name)
    return {root: names.pop() for root, names in found.items() if len(names) == 1}


def _renamed(name: str, roots: Mapping[str, str]) -> str:
    parts = without_wrappers(name)
    if not parts or parts[0] not in roots:
        return name
    return ".".join([roots[parts[0]], *parts[1:]])


def _reversed(renamed: Mapping[str, str], roots: Mapping[str, str]) -> Callable[[str], str]:
    """The function from a module's name in the model to its name in the file."""
    prefixes = {}
    for key in renamed:
        bare = without_wrappers(key)
        prefixes[bare[0]] = key[: len(key) - len(".".join(bare))]
    default = max(prefixes.values(), key=len)

    def name_in_file(name: str) -> str:
        bare = without_wrappers(name)
        if not bare or bare[0] not in roots:
            return name
        return prefixes.get(bare[0], default) + ".".join(bare)

    return name_in_file
