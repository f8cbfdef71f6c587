"""Reads an adapter directory in PEFT's format, and the base model that it names.

No model is built, and transformers is imported only to download from the Hub.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from lorakit.adapters.peft.initialization import check_initialization
from lorakit.adapters.peft.locate import adapter_directory
from lorakit.adapters.peft.method import NAME_METHOD, find_method
from lorakit.adapters.peft.raw_names import peft_names
from lorakit.adapters.peft.schema import (
    ADALORA_TYPES,
    CLASSIFIER_HEADS,
    CONFIG,
    CONFIG_TYPES,
    LORA_FORMATS,
    LORA_TYPES,
    PREFIX,
    SHARED_PREFIX,
    SIDECAR,
    SIDECAR_TYPES,
    WEIGHTS,
    check_patterns,
    check_supported,
    check_tied,
    check_types,
    unknown_keys_note,
)
from lorakit.adapters.peft.tokens import check_indices, unwrapped
from lorakit.errors import AdapterError, shown
from lorakit.io.json_file import read_json_object
from lorakit.kernels.low_rank import RowSlice
from lorakit.methods.base import Method
from lorakit.notes import Say, to_stderr

if TYPE_CHECKING:
    from lorakit.models.kinds import TaskType

#: Task type -> what the names of its classes of transformers contain.
_CLASS_NAMES: dict[TaskType, str] = {
    "TOKEN_CLS": "TokenClassification",
    "SEQ_CLS": "SequenceClassification",
    "CAUSAL_LM": "LM",
}
#: With ``bias: all`` and ``save_embedding_layers``, PEFT also writes the tensors of fully trained
#: modules under the names of its wrapper, and the original values that they replace.
_DUPLICATE = re.compile(r"\.(?:modules_to_save|original_module)\.")


@dataclass(frozen=True)
class AdapterFiles:
    """The contents of an adapter directory.

    ``config`` is ``adapter_config.json``; ``tensors`` are keyed without ``base_model.model.``;
    ``sidecar`` is ``lorakit.json``, None if lorakit did not write the adapter. ``method`` reads the
    tensors; ``shared`` are those that all of its layers have in common. ``has_raw_names``: whether
    PEFT could not load the names in the file.
    """

    directory: Path
    config: dict[str, Any]
    tensors: dict[str, Tensor]
    sidecar: dict[str, Any] | None
    method: Method
    shared: dict[str, Tensor] = field(default_factory=dict)
    has_raw_names: bool = False

    @property
    def trains_base(self) -> bool:
        """Whether the tensors include single parameters of the base."""
        return not self.method.kinds or self.config.get("bias") in ("lora_only", "all")

    @property
    def parts(self) -> dict[str, dict[str, tuple[RowSlice, int]]]:
        """Fused projection -> role -> (rows, rank), where only parts of it are adapted; in the
        order of the rows, which is also that of the tensors."""
        stored = (self.sidecar or {}).get("parts") or {}
        try:
            return {name: parse_parts(parts) for name, parts in stored.items()}
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise AdapterError(
                f"{self.directory / SIDECAR}: parts = {shown(stored)}: allowed: for each module, "
                "q, k and v with integers start, stop, period, r, where 0 <= start < stop <= "
                "period and r >= 1; one period, and no overlap"
            ) from error

    @property
    def brings_head(self) -> bool:
        """Whether the tensors include a classification head."""
        if not self.classifies:
            return False
        return self.sidecar is not None or any(
            name.partition(".")[0] in CLASSIFIER_HEADS for name in self.tensors
        )

    @property
    def task_type(self) -> TaskType:
        """The kind of model that the base is loaded as. Raises AdapterError for another one."""
        task = self.config.get("task_type")
        base = str((self.config.get("auto_mapping") or {}).get("base_model_class"))
        for known, name in _CLASS_NAMES.items():
            if task == known or (task is None and name in base):
                return known
        # PEFT's default is null; without a known class, the tensors decide.
        if task is None and not re.search(r"For(?!ConditionalGeneration)", base):
            heads = any(name.partition(".")[0] in CLASSIFIER_HEADS for name in self.tensors)
            return "SEQ_CLS" if heads else "CAUSAL_LM"
        raise AdapterError(
            f"{self.directory / CONFIG}: task_type = {shown(task)}: allowed: CAUSAL_LM, SEQ_CLS, "
            "TOKEN_CLS"
        )

    @property
    def classifies(self) -> bool:
        """Whether the base is loaded with a classification head, for texts or for tokens."""
        return self.task_type != "CAUSAL_LM"

    @property
    def is_token_classifier(self) -> bool:
        """Whether the base is loaded with a head for tokens."""
        return self.task_type == "TOKEN_CLS"


def read_adapter(
    directory: str | Path, say: Say = to_stderr, hint: str = NAME_METHOD
) -> AdapterFiles:
    """Read an adapter that lorakit or PEFT wrote, from a directory or the Hub.

    ``say`` receives notes about unknown keys and changed code; ``hint`` says how to name a user's
    method. Raises AdapterError for an adapter that is missing, incomplete or corrupt, for pickled
    weights, and for settings that lorakit does not support.
    """
    directory = adapter_directory(directory)
    config = read_adapter_config(directory)
    where = str(directory / CONFIG)
    sidecar = _read_json(directory / SIDECAR)
    check_types(sidecar or {}, SIDECAR_TYPES, str(directory / SIDECAR))
    method = find_method(config, sidecar or {}, where, say, hint)
    patterns = ADALORA_TYPES if config["peft_type"] == "ADALORA" else LORA_TYPES
    check_types(config, CONFIG_TYPES | patterns, where)
    check_patterns(config, where)
    lora_format = config["peft_type"] in LORA_FORMATS
    if lora_format:
        check_supported(config, where)
        check_indices(config, where)
        check_initialization(config, where, say)
    else:
        _check_no_foreign_patterns(config, method, where)
    trains_biases = config.get("bias") in ("lora_only", "all")
    stored = _stored(directory)
    names = _names(directory, stored, trains_biases)
    tensors, shared = _tensors(
        directory / WEIGHTS, {n: stored[o] for o, n in names.items()}, method
    )
    tensors = _without_duplicates(unwrapped(tensors), config)
    own = () if lora_format else method.keys()
    if method.peft_loads and (note := unknown_keys_note(config, where, own)):
        say(note)
    if lora_format:
        check_tied(config, tensors, where)
    else:
        try:
            tensors = method.unpack(config, tensors)
        except AdapterError as error:
            raise AdapterError(f"{directory}: {error}") from error
    raw = any(own != name for own, name in names.items())
    return AdapterFiles(directory, config, tensors, sidecar, method, shared, raw)


def read_adapter_config(directory: Path) -> dict[str, Any]:
    """Read ``adapter_config.json`` as it is. Raises AdapterError if it is missing or not a JSON
    object."""
    config = _read_json(directory / CONFIG)
    if config is None:
        raise AdapterError(f"{directory}: not an adapter: {CONFIG} is missing")
    return config


def read_sidecar(directory: str | Path) -> dict[str, Any]:
    """Read ``lorakit.json`` of an adapter, which is empty if lorakit did not write it. Raises
    AdapterError like ``read_adapter``."""
    file = adapter_directory(directory) / SIDECAR
    sidecar = _read_json(file) or {}
    check_types(sidecar, SIDECAR_TYPES, str(file))
    return sidecar


def _check_no_foreign_patterns(config: Mapping[str, Any], method: Method, where: str) -> None:
    """Raise AdapterError for LoRA's values by module name if ``method`` has one for all modules."""
    for key in {"alpha_pattern", "rank_pattern"} - method.keys():
        if config.get(key):
            raise AdapterError(
                f"{where}: {key} = {shown(config[key])}: not supported by {method.name}; "
                "allowed: {}"
            )


