"""loralib's checkpoints: ``MODULE.lora_A``, ``MODULE.lora_B`` and other trained tensors.

They record neither lora_alpha, nor which projections of a MergedLinear are enabled, nor which
modules are embeddings. Files written by lorakit record these in their safetensors metadata: ``r``
and ``lora_alpha`` for the layers' constructors, ``enable_lora`` and ``embedding``, each as JSON.
"""

from __future__ import annotations

import json
import pickle
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from lorakit.adapters.low_rank import BASE_BIAS, BASE_WEIGHT, AdaptedMatrix, Updates, number
from lorakit.adapters.peft.read import is_finite
from lorakit.adapters.peft.schema import check_types
from lorakit.adapters.peft.tokens import row_names
from lorakit.errors import AdapterError, shown
from lorakit.kernels.low_rank import RowSlice
from lorakit.version import __version__

#: Read by ``torch.load(weights_only=True)``, which only creates tensors and plain containers.
PICKLED = (".pt", ".pth", ".bin")
#: Types of the metadata, except for keys that only the layers' constructors need.
_METADATA_TYPES = {
    "base_model": "a string without control characters",
    "embedding": "a list of strings",
    "enable_lora": "lists of true and false by name",
    "lora_alpha": "a finite number",
    "task_type": "a string",
}
#: Keys of the state dict in checkpoints that contain more, such as those of loralib's examples.
_WRAPPERS = ("model_state_dict", "state_dict")


def read_state(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors by name, and the metadata if lorakit wrote the file.

    No code of the file is run. Raises AdapterError unless it is a state dict of finite tensors.
    """
    if file.suffix not in (".safetensors", *PICKLED):
        allowed = ", ".join((".safetensors", *PICKLED))
        raise AdapterError(f"{file}: not a checkpoint; allowed suffixes: {allowed}")
    facts: dict[str, Any] = {}
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, "pt") as opened:
                state: Any = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
                facts = _facts(opened.metadata() or {})
        else:
            state = torch.load(file, map_location="cpu", weights_only=True)
    except (SafetensorError, OSError, ValueError, EOFError, RuntimeError, KeyError) as error:
        raise AdapterError(f"{file}: corrupt or truncated: {_first_line(error)}") from error
    except pickle.UnpicklingError as error:
        raise AdapterError(
            f"{file}: contains more than tensors, and lorakit does not run code from files; "
            "hint: save only lora_state_dict(model), preferably as safetensors"
        ) from error
    for wrapper in _WRAPPERS:
        if isinstance(state, Mapping) and isinstance(state.get(wrapper), Mapping):
            state = state[wrapper]
    if not isinstance(state, Mapping) or not state:
        raise AdapterError(f"{file}: not a state dict: found {type(state).__name__}")
    for name, value in state.items():
        if not isinstance(name, str):
            raise AdapterError(f"{file}: {shown(name)}: not a state dict: a name must be a string")
        if not isinstance(value, Tensor):
            raise AdapterError(f"{file}: {shown(name)}: not a tensor: {type(value).__name__}")
        if value.is_meta or value.layout != torch.strided:
            raise AdapterError(f"{file}: {name}: sparse or without values: allowed: dense tensors")
        if not value.numel() or not is_finite(value):
            problem = "NaN or infinite values" if value.numel() else "no values"
            raise AdapterError(f"{file}: {name}: contains {problem}")
    return dict(state), facts


def _facts(stored: Mapping[str, str]) -> dict[str, Any]:
    """The metadata, if lorakit wrote it."""
    if "lorakit_version" not in stored:
        return {}
    facts = {key: json.loads(value) for key, value in stored.items() if key != "format"}
    if lacking := [key for key in _METADATA_TYPES if key not in facts]:
        raise ValueError(f"the metadata lacks {lacking[0]}")
    check_types(facts, _METADATA_TYPES, "metadata")
    if not facts["lora_alpha"] or not all(map(any, facts["enable_lora"].values())):
        raise ValueError("metadata that lorakit did not write")
    return facts


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


#: The last part of the name by which a module is recognized as a convolution.
_CONVOLUTION = re.compile(r"(?i)conv(?:[123]d)?_?\d*")


def loralib_tensors(updates: Updates) -> tuple[dict[str, Tensor], dict[str, Any], list[str]]:
    """Return the state dict, its metadata and notes.

    ``model.load_state_dict(tensors, strict=False)`` loads it into a model of ``lorakit.nn`` or
    loralib layers with the metadata's r and lora_alpha. A fused projection becomes the stacked
    blocks of a MergedLinear if its parts allow that, else the A and B of a Linear over all rows,
    which is the same update. B is scaled where one lora_alpha does not fit every matrix.
    """
    if rows := row_names(updates.others):
        raise AdapterError(f"{rows[0]}: loralib has no layer for trained rows of tokens")
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    enabled: dict[str, list[bool]] = {}
    without_blocks = []
    for name, matrix in updates.matrices.items():
        enable = _enabled(matrix)
        if enable is not None:
            enabled[name] = enable
        elif matrix.parts:
            without_blocks.append(name)
        factors[name] = matrix.A, matrix.B if enable is None else _stacked(matrix)
    notes = []
    if without_blocks:
        more = len(without_blocks) - 1
        others = f" and {more} more" if more else ""
        notes.append(
            f"{without_blocks[0]}{others}: not blocks of a MergedLinear: written as a Linear over "
            "all rows"
        )
    ranks = {name: int(B.shape[1]) for name, (_, B) in factors.items()}
    alphas = {name: number(m.scaling * ranks[name]) for name, m in updates.matrices.items()}
    factors, alpha = _of_one_alpha(factors, alphas, notes)
    facts = {
        "lorakit_version": __version__,
        "r": ranks if len(set(ranks.values())) > 1 else next(iter(ranks.values())),
        "lora_alpha": alpha,
        "enable_lora": enabled,
        "embedding": [name for name, matrix in updates.matrices.items() if matrix.embedding],
        "fan_in_fan_out": bool(updates.config.get("fan_in_fan_out")),
        "base_model": updates.config.get("base_model_name_or_path"),
        "task_type": updates.config.get("task_type"),
    }
    tensors = {f"{name}.lora_A": A for name, (A, _) in factors.items()}
    tensors |= {f"{name}.lora_B": B for name, (_, B) in factors.items()}
    return tensors | {_in_module(k): v for k, v in updates.others.items()}, facts, notes


def write_state(file: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Write a safetensors file with ``facts`` in its metadata, each as JSON.

    The metadata is sorted, which safetensors does not do, so that equal adapters give equal files.
    """
    metadata = {"format": "pt"} | {key: json.dumps(value) for key, value in facts.items()}
    content = save(dict(tensors), metadata)
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end]) | {"__metadata__": dict(sorted(metadata.items()))}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    file.write_bytes(len(text).to_bytes(8, "little") + text + content[end:])


