"""A checkpoint's names and those of the class that transformers loads it into, both ways.

transformers renames tensors as it loads them, and stacks, splits or transposes some. Here its own
rules are asked, by name and shape; no weight is loaded.

What the class that transformers would load holds of a base, found on a model without values.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping, Sequence
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

from lorakit.adapters.base_model import check_supplied, empty_model, full_config, set_pad_token
from lorakit.adapters.merge.checkpoint import Checkpoint, StoredTensor
from lorakit.adapters.merge.updates import Held, Ties, Weighted, find_updates
from lorakit.adapters.peft.place import find_places
from lorakit.adapters.peft.read import AdapterFiles
from lorakit.errors import AdapterError
from lorakit.models.hub import load_config
from lorakit.recipe.sections import ModelSection


@dataclass(frozen=True)
class ConvertedGroup:
    """Stored tensors that ``converter`` makes into others of the class; ``inner`` is the stored
    name by the one that the converter knows, after the renamings."""

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
        """Stored values -> those to store, with ``finish(name, W)`` in place of each of the
        class's tensors. Raises AdapterError if transformers cannot convert them back."""
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
                f"{type(self.model).__name__}: {self.first}: transformers has no way back to the "
                "base's own tensors; train other modules, or save the base with transformers first"
            )
        return found

    def _inner(self, name: str) -> str | None:
        prefix = f"{self.model.base_model_prefix}."
        candidates = (name, name.removeprefix(prefix), prefix + name)
        return next((inner for inner in candidates if inner in self.inner), None)


class StoredNames:
    """``plain`` maps a stored tensor to the class's of the same values, ``groups`` are those that
    are converted together; what is in neither the class does not hold."""

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
        """The name under which a checkpoint of this kind stores the class's tensor ``name``."""
        back = name
        for renaming in self._back:
            back, _ = renaming.rename_source_key(back)
        candidates = (back, f"{self._model.base_model_prefix}.{back}", name)
        return next((own for own in candidates if self._loaded(own) == (name, None)), name)

    def _reversed(self) -> list[Any]:
        """The way back: the renamings that this checkpoint needs; and, unless it has names that an
        unneeded one leads to, all, since what would need it (an output layer) may not be stored."""
        own = len(get_model_conversion_mapping(self._model, add_legacy=False))
        used = [t for t in self._renamings if t.was_used()]
        # Not the changes of a prefix, which lead to any name.
        unused = [t for t in self._mapping[:own] if type(t) is WeightRenaming and t not in used]
        back = [t.reverse_transform() for t in unused]
        if not any(t.rename_source_key(name)[0] != name for t in back for name in self.plain):
            used = [t for t in self._renamings if t in used or t in unused]
        return [t.reverse_transform() for t in reversed(used)]

    def _loaded(self, name: str) -> tuple[str, str | None]:
        """As ``from_pretrained`` does: the class's name, and the pattern of a converter if one
        takes the tensor."""
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
        """None if the class holds nothing of what the converter makes."""
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
                f"{target}: transformers does not convert the base's tensors into it: {error}"
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


#: What a classifier's configuration says of its labels, and of where a row's last token is.
_LABELS = ("id2label", "label2id", "problem_type", "pad_token_id")


def held_by_class(
    section: ModelSection,
    settings: Mapping[str, Any],
    checkpoint: Checkpoint,
    adapters: Sequence[Weighted],
) -> Held:
    """``settings`` is the base's ``config.json``. What is trained whole is the first adapter's.

    Raises ModelError for a base that transformers does not know, AdapterError if base and adapter
    do not fit, or together lack a weight."""
    files = adapters[0].files
    config = full_config(section, files)
    model = empty_model(config, files, section.trust_remote_code)
    set_pad_token(config, model, files)
    state = dict(model.state_dict(keep_vars=True))
    places = find_places(model, files)
    updates = {f"{name}.weight": own for name, own in find_updates(model, adapters).items()}
    names = StoredNames(model, checkpoint.tensors)
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    ties = _ties(state)
    plain = _fitting(names, shapes, places.whole, checkpoint)
    held = {*plain.values(), *(name for group in names.groups for name in group.targets)}
    _check_present(model, shapes, held, ties, {**places.base, **places.whole}, checkpoint, files)
    return Held(
        plain=plain,
        groups=names.groups,
        shapes=shapes,
        ties=ties,
        updates=updates,
        base=places.base,
        whole=places.whole,
        class_name=type(model).__name__,
        architecture=_architecture(model, config, settings, files),
        stored_name=names.stored_name,
        can_part=lambda tied: _can_part(model, tied),
        text_config=_text_config(config),
        settings=_labels(config, load_config(section)) if files.classifies else {},
    )


def _ties(state: Mapping[str, Tensor]) -> list[list[str]]:
    shared: dict[int, list[str]] = {}
    for name, value in state.items():
        shared.setdefault(id(value), []).append(name)
    return [names for names in shared.values() if len(names) > 1]


def _fitting(
    names: StoredNames,
    shapes: Mapping[str, tuple[int, ...]],
    whole: Mapping[str, Tensor],
    checkpoint: Checkpoint,
) -> dict[str, str]:
    """The tensors that are read as they are. Raises AdapterError for one of another shape, unless
    the adapter replaces it: a head for another number of labels."""
    for stored, name in names.plain.items():
        have = checkpoint.tensors[stored].shape
        if have != shapes[name] and name not in whole:
            raise AdapterError(
                f"{checkpoint.directory}: {stored} is {have}, and the configuration says "
                f"{shapes[name]}"
            )
    for group in names.groups:
        for name, have in group.targets.items():
            if name in shapes and have != shapes[name] and name not in whole:
                raise AdapterError(
                    f"{checkpoint.directory}: {name} becomes {have}, and the configuration says "
                    f"{shapes[name]}"
                )
    return names.plain


def _check_present(
    model: PreTrainedModel,
    shapes: Mapping[str, tuple[int, ...]],
    held: set[str],
    ties: Ties,
    supplied: Mapping[str, Tensor],
    checkpoint: Checkpoint,
    files: AdapterFiles,
) -> None:
    shared = {name for names in ties if set(names) & held for name in names}
    ignored = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_missing or ()]
    lacking = {
        name
        for name in set(shapes) - held - shared
        if not any(pattern.search(name) for pattern in ignored)
    }
    check_supplied(lacking, supplied, str(checkpoint.directory), files)


def _architecture(
    model: PreTrainedModel,
    config: PreTrainedConfig,
    settings: Mapping[str, Any],
    files: AdapterFiles,
) -> str | None:
    """The class's name where it is another than the base's: an encoder that became a classifier.
    None for the text part of a larger model, which stays that model."""
    name = type(model).__name__
    own = settings.get("architectures") or []
    if name in own or (own and type(model.config) is not type(config)):
        return None
    unknown = own and not hasattr(transformers, str(own[0]))  # the base's own code, or old names
    return None if unknown and not files.classifies else name


def _can_part(model: PreTrainedModel, names: Sequence[str]) -> bool:
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
    """The keys of ``config.json`` that a classifier's adapter changes."""
    changed: dict[str, Any] = {}
    for key in _LABELS:
        value = getattr(config, key, None)
        if value != getattr(base, key, None):
            changed[key] = value
    if changed.get("id2label"):
        changed["id2label"] = {str(k): label for k, label in changed["id2label"].items()}
    return changed
