"""What the class that transformers would load holds of a base, found on a model without values."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from lorakit.adapters.base_model import check_supplied, empty_model, full_config, set_pad_token
from lorakit.adapters.checkpoint import Checkpoint
from lorakit.adapters.files import AdapterFiles
from lorakit.adapters.held import Held, Ties
from lorakit.adapters.place import find_places
from lorakit.adapters.stored_names import StoredNames
from lorakit.adapters.weighted import Weighted, find_updates
from lorakit.errors import AdapterError
from lorakit.models.load import load_config
from lorakit.recipe.sections import ModelSection

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