def is_finite(tensor: Tensor) -> bool:
    """Whether the tensor has no NaN or infinite values."""
    if not tensor.is_floating_point():
        return True
    values = tensor.float() if tensor.itemsize == 1 else tensor  # float8 has no isfinite
    # A finite sum proves it, 40 times faster than an elementwise check. The sum of large finite
    # values may be infinite, however.
    if math.isfinite(values.sum(dtype=torch.float32).item()):
        return True
    return bool(values.isfinite().all())


def split_key(key: str, modules: Collection[str]) -> tuple[str, str]:
    """Split ``key`` into the longest prefix that is one of ``modules``, and the rest; return
    ``("", key)`` if there is none."""
    parts = key.split(".")
    for depth in range(len(parts) - 1, 0, -1):
        if (name := ".".join(parts[:depth])) in modules:
            return name, ".".join(parts[depth:])
    return "", key


def parse_parts(stored: Mapping[str, Mapping[str, int]]) -> dict[str, tuple[RowSlice, int]]:
    """Sorted by row. Raises ValueError, TypeError, KeyError or AttributeError if malformed."""
    found: dict[str, tuple[RowSlice, int]] = {}
    at = 0
    for role, part in sorted(stored.items(), key=lambda item: item[1]["start"]):
        numbers = [part[key] for key in ("start", "stop", "period", "r")]
        start, stop, period, r = numbers
        if role not in ("q", "k", "v") or any(type(number) is not int for number in numbers):
            raise TypeError(role)
        if not at <= start < stop <= period or r < 1:
            raise ValueError(role)
        found[role] = RowSlice(start, stop, period), r
        at = stop
    if len({rows.period for rows, _ in found.values()}) > 1:
        raise ValueError("period")
    return found