def merged_linear(A: Tensor, B: Tensor, enable: list[bool], scaling: float) -> AdaptedMatrix:
    """Convert A (n r, in_features) and B (n s, r) of a MergedLinear, with n projections of s rows
    enabled, to one update of the whole matrix: B (len(enable) s, n r), zero outside the blocks."""
    n, r = sum(enable), B.shape[1]
    size = B.shape[0] // n
    full_B = B.new_zeros(len(enable) * size, n * r)
    parts = {}
    for block, at in enumerate(i for i, on in enumerate(enable) if on):
        rows = RowSlice(at * size, (at + 1) * size, len(full_B))
        columns = slice(block * r, (block + 1) * r)
        rows.put(full_B[:, columns], B[block * size : (block + 1) * size])
        parts["qkv"[at] if len(enable) == 3 else str(at)] = (rows, r)
    return AdaptedMatrix(A, full_B, scaling, parts=parts if len(enable) == 3 else None)


def check_no_convolution(
    name: str, matrix: AdaptedMatrix, stored: Mapping[str, Tensor], *, by_name: bool
) -> None:
    """Raise AdapterError for a Conv2d if its name or its bias distinguishes it from a Linear. With
    kernel size k it has B (k out_channels / groups, k r), and a bias of out_channels."""
    bias = stored.get(f"{name}.bias")
    rows = int(matrix.B.shape[0])
    named = by_name and _CONVOLUTION.fullmatch(name.rpartition(".")[2])
    if named or f"{name}.conv.weight" in stored or f"{name}.conv.bias" in stored:
        raise AdapterError(
            f"{name}: a convolution, judging by its name: PEFT's format does not support loralib's "
            "factors of convolutions; hint: eval mode merges them into the model's own weight"
        )
    if bias is not None and tuple(bias.shape) != (rows,):
        raise AdapterError(
            f"{name}.bias is {tuple(bias.shape)}, and lora_B has {rows} rows: neither a Linear nor "
            "a MergedLinear with --enable-lora; a Conv2d cannot be converted"
        )


def _of_one_alpha(
    factors: Mapping[str, tuple[Tensor, Tensor]], alphas: Mapping[str, float], notes: list[str]
) -> tuple[dict[str, tuple[Tensor, Tensor]], float]:
    """Return the factors with B scaled to the most common lora_alpha, and that value."""
    most_common = Counter(alpha for alpha in alphas.values() if alpha).most_common(1)
    alpha = most_common[0][0] if most_common else 1
    scaled = {}
    for name, own in alphas.items():
        A, B = factors[name]
        scaled[name] = A, B if own == alpha else (B.double() * (own / alpha)).float()
        if not is_finite(scaled[name][1]):
            raise AdapterError(f"{name}: lora_B exceeds the range of float32 when scaled")
    if count := sum(own != alpha for own in alphas.values()):
        of = f"{count} of {len(alphas)} matrices"
        notes.append(f"B is scaled in {of} to fit one lora_alpha = {number(alpha)}")
    return scaled, alpha


def _in_module(key: str) -> str:
    """The name of a tensor in the module before PEFT wraps it."""
    for end in (BASE_BIAS, BASE_WEIGHT):
        if key.endswith(end):
            return f"{key.removesuffix(end)}.{end.rpartition('.')[2]}"
    return key


def _enabled(matrix: AdaptedMatrix) -> list[bool] | None:
    """MergedLinear's ``enable_lora``, if the parts are consecutive blocks of one size and rank."""
    if not matrix.parts:
        return None
    sizes = {rows.stop - rows.start for rows, _ in matrix.parts.values()}
    size = sizes.pop()
    starts = [rows.start for rows, _ in matrix.parts.values()]
    out_features = matrix.B.shape[0]
    one_period = all(rows.period == out_features for rows, _ in matrix.parts.values())
    ranks = {r for _, r in matrix.parts.values()}
    if sizes or not one_period or len(ranks) > 1 or any(n % size for n in (out_features, *starts)):
        return None
    return [i * size in starts for i in range(out_features // size)]


def _stacked(matrix: AdaptedMatrix) -> Tensor:
    """The B (s, r) of each part, stacked."""
    assert matrix.parts
    blocks, at = [], 0
    for rows, r in matrix.parts.values():
        blocks.append(rows.of(matrix.B[:, at : at + r].contiguous()))
        at += r
    return torch.cat(blocks)
