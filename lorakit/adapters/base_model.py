"""The base model that an adapter belongs to: which it is, its labels, its weights or none."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)

from lorakit.adapters.peft.place import find_places
from lorakit.adapters.peft.read import AdapterFiles
from lorakit.errors import AdapterError, ModelError
from lorakit.models.hub import explained, hub_options, load_config, quiet
from lorakit.models.load import check_kind, check_shapes, reserved_positions
from lorakit.recipe.sections import ModelSection


def full_config(section: ModelSection, files: AdapterFiles) -> PreTrainedConfig:
    """The base's configuration; for a classifier with the adapter's labels. Raises ModelError for
    a base that is missing, or of a kind that cannot be trained."""
    try:
        config = load_config(section)
    except ModelError as error:
        name = section.name_or_path
        if name != files.config.get("base_model_name_or_path") or Path(name).is_dir():
            raise
        raise ModelError(
            f"{error}; {files.directory} names this base: if it has moved, give the base explicitly"
        ) from error
    if not files.classifies:
        check_kind(config, "causal", section.name_or_path)
        return config
    sidecar = files.sidecar or {}
    labels = sidecar.get("id2label")
    if labels:
        config.id2label = {int(index): label for index, label in labels.items()}
        config.label2id = {label: index for index, label in config.id2label.items()}
        config.problem_type = sidecar.get("problem_type")
    elif (count := _head_size(config, files, section.trust_remote_code)) is not None:
        config.num_labels = count
    return config


def set_pad_token(config: PreTrainedConfig, model: PreTrainedModel, files: AdapterFiles) -> None:
    """The training's pad token for a classifier, which finds a row's last token by it.

    RoBERTa and its kin count positions from the configuration's: there it stays the base's.
    """
    trained = (files.sidecar or {}).get("pad_token_id")
    if files.classifies and trained is not None and not reserved_positions(model):
        config.pad_token_id = trained


def empty_model(
    config: PreTrainedConfig, files: AdapterFiles, trust_remote_code: bool = False
) -> PreTrainedModel:
    """The base with its head, on the device ``meta``: names and shapes without values. Raises
    ModelError if transformers has no such class."""
    with explained(str(config.name_or_path)), torch.device("meta"), quiet():
        model: PreTrainedModel = _auto(files).from_config(
            config, trust_remote_code=trust_remote_code
        )
    return model


def base_model(
    section: ModelSection,
    config: PreTrainedConfig,
    adapters: Sequence[AdapterFiles],
    dtype: str | None,
) -> tuple[PreTrainedModel, set[str]]:
    """The base with its weights, and the names of those that are random, since the checkpoint has
    none of that shape; ``dtype`` None is the checkpoint's own. Raises AdapterError if one of the
    adapters lacks such a weight."""
    name = section.name_or_path
    with explained(name), quiet():
        model, info = _auto(adapters[0]).from_pretrained(
            name,
            config=config,
            dtype=getattr(torch, dtype) if dtype else "auto",
            use_safetensors=True,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **hub_options(section),
        )
    for files in adapters:
        places = find_places(model, files)
        mismatched = [key for key in info["mismatched_keys"] if key[0] not in places.whole]
        check_shapes(mismatched, name)
        check_supplied(set(info["missing_keys"]), {**places.base, **places.whole}, name, files)
    assert isinstance(model, PreTrainedModel)
    return model, {*info["missing_keys"], *(key[0] for key in info["mismatched_keys"])}


def _auto(files: AdapterFiles) -> Any:
    return AutoModelForSequenceClassification if files.classifies else AutoModelForCausalLM


def check_supplied(
    lacking: set[str], supplied: Mapping[str, Any], base: str, files: AdapterFiles
) -> None:
    """Raise AdapterError if a weight is neither in the base nor in the adapter."""
    if absent := sorted(lacking - set(supplied)):
        raise AdapterError(
            f"{files.directory}: {len(absent)} weights are neither in the base {base} nor in the "
            f"adapter, {absent[0]} among them: the adapter belongs to another base model, or "
            "the base is incomplete"
        )


def _head_size(
    config: PreTrainedConfig, files: AdapterFiles, trust_remote_code: bool
) -> int | None:
    """The number of labels by the shape of the head's last layer: the one that changes with it."""
    shapes = []
    for count in (2, 3):
        trial = copy.deepcopy(config)
        trial.num_labels = count
        state = empty_model(trial, files, trust_remote_code).state_dict()
        shapes.append({key: value.shape for key, value in state.items()})
    for key, shape in shapes[0].items():
        if shape != shapes[1][key] and key in files.tensors:
            return int(files.tensors[key].shape[0])
    return None