def _without_duplicates(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any]
) -> dict[str, Tensor]:
    biases = config.get("bias") == "all"
    return {
        name: value
        for name, value in tensors.items()
        if not (_DUPLICATE.search(name) and (biases or _DUPLICATE.sub(".", name) in tensors))
    }


def _read_json(file: Path) -> dict[str, Any] | None:
    try:
        return read_json_object(file)
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise AdapterError(f"{file}: {error}") from error


def _stored(directory: Path) -> Mapping[str, Tensor]:
    file = directory / WEIGHTS
    if not file.is_file():
        pickled = directory / "adapter_model.bin"
        if pickled.exists():
            raise AdapterError(
                f"{pickled}: pickled weights are not supported; hint: save the adapter as "
                "safetensors with PEFT"
            )
        raise AdapterError(f"{directory}: incomplete adapter: {WEIGHTS} is missing")
    try:
        stored: Mapping[str, Tensor] = load_file(file)
    except (SafetensorError, OSError, ValueError) as error:
        raise AdapterError(f"{file}: corrupt or truncated: {error}") from error
    if not stored:
        raise AdapterError(f"{file}: contains no tensors")
    return stored


def _names(directory: Path, stored: Mapping[str, Tensor], trains_biases: bool) -> dict[str, str]:
    try:
        return peft_names(stored, trains_biases)
    except AdapterError as error:
        raise AdapterError(f"{directory / WEIGHTS}: {error}") from error


def _tensors(
    file: Path, stored: Mapping[str, Tensor], method: Method
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The tensors of modules, and those that all layers share."""
    tensors, shared = {}, {}
    common = {f"{SHARED_PREFIX}{name}": name for name in method.shared}
    for name, tensor in stored.items():
        named = name.startswith(PREFIX) or name in common
        # PEFT writes empty tensors for a matrix that AdaLoRA pruned to rank 0.
        empty = not tensor.numel() and method.peft_type != "ADALORA"
        if not named or empty:
            problem = "empty tensor" if named else "not a tensor name of PEFT"
            raise AdapterError(f"{file}: {name}: {problem}")
        if not is_finite(tensor):
            raise AdapterError(f"{file}: {name}: contains NaN or infinite values")
        # Few torch operations support float8.
        is_float8 = tensor.is_floating_point() and tensor.itemsize == 1
        value = tensor.float() if is_float8 else tensor
        if name in common:
            shared[common[name]] = value
        else:
            tensors[name.removeprefix(PREFIX)] = value
    return tensors, shared
