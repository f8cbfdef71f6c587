"""Resolves a base with the class that transformers would load, on a model without values.

transformers renames tensors when it loads them, and stacks, splits or transposes some. Its own
rules are applied here in both directions, by name and shape, without loading weights.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from lorakit.adapters.base_model import (
    LABEL_KEYS,
    check_supplied,
    full_config,
    set_pad_token,
)
from lorakit.adapters.merge.checkpoint import Checkpoint, StoredTensor
from lorakit.adapters.merge.updates import ResolvedBase, Ties, Weighted, find_updates
from lorakit.adapters.peft.place import find_places
from lorakit.adapters.peft.read import AdapterFiles
from lorakit.adapters.peft.tokens import with_tied
from lorakit.adapters.peft.vocabulary import layers_of
from lorakit.errors import AdapterError
from lorakit.models.hub import load_config
from lorakit.models.load import empty_model
from lorakit.recipe.sections import ModelSection


@dataclass(frozen=True)
class ConvertedGroup:
    """Stored tensors that ``converter`` turns into parameters of the class. ``inner``: the name
    that the converter sees, after renaming -> stored name."""

    model: PreTrainedModel
    converter: Any
    first: str
    pattern_of: Mapping[str, str]
    inner: Mapping[str, str]
    targets: Mapping[str, tuple[int, ...]]

    @property
    def sources(self) -> Sequence[str]:
        return tuple(self.pattern_of)

    def converted(
        self, values: Mapping[str, Tensor], finish: Callable[[str, Tensor], Tensor]
    ) -> dict[str, Tensor]:
        """Convert stored values to the class's, replace each by ``finish(name, W)``, and convert
        them back. Raises AdapterError if transformers cannot do the latter."""
        loaded = _convert(self.converter, self.first, self.pattern_of, values, self.model)
        changed = {name: finish(name, value) for name, value in loaded.items()}
        reverse = self.converter.reverse_transform()
        first, patterns = "", {}
        for name in sorted(changed, key=dot_natural_key):
            renamed, pattern = reverse.rename_source_key(name)
            first, patterns[name] = first or renamed, pattern
        stored = _convert(reverse, first, patterns, changed, self.model)
        found = {self.inner[inner]: value for name, value in stored.items()
                 if (inner := self._inner(name)) is not None}  # fmt: skip
        fits = set(found) == set(values)
        if not fits or any(found[n].shape != values[n].shape for n in values):
            raise AdapterError(
                f"{type(self.model).__name__}: {self.first}: transformers cannot convert it back "
                "to the base's tensors; hint: train other modules, or save the base with "
                "transformers first"
            )
        return found

    def _inner(self, name: str) -> str | None:
        prefix = f"{self.model.base_model_prefix}."
        candidates = (name, name.removeprefix(prefix), prefix + name)
        return next((inner for inner in candidates if inner in self.inner), None)


class StoredNames:
    """Which parameters the stored tensors become. ``plain``: stored name -> parameter with the same
    values; ``groups``: tensors that are converted together. The class does not read the others."""

    def __init__(self, model: PreTrainedModel, stored: Mapping[str, StoredTensor]) -> None:
        self.plain: dict[str, str] = {}
        self.groups: list[ConvertedGroup] = []
        self._model = model
        self._state: dict[str, Any] = dict.fromkeys(model.state_dict(), True)
        self._mapping = get_model_conversion_mapping(model)
        self._renamings = [t for t in self._mapping if isinstance(t, WeightRenaming)]
        self._converters = [t for t in self._mapping if isinstance(t, WeightConverter)]
        found: dict[str, dict[str, str]] = {}
        for name in sorted(stored, key=dot_natural_key):
            target, pattern = self._loaded(name)
            if pattern is not None:
                found.setdefault(target, {})[name] = pattern
            elif target in self._state:
                self.plain[name] = target
        self._back = self._reversed()
        for target, pattern_of in found.items():
            if (group := self._group(target, pattern_of, stored)) is not None:
                self.groups.append(group)

    def stored_name(self, name: str) -> str:
        """Return the name under which a checkpoint like this one stores the parameter ``name``."""
        back = name
        for renaming in self._back:
            back, _ = renaming.rename_source_key(back)
        candidates = (back, f"{self._model.base_model_prefix}.{back}", name)
        return next((own for own in candidates if self._loaded(own) == (name, None)), name)

    def _reversed(self) -> list[Any]:
        """Reverse the renamings that this checkpoint needs. Unless one of its names contradicts
        them, reverse the others too: what needs them (an output layer) may not be stored."""
        own = len(get_model_conversion_mapping(self._model, add_legacy=False))
        used = [t for t in self._renamings if t.was_used()]
        # Prefix changes would match any name.
        unused = [t for t in self._mapping[:own] if type(t) is WeightRenaming and t not in used]
        back = [t.reverse_transform() for t in unused]
        if not any(t.rename_source_key(name)[0] != name for t in back for name in self.plain):
            used = [t for t in self._renamings if t in used or t in unused]
        return [t.reverse_transform() for t in reversed(used)]

    def _loaded(self, name: str) -> tuple[str, str | None]:
        """Return the parameter's name as in ``from_pretrained``, and the pattern of the converter
        that takes the tensor, if any."""
        prefix = self._model.base_model_prefix
        target, pattern = rename_source_key(
            name, self._renamings, self._converters, prefix, self._state
        )
        if target not in self._state and name in self._state:
            target, pattern = rename_source_key(name, [], [], prefix, self._state)
        return target, pattern

    def _group(
        self, target: str, pattern_of: Mapping[str, str], stored: Mapping[str, StoredTensor]
    ) -> ConvertedGroup | None:
        """None if the class has none of the converter's results."""
        first = next(iter(pattern_of.values()))
        converter = next(c for c in self._converters if first in c.source_patterns)
        empty = {
            name: torch.empty(stored[name].shape, dtype=stored[name].dtype, device="meta")
            for name in pattern_of
        }
        try:
            targets = _convert(converter, target, pattern_of, empty, self._model)
        except Exception as error:
            if target not in self._state:
                return None
            raise AdapterError(
                f"{target}: transformers cannot convert the base's tensors: {error}"
            ) from error
        if not set(targets) & set(self._state):
            return None
        inner = {rename_source_key(name, self._renamings, [])[0]: name for name in pattern_of}
        shapes = {name: tuple(value.shape) for name, value in targets.items()}
        return ConvertedGroup(self._model, converter, target, pattern_of, inner, shapes)


