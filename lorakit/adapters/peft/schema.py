"""PEFT's adapter directory (PEFT 0.21): file names, keys, their types and defaults, tensor names.

Nothing here imports PEFT, torch or transformers. A new PEFT version changes this module first.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

from lorakit.errors import AdapterError, shown

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
SIDECAR = "lorakit.json"
CARD = "README.md"
#: The prefix of every tensor name in ``adapter_model.safetensors``.
PREFIX = "base_model.model."
#: The prefix of tensors that belong to no module of the model, as VeRA's ``base_model.vera_A``.
SHARED_PREFIX = "base_model."
#: The values of ``peft_type`` whose format ``peft/lora.py`` reads and writes.
LORA_FORMATS = ("LORA", "ADALORA")

#: PEFT's defaults. Older versions reject keys that they do not know, so a key at its default is not
#: written.
DEFAULTS: dict[str, Any] = {
    "alpha_pattern": {},
    "alora_invocation_tokens": None,
    "arrow_config": None,
    "auto_mapping": None,
    "bias": "none",
    "corda_config": None,
    "ensure_weight_tying": False,
    "eva_config": None,
    "exclude_modules": None,
    "fan_in_fan_out": False,
    "init_lora_weights": True,
    "layer_replication": None,
    "layers_pattern": None,
    "layers_to_transform": None,
    "loftq_config": {},
    "lora_bias": False,
    "lora_dropout": 0.0,
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "modules_to_save": None,
    "qalora_group_size": 16,
    "rank_pattern": {},
    "revision": None,
    "target_parameters": None,
    "trainable_token_indices": None,
    "use_dora": False,
    "use_qalora": False,
    "use_rslora": False,
}
#: Keys that change what an adapter computes, with the values that lorakit supports.
_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "alora_invocation_tokens": (None,),
    "arrow_config": (None,),
    "bias": ("none", "lora_only", "all", None),
    "kasa_config": (None,),
    "layer_replication": (None,),
    "lora_bias": (False, True, None),
    "megatron_config": (None,),
    "monteclora_config": (None,),
    "use_bdlora": (None, False),
    "use_dora": (False, True, None),
    "use_qalora": (False, None),
    "velora_config": (None,),
}
#: Keys of adapters whose update depends on the input, so that no weight can take it in.
_NOT_MERGEABLE = ("alora_invocation_tokens", "arrow_config")
#: What to do about an adapter of PEFT that lorakit does not read.
MERGE_WITH_PEFT = (
    "merge it into its base with PEFT (merge_and_unload, then save_pretrained), and use the result "
    "as the model"
)
ONLY_PEFT = "use it with PEFT, since it cannot be merged into a base"
#: Keys whose values PEFT may interpret as regular expressions.
_PATTERN_KEYS = (
    "target_modules", "exclude_modules", "rank_pattern", "alpha_pattern", "modules_to_save",
    "layers_pattern",
)  # fmt: skip
#: Types of the values in ``adapter_config.json``.
CONFIG_TYPES = {
    "alpha_pattern": "finite numbers by name",
    "auto_mapping": "an object",
    "base_model_name_or_path": "a string without control characters",
    "exclude_modules": "a string, or a list of strings",
    "fan_in_fan_out": "true, false",
    "init_r": "an integer above 0",
    "layers_pattern": "a string, or a list of strings",
    "layers_to_transform": "an integer, or a list of integers",
    "lora_alpha": "a finite number",
    "lora_dropout": "a probability",
    "modules_to_save": "a list of strings",
    "revision": "a string",
    "target_modules": "a string, or a list of strings",
    "target_parameters": "a list of strings",
    "task_type": "a string",
    "use_rslora": "true, false",
}
#: Keys whose types differ in AdaLoRA, where ``rank_pattern`` has a list for each name.
LORA_TYPES = {"r": "an integer above 0", "rank_pattern": "integers above 0 by name"}
ADALORA_TYPES = {"rank_pattern": "lists of true and false by name"}
#: Types of the values in ``lorakit.json``.
SIDECAR_TYPES = {
    "base_class": "a string",
    "base_dtype": "a string",
    "id2label": "names by class number",
    "labels": "a list of strings",
    "max_length": "an integer",
    "method": "a string",
    "method_digest": "a string",
    "misread_by_peft": "a list of strings",
    "pad_token_id": "an integer",
    "problem_type": "a string",
    "refused_by_peft": "a list of strings",
    "system_prompts": "a list of strings",
    "task": "a string",
    "text_columns": "one or two strings",
    "vocab_size": "an integer",
}
#: Further keys of PEFT that lorakit reads elsewhere, or that do not affect the output.
_OTHER_KEYS = {
    "beta1", "beta2", "deltaT", "inference_mode", "kasa_config", "lora_ga_config",
    "monteclora_config", "orth_reg_weight", "peft_type", "peft_version", "runtime_config",
    "target_r", "tfinal", "tinit", "total_step", "use_bdlora", "velora_config",
}  # fmt: skip
_KNOWN_KEYS = {*DEFAULTS, *CONFIG_TYPES, *LORA_TYPES, *ADALORA_TYPES, *_OTHER_KEYS}
#: Keys that every method of PEFT may have.
_KEYS_OF_EVERY_METHOD = {
    "auto_mapping", "base_model_name_or_path", "bias", "exclude_modules", "fan_in_fan_out",
    "inference_mode", "init_weights", "layers_pattern", "layers_to_transform", "modules_to_save",
    "peft_type", "peft_version", "revision", "target_modules", "task_type",
}  # fmt: skip
#: Keys for which PEFT does not treat null as the default.
_NOT_NULLABLE = ("init_r", "lora_alpha", "lora_dropout", "r")
#: Heads that PEFT saves for SEQ_CLS and TOKEN_CLS, whatever ``modules_to_save`` lists.
CLASSIFIER_HEADS = ("classifier", "score")
#: Parts of tensor names that only occur for layers whose weights may be tied.
_TIED = ("lora_embedding_", "lm_head.", "embed_tokens.", "wte.")


#: Characters that no path and no UTF-8 file can contain, or that break a message's line.
_CONTROL = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")


class FactorNames(NamedTuple):
    """The suffixes that follow the module's name in the tensor names of A and B."""

    A: str
    B: str


