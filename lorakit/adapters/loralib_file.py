"""The file of a loralib checkpoint: a state dict, as safetensors or as torch saves it."""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lorakit.adapters.files import is_finite
from lorakit.adapters.json_types import check_types
from lorakit.errors import AdapterError, shown

#: Read by ``torch.load(weights_only=True)``, which makes tensors and plain containers only.
PICKLED = (".pt", ".pth", ".bin")
#: What the metadata say, besides what loralib's layers need to be built.
_TOLD = {
    "base_model": "text",
    "embedding": "a list of texts",
    "enable_lora": "lists of true and false by name",
    "lora_alpha": "a finite number",
    "task_type": "text",
}
#: What holds the state dict in a checkpoint that holds more, as those of loralib's examples do.
_WRAPPERS = ("model_state_dict", "state_dict")


def read_state(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors by name, and what lorakit wrote in the metadata, if it wrote the file.

    No code of the file is run. Raises AdapterError if it is no state dict of finite tensors.
    """
    if file.suffix not in (".safetensors", *PICKLED):
        allowed = ", ".join((".safetensors", *PICKLED))
        raise AdapterError(f"{file}: not a checkpoint by its name; allowed: {allowed}")
    told: dict[str, Any] = {}
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, "pt") as opened:
                state: Any = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
                told = _told(opened.metadata() or {})
        else:
            state = torch.load(file, map_location="cpu", weights_only=True)
    except (SafetensorError, OSError, ValueError, EOFError, RuntimeError, KeyError) as error:
        raise AdapterError(f"{file}: corrupt or cut short: {_first_line(error)}") from error
    except pickle.UnpicklingError as error:
        raise AdapterError(
            f"{file}: holds more than tensors, and lorakit runs no code of a file; save "
            "lora_state_dict(model) alone, as safetensors at best"
        ) from error
    for wrapper in _WRAPPERS:
        if isinstance(state, Mapping) and isinstance(state.get(wrapper), Mapping):
            state = state[wrapper]
    if not isinstance(state, Mapping) or not state:
        raise AdapterError(f"{file}: not a state dict: found {type(state).__name__}")
    for name, value in state.items():
        if not isinstance(name, str):
            raise AdapterError(f"{file}: {shown(name)}: not a state dict: a name is text")
        if not isinstance(value, Tensor):
            raise AdapterError(f"{file}: {shown(name)}: not a tensor: {type(value).__name__}")
        if value.is_meta or value.layout != torch.strided:
            raise AdapterError(f"{file}: {name}: a sparse or empty one: allowed: dense tensors")
        if not value.numel() or not is_finite(value):
            problem = "NaN or infinite values" if value.numel() else "no values"
            raise AdapterError(f"{file}: {name}: holds {problem}")
    return dict(state), told


def _told(stored: Mapping[str, str]) -> dict[str, Any]:
    """The metadata that lorakit wrote."""
    if "lorakit_version" not in stored:
        return {}
    told = {key: json.loads(value) for key, value in stored.items() if key != "format"}
    if lacking := [key for key in _TOLD if key not in told]:
        raise ValueError(f"the metadata lack {lacking[0]}")
    check_types(told, _TOLD, "metadata")
    if not told["lora_alpha"] or not all(map(any, told["enable_lora"].values())):
        raise ValueError("metadata that lorakit did not write")
    return told


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