def _convert(
    converter: Any,
    first: str,
    pattern_of: Mapping[str, str],
    values: Mapping[str, Tensor],
    model: PreTrainedModel,
) -> dict[str, Tensor]:
    own = deepcopy(converter)
    for name, pattern in pattern_of.items():
        own.add_tensor(first, name, pattern, values[name])
    made = own.convert(first, model=model, config=model.config)
    return {n: value[0] if isinstance(value, list) else value for n, value in made.items()}


def resolve_by_class(
    section: ModelSection,
    settings: Mapping[str, Any],
    checkpoint: Checkpoint,
    adapters: Sequence[Weighted],
) -> ResolvedBase:
    """Resolve the base with the ``config.json`` ``settings``. Fully trained modules are those of
    the first adapter.

    Raises ModelError for a base that transformers does not know, and AdapterError if base and
    adapters do not fit, or lack a weight even together.
    """
    files = adapters[0].files
    config = full_config(section, files)
    model = empty_model(config, files.task_type, section.trust_remote_code)
    set_pad_token(config, model, files)
    state = dict(model.state_dict(keep_vars=True))
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    places = find_places(model, files)
    layers = layers_of(model)
    rows = {f"{name}.weight": own for name, own in with_tied(places.rows, layers).items()}
    given = {n: v.clone() for n, v in places.fully_trained.items() if n in rows}
    for name, value in given.items():
        rows.pop(name).put(value)
    updates = find_updates(model, adapters)
    names = StoredNames(model, checkpoint.tensors)
    ties = _ties(state)
    plain = _fitting(names, shapes, places.fully_trained, checkpoint)
    read = {*plain.values(), *(name for group in names.groups for name in group.targets)}
    _check_present(
        model, shapes, read, ties, {**places.base, **places.fully_trained}, checkpoint, files
    )
    return ResolvedBase(
        plain=plain,
        groups=names.groups,
        shapes=shapes,
        ties=ties,
        updates=updates,
        base=places.base,
        fully_trained=places.fully_trained | given,
        class_name=type(model).__name__,
        architecture=_architecture(model, config, settings, files),
        stored_name=names.stored_name,
        can_untie=lambda tied: _can_untie(model, tied),
        text_config=_text_config(config),
        settings=_labels(config, load_config(section)) if files.classifies else {},
        rows=rows,
        vocab_size=_new_size(model, layers, shapes),
    )


