"""The file of a loralib checkpoint: a state dict, as safetensors or as torch saves it.

loralib's checkpoints: ``MODULE.lora_A``, ``MODULE.lora_B`` and what trained beside them.

They know neither lora_alpha, nor which projections of a MergedLinear are enabled, nor which modules
are embeddings. What lorakit writes says that in the metadata of the safetensors file: ``r`` and
``lora_alpha`` for the layers' constructors, ``enable_lora``, ``embedding``, each as JSON.
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
from torch import Tensor

from lorakit.adapters.low_rank import BASE_BIAS, BASE_WEIGHT, LowRank, Updates, number
from lorakit.adapters.peft.read import is_finite
from lorakit.adapters.peft.schema import check_types
from lorakit.errors import AdapterError, shown
from lorakit.kernels.low_rank import RowSlice
from lorakit.version import __version__

#: Read by ``torch.load(weights_only=True)``, which makes tensors and plain containers only.
PICKLED = (".pt", ".pth", ".bin")
#: What the metadata say, besides what loralib's layers need to be built.
_TOLD = {
    "base_model": "a string",
    "embedding": "a list of strings",
    "enable_lora": "lists of true and false by name",
    "lora_alpha": "a finite number",
    "task_type": "a string",
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
        raise AdapterError(f"{file}: corrupt or truncated: {_first_line(error)}") from error
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


#: The last part of the name by which a module is taken for a convolution.
_CONVOLUTION = re.compile(r"(?i)conv(?:[123]d)?_?\d*")


def loralib_tensors(updates: Updates) -> tuple[dict[str, Tensor], dict[str, Any], list[str]]:
    """The state dict, what its metadata says, and what there is to tell.

    ``model.load_state_dict(tensors, strict=False)`` takes it on a model built of ``lorakit.nn`` or
    loralib layers with the metadata's r and lora_alpha. A fused projection becomes the stacked
    blocks of a MergedLinear where its parts are such; else A and B of a Linear on the whole of it,
    the same update. Where one lora_alpha cannot say every scaling, B is multiplied.
    """
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    enabled: dict[str, list[bool]] = {}
    whole = []
    for name, matrix in updates.matrices.items():
        enable = _enabled(matrix)
        if enable is not None:
            enabled[name] = enable
        elif matrix.parts:
            whole.append(name)
        factors[name] = matrix.A, matrix.B if enable is None else _stacked(matrix)
    notes = []
    if whole:
        others = f" and {len(whole) - 1} more" if len(whole) > 1 else ""
        notes.append(f"{whole[0]}{others}: no blocks of a MergedLinear: a Linear on all rows")
    ranks = {name: int(B.shape[1]) for name, (_, B) in factors.items()}
    alphas = {name: number(m.scaling * ranks[name]) for name, m in updates.matrices.items()}
    factors, alpha = _of_one_alpha(factors, alphas, notes)
    told = {
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
    return tensors | {_in_module(k): v for k, v in updates.beside.items()}, told, notes


def metadata(told: Mapping[str, Any]) -> dict[str, str]:
    """``told`` as safetensors holds it: text by name."""
    return {"format": "pt"} | {key: json.dumps(value) for key, value in told.items()}


def merged_linear(A: Tensor, B: Tensor, enable: list[bool], scaling: float) -> LowRank:
    """MergedLinear's A (n r, in_features) and B (n s, r), n projections of s rows enabled, as one
    update of the whole matrix: B (len(enable) s, n r), zero outside of the blocks."""
    n, r = sum(enable), B.shape[1]
    size = B.shape[0] // n
    whole = B.new_zeros(len(enable) * size, n * r)
    parts = {}
    for block, at in enumerate(i for i, on in enumerate(enable) if on):
        rows = RowSlice(at * size, (at + 1) * size, len(whole))
        columns = slice(block * r, (block + 1) * r)
        rows.put(whole[:, columns], B[block * size : (block + 1) * size])
        parts["qkv"[at] if len(enable) == 3 else str(at)] = (rows, r)
    return LowRank(A, whole, scaling, parts=parts if len(enable) == 3 else None)


def check_no_convolution(
    name: str, matrix: LowRank, stored: Mapping[str, Tensor], *, by_name: bool
) -> None:
    """Raise AdapterError for a Conv2d where its name or its bias tells it from a Linear: of kernel
    k, it has B (k out_channels / groups, k r), and a bias of out_channels."""
    bias = stored.get(f"{name}.bias")
    rows = int(matrix.B.shape[0])
    named = by_name and _CONVOLUTION.fullmatch(name.rpartition(".")[2])
    if named or f"{name}.conv.weight" in stored or f"{name}.conv.bias" in stored:
        raise AdapterError(
            f"{name}: a convolution by its name: PEFT's form has no place for loralib's factors of "
            "one; in eval mode the model's own weight has them merged"
        )
    if bias is not None and tuple(bias.shape) != (rows,):
        raise AdapterError(
            f"{name}.bias is {tuple(bias.shape)}, and lora_B has {rows} rows: neither a Linear nor "
            "a MergedLinear as --enable-lora has it, and a Conv2d cannot be converted"
        )


def _of_one_alpha(
    factors: Mapping[str, tuple[Tensor, Tensor]], alphas: Mapping[str, float], notes: list[str]
) -> tuple[dict[str, tuple[Tensor, Tensor]], float]:
    """The commonest lora_alpha, and the factors with B multiplied where it is another."""
    commonest = Counter(alpha for alpha in alphas.values() if alpha).most_common(1)
    alpha = commonest[0][0] if commonest else 1
    scaled = {}
    for name, own in alphas.items():
        A, B = factors[name]
        scaled[name] = A, B if own == alpha else (B.double() * (own / alpha)).float()
        if not is_finite(scaled[name][1]):
            raise AdapterError(f"{name}: lora_B is too large for float32 when it is scaled")
    if count := sum(own != alpha for own in alphas.values()):
        of = f"{count} of {len(alphas)} matrices"
        notes.append(f"B is scaled in {of}, so that one lora_alpha = {number(alpha)} fits all")
    return scaled, alpha


def _in_module(key: str) -> str:
    """The name inside of the module that PEFT wraps."""
    for end in (BASE_BIAS, BASE_WEIGHT):
        if key.endswith(end):
            return f"{key.removesuffix(end)}.{end.rpartition('.')[2]}"
    return key


def _enabled(matrix: LowRank) -> list[bool] | None:
    """MergedLinear's ``enable_lora``, if the parts are blocks of one size and rank that lie one
    after the other."""
    if not matrix.parts:
        return None
    sizes = {rows.stop - rows.start for rows, _ in matrix.parts.values()}
    size = sizes.pop()
    starts = [rows.start for rows, _ in matrix.parts.values()]
    out_features = matrix.B.shape[0]
    whole = all(rows.period == out_features for rows, _ in matrix.parts.values())
    ranks = {r for _, r in matrix.parts.values()}
    if sizes or not whole or len(ranks) > 1 or any(n % size for n in (out_features, *starts)):
        return None
    return [i * size in starts for i in range(out_features // size)]


def _stacked(matrix: LowRank) -> Tensor:
    """The parts' own B (s, r) one below the other."""
    assert matrix.parts
    blocks, at = [], 0
    for rows, r in matrix.parts.values():
        blocks.append(rows.of(matrix.B[:, at : at + r].contiguous()))
        at += r
    return torch.cat(blocks)