class AdaLoraNames(NamedTuple):
    """The same for Q (as ``A``), P (as ``B``) and Lambda (as ``E``) of AdaLoRA."""

    A: str
    B: str
    E: str


LINEAR_FACTORS = FactorNames("lora_A.weight", "lora_B.weight")
EMBEDDING_FACTORS = FactorNames("lora_embedding_A", "lora_embedding_B")
ADALORA_FACTORS = AdaLoraNames("lora_A", "lora_B", "lora_E")
#: The rows of tokens that are trained in a layer.
TOKEN_ROWS = "token_adapter.trainable_tokens_delta"
#: The bias of B, with ``lora_bias``.
FACTOR_BIAS = "lora_B.bias"
#: DoRA's magnitudes.
MAGNITUDE = "lora_magnitude_vector"
#: The base's own weight or bias of an adapted module, as opposed to a factor.
BASE_LAYER = "base_layer."


def factor_names(kind: str) -> FactorNames:
    """The names of A and B for an adapted module of ``kind`` (``layers.kind_of``)."""
    return EMBEDDING_FACTORS if kind == "embedding" else LINEAR_FACTORS


def modules_to_save(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The suffixes of the modules that PEFT replaces as a whole."""
    heads = CLASSIFIER_HEADS if config.get("task_type") in ("SEQ_CLS", "TOKEN_CLS") else ()
    return (*(config.get("modules_to_save") or ()), *heads)


def is_fully_trained(config: Mapping[str, Any], name: str) -> bool:
    """Whether the module ``name`` is, or is inside, one that PEFT replaces as a whole."""
    suffixes = modules_to_save(config)
    parts = name.split(".")
    return any(".".join(parts[: i + 1]).endswith(suffixes) for i in range(len(parts)))


def check_types(stored: Mapping[str, Any], types: Mapping[str, str], where: str) -> None:
    """Raise AdapterError for the first key whose value is not of its type. Null is the default,
    except for numbers where PEFT rejects it."""
    for key, allowed in types.items():
        value = stored.get(key)
        if key not in stored or (value is None and key not in _NOT_NULLABLE):
            continue
        if not _CHECKS[allowed](value):
            raise AdapterError(f"{where}: {key} = {shown(value)}: allowed: {allowed}")


def check_supported(config: Mapping[str, Any], where: str) -> None:
    """Raise AdapterError for a key that changes the output in a way that lorakit does not
    support."""
    for key, allowed in _SUPPORTED.items():
        value = config.get(key, DEFAULTS.get(key))
        if not any(value is choice or value == choice for choice in allowed):
            names = ", ".join(shown(choice) for choice in allowed)
            hint = ONLY_PEFT if key in _NOT_MERGEABLE else MERGE_WITH_PEFT
            raise AdapterError(
                f"{where}: {key} = {shown(value)}: not supported; allowed: {names}; hint: {hint}"
            )


def check_patterns(config: Mapping[str, Any], where: str) -> None:
    """Raise AdapterError for an invalid regular expression."""
    for key in _PATTERN_KEYS:
        value = config.get(key) or []
        for pattern in [value] if isinstance(value, str) else value:
            try:
                re.compile(pattern)
            except (re.error, TypeError) as error:
                raise AdapterError(f"{where}: {key}: {shown(pattern)}: {error}") from error


def unknown_keys_note(
    config: Mapping[str, Any], where: str, own: Collection[str] = ()
) -> str | None:
    """A note that lists keys of a newer PEFT or of another tool, or None if there are none. Null,
    false and empty values are skipped, since they enable nothing.

    ``own`` are the keys of a method whose format is neither LoRA's nor AdaLoRA's.
    """
    known = {*_KEYS_OF_EVERY_METHOD, *own} if own else _KNOWN_KEYS
    unknown = {key: value for key, value in config.items() if key not in known and value}
    if not unknown:
        return None
    listed = ", ".join(f"{key} = {shown(value, 40)}" for key, value in sorted(unknown.items())[:8])
    more = ", ..." if len(unknown) > 8 else ""
    return f"{where}: unknown keys are ignored: {listed}{more}"


def check_tied(config: Mapping[str, Any], names: Mapping[str, Any], where: str) -> None:
    """Raise AdapterError for ``ensure_weight_tying`` where it has an effect: PEFT then adapts tied
    layers that the file does not name."""
    if config.get("ensure_weight_tying") and any(mark in name for name in names for mark in _TIED):
        raise AdapterError(
            f"{where}: ensure_weight_tying = true: not supported for an adapter of the embeddings "
            "or the output layer; allowed: false"
        )


def without_defaults(settings: Mapping[str, Any]) -> dict[str, Any]:
    """``settings`` without keys at their default; PEFT 0.13 and later know all that remain."""
    return {
        key: value
        for key, value in settings.items()
        if key not in DEFAULTS or (value != DEFAULTS[key] and not (value is None or value == {}))
    }


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond the range of a float
        return False


def _is_rank(value: Any) -> bool:
    return _is_integer(value) and _is_number(value) and bool(value > 0)


def _is_strings(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _is_labels(value: Any) -> bool:
    return isinstance(value, dict) and all(
        key.isdecimal() and isinstance(label, str | int) for key, label in value.items()
    )


def _by_name(value: Any, is_valid: Callable[[Any], bool]) -> bool:
    return isinstance(value, dict) and all(map(is_valid, value.values()))


def _is_mask(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, bool) for item in value)


_CHECKS: dict[str, Callable[[Any], bool]] = {
    "a string": lambda value: isinstance(value, str),
    "a string without control characters": lambda value: (
        isinstance(value, str) and not _CONTROL.search(value)
    ),
    "a list of strings": _is_strings,
    "one or two strings": lambda value: _is_strings(value) and len(value) in (1, 2),
    "a string, or a list of strings": lambda value: isinstance(value, str) or _is_strings(value),
    "true, false": lambda value: isinstance(value, bool),
    "an integer": _is_integer,
    "an integer above 0": _is_rank,
    "an integer, or a list of integers": lambda value: all(
        map(_is_integer, value if isinstance(value, list) else [value])
    ),
    "a probability": lambda value: _is_number(value) and 0 <= value <= 1,
    "a finite number": _is_number,
    "an object": lambda value: isinstance(value, dict),
    "integers above 0 by name": lambda value: _by_name(value, _is_rank),
    "finite numbers by name": lambda value: _by_name(value, _is_number),
    "lists of true and false by name": lambda value: _by_name(value, _is_mask),
    "names by class number": _is_labels,
}
