"""The base model of an adapter: its name, configuration, labels and weights.

Importing this module does not import transformers, which a merge can do without.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lorakit.adapters.peft.read import AdapterFiles
from lorakit.errors import AdapterError, ModelError
from lorakit.models.hub import explained, hub_options, is_missing_path, load_config, quiet
from lorakit.recipe.sections import ModelSection

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

DTYPES = ("float32", "bfloat16", "float16")

#: A classifier's labels, and the pad token, which locates the last token of a row.
LABEL_KEYS = ("id2label", "label2id", "problem_type", "pad_token_id")


def base_section(
    base: str | Path | None, files: AdapterFiles, trust_remote_code: bool = False
) -> ModelSection:
    """Return the base as a recipe's ``model`` section: ``base``, or the one that the adapter names.
    The adapter's revision applies to the latter only. Raises AdapterError if there is none."""
    named = files.config.get("base_model_name_or_path")
    name = str(base if base is not None else named or "")
    if base is not None and not name:
        raise AdapterError('base = "": allowed: a model directory, or a Hub id')
    if not name:
        raise AdapterError(f"{files.directory}: names no base model", hint="pass one")
    if base is None and is_missing_path(name):
        raise AdapterError(
            f"{files.directory}: names the base model {name}, which does not exist",
            hint="pass the base explicitly, as a directory or Hub id",
        )
    revision = files.config.get("revision") if name == named else None
    return ModelSection(name_or_path=name, revision=revision, trust_remote_code=trust_remote_code)


def other_base_note(section: ModelSection, files: AdapterFiles) -> str | None:
    """A note if the adapter names a different base than the given one."""
    named, given = files.config.get("base_model_name_or_path"), section.name_or_path
    if not named or is_same_name(given, str(named)):
        return None
    with suppress(OSError):
        if Path(named).samefile(given):
            return None
    return (
        f"{files.directory}: trained on {named}, but used with {given}: matching shapes do not "
        "guarantee that it is the same model"
    )


def is_same_name(given: str, named: str) -> bool:
    """Whether two paths or Hub ids name a model of the same name; ``given`` may be a link."""
    return bool(_names(named) & (_names(given) | _names(str(Path(given).resolve()))))


def _names(path: str) -> set[str]:
    """The model's names in a path or Hub id; in the Hub's cache, the repository's name."""
    parts = [part.casefold() for part in Path(path).parts]
    cached = [part.rpartition("--")[2] for part in parts if part.startswith("models--")]
    return set(cached or parts[-1:])


def dtype_name(dtype: str | torch.dtype | None, key: str) -> str | None:
    """Return ``float32``, ``bfloat16`` or ``float16``. Raises AdapterError for another dtype."""
    name = None if dtype is None else str(dtype).removeprefix("torch.")
    if name is not None and name not in DTYPES:
        raise AdapterError(f"{key} = {name}: allowed: {', '.join(DTYPES)}")
    return name


def full_config(section: ModelSection, files: AdapterFiles) -> PreTrainedConfig:
    """Return the base's configuration, with the adapter's labels if it is a classifier. Raises
    ModelError for a base that is missing, or of an unsupported kind."""
    try:
        config = load_config(section)
    except ModelError as error:
        name = section.name_or_path
        if name != files.config.get("base_model_name_or_path") or Path(name).is_dir():
            raise
        raise ModelError(
            f"{error}; {files.directory} names this base; hint: if it has moved, pass the base "
            "explicitly"
        ) from error
    if not files.classifies:
        from lorakit.models.kinds import check_kind

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
    """Set a classifier's pad token, which locates the last token of a row, to that of training.

    In RoBERTa-like models it also offsets the positions, so their pad token is not changed.
    """
    from lorakit.models.window import reserved_positions

    trained = (files.sidecar or {}).get("pad_token_id")
    if files.classifies and trained is not None and not reserved_positions(model):
        config.pad_token_id = trained


def base_model(
    section: ModelSection,
    config: PreTrainedConfig,
    adapters: Sequence[AdapterFiles],
    dtype: str | None,
) -> tuple[PreTrainedModel, set[str]]:
    """Return the base, and the names of its randomly initialized weights, which the checkpoint
    lacks or has in another shape. ``dtype`` None is that of the checkpoint. Raises AdapterError if
    an adapter does not supply such a weight."""
    from lorakit.adapters.peft.place import find_places
    from lorakit.models.dequantized import from_pretrained
    from lorakit.models.kinds import loader
    from lorakit.models.load import check_shapes

    name = section.name_or_path
    model: PreTrainedModel
    with explained(name), quiet():
        options = {"dtype": getattr(torch, dtype) if dtype else "auto", **hub_options(section)}
        model, info = from_pretrained(loader(adapters[0].task_type), name, config, options)
    # Finding the places stacks single experts, which takes memory: only where it is needed.
    for files in adapters if info["missing_keys"] or info["mismatched_keys"] else ():
        places = find_places(model, files)
        mismatched = [key for key in info["mismatched_keys"] if key[0] not in places.fully_trained]
        check_shapes(mismatched, name)
        check_supplied(
            set(info["missing_keys"]), {**places.base, **places.fully_trained}, name, files
        )
    return model, {*info["missing_keys"], *(key[0] for key in info["mismatched_keys"])}


def check_supplied(
    lacking: set[str], supplied: Mapping[str, Any], base: str, files: AdapterFiles
) -> None:
    """Raise AdapterError if a weight is neither in the base nor in the adapter."""
    if absent := sorted(lacking - set(supplied)):
        raise AdapterError(
            f"{files.directory}: {len(absent)} weights are in neither the base {base} nor the "
            f"adapter, including {absent[0]}: the adapter belongs to another base model, or the "
            "base is incomplete"
        )


def _head_size(
    config: PreTrainedConfig, files: AdapterFiles, trust_remote_code: bool
) -> int | None:
    """The number of labels, inferred from the shape of the layer that depends on it."""
    from lorakit.models.load import empty_model

    shapes = []
    for count in (2, 3):
        trial = copy.deepcopy(config)
        trial.num_labels = count
        state = empty_model(trial, files.task_type, trust_remote_code).state_dict()
        shapes.append({key: value.shape for key, value in state.items()})
    for key, shape in shapes[0].items():
        if shape != shapes[1][key] and key in files.tensors:
            return int(files.tensors[key].shape[0])
    return None
