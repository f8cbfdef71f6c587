"""The names of an adapter's modules, in the class that the base names and in the one it is loaded
as: the same layers are ``model.layers`` where a multimodal base's text part was loaded alone, and
``model.language_model.layers`` in the base's own class.

Two names are of the same module if they are equal without the wrappers that they begin with."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from lorakit.adapters.peft.read import AdapterFiles
from lorakit.adapters.peft.schema import (
    EMBEDDING_FACTORS,
    LINEAR_FACTORS,
    peft_alpha,
    peft_rank,
)
from lorakit.adapters.peft.targets import is_targeted, unadapted_modules
from lorakit.anatomy import is_within, outside_language_model
from lorakit.errors import AdapterError
from lorakit.models.hub import quiet
from lorakit.module_names import without_wrappers


def names_in_base(model: nn.Module, config: PreTrainedConfig) -> BaseNames | None:
    """The names of ``model``'s modules in the class that ``config``, the base's configuration,
    names, if ``model`` is only the text part of that. Else None: the names are the same.

    Raises AdapterError if a module of ``model`` is not in that class.
    """
    named = list(config.architectures or ())
    text = config.get_text_config()
    part_config: Any = getattr(model, "config", None)
    if text is config or type(model).__name__ in named or type(part_config) is not type(text):
        return None
    own = getattr(transformers, named[0], None) if named else None
    if own is None or not isinstance(own, type) or not issubclass(own, PreTrainedModel):
        return None
    with torch.device("meta"), quiet():
        return BaseNames(model, own(config))


class BaseNames:
    """Names of a text part's modules -> those in ``own``, the base's whole model.

    Raises AdapterError if a module or parameter of ``model`` is not in ``own``, with its shape.
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
                        f"{tuple(value.shape)} for {name} of {type(model).__name__}"
                    )

    def __call__(self, name: str) -> str:
        return _moved(name, self._roots)


def fitted(files: AdapterFiles, model: nn.Module) -> AdapterFiles:
    """``files`` with the names that ``model`` gives the modules; what has no counterpart in it
    keeps its name."""
    roots = _roots(model)
    moved = {key: _moved(key, roots) for key in files.tensors}
    if all(key == name for key, name in moved.items()) or len(set(moved.values())) < len(moved):
        return files
    config = dict(files.config)
    theirs = _reversed(moved, roots)
    if (names := config.get("target_modules")) and names != "all-linear":
        # The text part, in which the file's names were given, has nothing else of such a name.
        outside = outside_language_model(model)
        config["target_modules"] = [
            name
            for name in unadapted_modules(model)
            if is_targeted(config, theirs(name)) and not is_within(name, outside)
        ]
        config.pop("exclude_modules", None)
        config.pop("layers_to_transform", None)
    if config["peft_type"] == "LORA":
        config |= _patterns(files.config, moved)
    elif isinstance(config.get("rank_pattern"), dict):
        config["rank_pattern"] = {_moved(k, roots): v for k, v in config["rank_pattern"].items()}
    for key in ("modules_to_save", "trained_parameters", "matrices"):
        if isinstance(config.get(key), list):
            config[key] = [_moved(name, roots) for name in config[key]]
    sidecar = files.sidecar
    if sidecar and isinstance(sidecar.get("parts"), dict):
        parts = {_moved(name, roots): part for name, part in sidecar["parts"].items()}
        sidecar = sidecar | {"parts": parts}
    tensors = {moved[key]: value for key, value in files.tensors.items()}
    return dataclasses.replace(files, config=config, tensors=tensors, sidecar=sidecar)


def _patterns(config: Mapping[str, Any], moved: Mapping[str, str]) -> dict[str, Any]:
    """Rank and alpha of every adapted module, under its new name."""
    ends = (f".{LINEAR_FACTORS.A}", f".{EMBEDDING_FACTORS.A}")
    names = {
        key.removesuffix(end): new.removesuffix(end)
        for key, new in moved.items()
        for end in ends
        if key.endswith(end)
    }
    return {
        "rank_pattern": {f"^{re.escape(n)}": peft_rank(config, old) for old, n in names.items()},
        "alpha_pattern": {f"^{re.escape(n)}": peft_alpha(config, old) for old, n in names.items()},
    }


def _roots(model: nn.Module) -> dict[str, str]:
    """First part of a name behind its wrappers -> where it is in ``model``; not if in two."""
    found: dict[str, set[str]] = {}
    for name in unadapted_modules(model):
        parts = without_wrappers(name)
        if len(parts) == 1:
            found.setdefault(parts[0], set()).add(name)
    return {root: names.pop() for root, names in found.items() if len(names) == 1}


def _moved(name: str, roots: Mapping[str, str]) -> str:
    parts = without_wrappers(name)
    if not parts or parts[0] not in roots:
        return name
    return ".".join([roots[parts[0]], *parts[1:]])


def _reversed(moved: Mapping[str, str], roots: Mapping[str, str]) -> Any:
    """A module's name in the model -> in the file."""
    before = {}
    for key in moved:
        bare = without_wrappers(key)
        before[bare[0]] = key[: len(key) - len(".".join(bare))]
    default = max(before.values(), key=len)

    def name_in_file(name: str) -> str:
        bare = without_wrappers(name)
        if not bare or bare[0] not in roots:
            return name
        return before.get(bare[0], default) + ".".join(bare)

    return name_in_file