def _new_size(
    model: PreTrainedModel, layers: Collection[str], shapes: Mapping[str, tuple[int, ...]]
) -> int | None:
    """The rows of the embeddings, if an adapter has extended them."""
    sizes = {len(model.get_parameter(f"{name}.weight")) for name in layers}
    return max(sizes - {shapes[f"{name}.weight"][0] for name in layers}, default=None)


def _ties(state: Mapping[str, Tensor]) -> list[list[str]]:
    shared: dict[int, list[str]] = {}
    for name, value in state.items():
        shared.setdefault(id(value), []).append(name)
    return [names for names in shared.values() if len(names) > 1]


def _fitting(
    names: StoredNames,
    shapes: Mapping[str, tuple[int, ...]],
    fully_trained: Mapping[str, Tensor],
    checkpoint: Checkpoint,
) -> dict[str, str]:
    """Return the tensors that are read unchanged. Raises AdapterError for one of another shape,
    unless the adapter replaces it (a head for another number of labels)."""
    for stored, name in names.plain.items():
        have = checkpoint.tensors[stored].shape
        if have != shapes[name] and name not in fully_trained:
            raise AdapterError(
                f"{checkpoint.directory}: {stored} has shape {have}, and {shapes[name]} by "
                "the configuration"
            )
    for group in names.groups:
        for name, have in group.targets.items():
            if name in shapes and have != shapes[name] and name not in fully_trained:
                raise AdapterError(
                    f"{checkpoint.directory}: {name} gets shape {have}, and has {shapes[name]} "
                    "by the configuration"
                )
    return names.plain


def _check_present(
    model: PreTrainedModel,
    shapes: Mapping[str, tuple[int, ...]],
    read: set[str],
    ties: Ties,
    supplied: Mapping[str, Tensor],
    checkpoint: Checkpoint,
    files: AdapterFiles,
) -> None:
    shared = {name for names in ties if set(names) & read for name in names}
    ignored = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_missing or ()]
    lacking = {
        name
        for name in set(shapes) - read - shared
        if not any(pattern.search(name) for pattern in ignored)
    }
    check_supplied(lacking, supplied, str(checkpoint.directory), files)


def _architecture(
    model: PreTrainedModel,
    config: PreTrainedConfig,
    settings: Mapping[str, Any],
    files: AdapterFiles,
) -> str | None:
    """The class's name if it differs from the base's, as for an encoder that became a classifier.
    None for the text part of a larger model, which remains that model."""
    name = type(model).__name__
    own = settings.get("architectures") or []
    if name in own or (own and type(model.config) is not type(config)):
        return None
    unknown = own and not hasattr(transformers, str(own[0]))  # custom code, or an old name
    return None if unknown and not files.classifies else name


def _can_untie(model: PreTrainedModel, names: Sequence[str]) -> bool:
    config = copy.deepcopy(model.config)
    parts: tuple[Any, ...] = (config, config.get_text_config())
    for part in parts:
        part.tie_word_embeddings = False
    with torch.device("meta"):
        state = type(model)(config).state_dict(keep_vars=True)
    return len({id(state[name]) for name in names}) == len(names)


def _text_config(config: PreTrainedConfig) -> str | None:
    text = config.get_text_config()
    if text is config:
        return None
    return next((key for key, value in vars(config).items() if value is text), None)


def _labels(config: PreTrainedConfig, base: PreTrainedConfig) -> dict[str, Any]:
    """The keys of ``config.json`` that the adapter of a classifier changes."""
    changed: dict[str, Any] = {}
    for key in LABEL_KEYS:
        value = getattr(config, key, None)
        if value != getattr(base, key, None):
            changed[key] = value
    if changed.get("id2label"):
        changed["id2label"] = {str(k): label for k, label in changed["id2label"].items()}
    return changed
