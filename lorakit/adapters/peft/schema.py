"""Of what type the values in an adapter's two JSON files must be to be read.

Keys of ``adapter_config.json`` that a newer PEFT, or another tool, wrote.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from lorakit.adapters.peft.targets import DEFAULTS
from lorakit.errors import AdapterError, shown


def check_types(stored: Mapping[str, Any], types: Mapping[str, str], where: str) -> None:
    """Raise AdapterError for the first key whose value is not of its type. Null stands for the
    default, but for numbers that PEFT does not take it for."""
    for key, allowed in types.items():
        value = stored.get(key)
        if key not in stored or (value is None and key not in _NEVER_NULL):
            continue
        if not _CHECKS[allowed](value):
            raise AdapterError(f"{where}: {key} = {shown(value)}: allowed: {allowed}")


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer that no float holds
        return False


def _is_rank(value: Any) -> bool:
    return _is_integer(value) and _is_number(value) and bool(value > 0)


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _is_labels(value: Any) -> bool:
    return isinstance(value, dict) and all(
        key.isdecimal() and isinstance(label, str | int) for key, label in value.items()
    )


_CHECKS: dict[str, Callable[[Any], bool]] = {
    "text": lambda value: isinstance(value, str),
    "a list of texts": _is_texts,
    "text, or a list of texts": lambda value: isinstance(value, str) or _is_texts(value),
    "true, false": lambda value: isinstance(value, bool),
    "an integer": _is_integer,
    "an integer above 0": _is_rank,
    "an integer, or a list of integers": lambda value: all(
        map(_is_integer, value if isinstance(value, list) else [value])
    ),
    "a probability": lambda value: _is_number(value) and 0 <= value <= 1,
    "a finite number": _is_number,
    "an object": lambda value: isinstance(value, dict),
    "integers above 0 by name": lambda value: (
        isinstance(value, dict) and all(map(_is_rank, value.values()))
    ),
    "finite numbers by name": lambda value: (
        isinstance(value, dict) and all(map(_is_number, value.values()))
    ),
    "lists of true and false by name": lambda value: (
        isinstance(value, dict)
        and all(isinstance(v, list) and all(isinstance(k, bool) for k in v) for v in value.values())
    ),
    "names by class number": _is_labels,
}
_NEVER_NULL = ("init_r", "lora_alpha", "lora_dropout", "r")
_NAMES = "text, or a list of texts"
#: ``adapter_config.json``.
CONFIG_TYPES = {
    "alpha_pattern": "finite numbers by name",
    "auto_mapping": "an object",
    "base_model_name_or_path": "text",
    "exclude_modules": _NAMES,
    "fan_in_fan_out": "true, false",
    "init_r": "an integer above 0",
    "layers_pattern": _NAMES,
    "layers_to_transform": "an integer, or a list of integers",
    "lora_alpha": "a finite number",
    "lora_dropout": "a probability",
    "modules_to_save": "a list of texts",
    "revision": "text",
    "target_modules": _NAMES,
    "task_type": "text",
    "use_rslora": "true, false",
}
#: Keys that mean another thing to AdaLoRA: there the pattern has a list for each name.
LORA_TYPES = {"r": "an integer above 0", "rank_pattern": "integers above 0 by name"}
ADALORA_TYPES = {"rank_pattern": "lists of true and false by name"}
#: ``lorakit.json``.
SIDECAR_TYPES = {
    "base_class": "text",
    "base_dtype": "text",
    "id2label": "names by class number",
    "labels": "a list of texts",
    "method": "text",
    "misread_by_peft": "a list of texts",
    "pad_token_id": "an integer",
    "problem_type": "text",
    "refused_by_peft": "a list of texts",
    "task": "text",
}


#: Those of PEFT that are read elsewhere, or that say nothing of what an adapter computes.
_READ = {
    "beta1", "beta2", "deltaT", "inference_mode", "kasa_config", "lora_ga_config",
    "monteclora_config", "orth_reg_weight", "peft_type", "peft_version", "runtime_config",
    "target_r", "tfinal", "tinit", "total_step", "use_bdlora", "velora_config",
}  # fmt: skip
_KNOWN = {*DEFAULTS, *CONFIG_TYPES, *LORA_TYPES, *ADALORA_TYPES, *_READ}
_TIED = ("lora_embedding_", "lm_head.", "embed_tokens.", "wte.")


def unknown_keys_note(config: Mapping[str, Any], where: str) -> str | None:
    """A line that names the keys of no known meaning; one whose value is null, false or empty
    turns nothing on and is left out. None where there is nothing to say."""
    unknown = {key: value for key, value in config.items() if key not in _KNOWN and value}
    if not unknown:
        return None
    listed = ", ".join(f"{key} = {shown(value, 40)}" for key, value in sorted(unknown.items())[:8])
    more = ", ..." if len(unknown) > 8 else ""
    return f"{where}: unknown keys, which are ignored: {listed}{more}"


def check_tied(config: Mapping[str, Any], names: Mapping[str, Any], where: str) -> None:
    """Raise AdapterError for ``ensure_weight_tying`` where it does something: PEFT then adapts
    tied layers that the file does not name."""
    if config.get("ensure_weight_tying") and any(mark in name for name in names for mark in _TIED):
        raise AdapterError(
            f"{where}: ensure_weight_tying = true: not supported for an adapter of embeddings or "
            "of the output layer; allowed: false"
        )
