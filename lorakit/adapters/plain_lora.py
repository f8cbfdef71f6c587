"""Updates of matrices as a PEFT LoRA; and as one of a single rank, which vLLM takes too."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lorakit import __version__
from lorakit.adapters.files import is_finite
from lorakit.adapters.low_rank import BASE_WEIGHT, LowRank, Updates
from lorakit.adapters.peft_config import DEFAULTS, exact_patterns
from lorakit.errors import AdapterError

#: The ranks that vLLM can be started with (``--max-lora-rank``).
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
#: The keys of ``adapter_config.json`` that hold for every form of the same adapter.
_KEPT = (
    "auto_mapping", "base_model_name_or_path", "bias", "exclude_modules", "fan_in_fan_out",
    "layers_pattern", "layers_to_transform", "lora_dropout", "modules_to_save", "revision",
    "target_modules", "task_type",
)  # fmt: skip


def padded(updates: Updates, rank: int | None) -> tuple[Updates, list[str]]:
    """The same updates, all of one rank R and one scaling lora_alpha / R, and what there is to say.

    R is ``rank``, or the least of vLLM's ranks that holds all; A and B get rows and columns of
    zeros. lora_alpha is the integer nearest to what the commonest scaling asks for, and
    B' = B * scaling * R / lora_alpha, in float32: B itself where that is 1.
    Raises AdapterError if trained biases are among them, or R is too small.
    """
    _check_no_bias(updates)
    R = _rank(updates, rank)
    scaling = _commonest(m.scaling for m in updates.matrices.values())
    alpha = max(1, round(scaling * R))
    notes = []
    ranks = {m.r for m in updates.matrices.values()}
    if ranks != {R}:
        notes.append(f"padded with zeros to r = {R}: {_span(ranks)}")
    if scaled := sum(_factor(m, R, alpha) != 1 for m in updates.matrices.values()):
        count = len(updates.matrices)
        notes.append(
            f"B is scaled in {scaled} of {count} matrices, so that lora_alpha = {alpha} fits all"
        )
    matrices = {}
    for name, matrix in updates.matrices.items():
        matrices[name] = _padded(matrix, R, alpha)
        if not is_finite(matrices[name].B):
            raise AdapterError(f"{name}: lora_B is too large for float32 when it is scaled")
    notes += _refused_by_vllm(updates, R)
    config = {**updates.config, "bias": "none"}
    return replace(updates, matrices=matrices, config=config), notes


def lora_files(
    updates: Updates,
) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Any]]:
    """``adapter_config.json``, tensors by PEFT's names (without its prefix), ``lorakit.json``.

    r and lora_alpha are the commonest, and patterns hold the others.
    """
    ranks = {name: matrix.r for name, matrix in updates.matrices.items()}
    alphas = {n: number(m.scaling * m.r) for n, m in updates.matrices.items()}
    r, alpha = _commonest(ranks.values()), _commonest(alphas.values())
    patterns = {
        "rank_pattern": exact_patterns({n: v for n, v in ranks.items() if v != r}, ranks),
        "alpha_pattern": exact_patterns({n: v for n, v in alphas.items() if v != alpha}, alphas),
    }
    settings = DEFAULTS | {key: updates.config[key] for key in _KEPT if key in updates.config}
    settings |= {"peft_type": "LORA", "r": r, "lora_alpha": alpha, "inference_mode": True}
    settings |= patterns
    settings["target_modules"] = settings.get("target_modules") or sorted(ranks)
    tensors = dict(updates.beside)
    for name, matrix in updates.matrices.items():
        stem = "lora_embedding_{}" if matrix.embedding else "lora_{}.weight"
        tensors[f"{name}.{stem.format('A')}"] = matrix.A
        tensors[f"{name}.{stem.format('B')}"] = matrix.B
    return settings, tensors, _sidecar(updates)


def number(value: float) -> float | int:
    """Twelve digits of it, without the noise of the last bits; an integer if it is one."""
    rounded = float(f"{value:.12g}")
    return int(rounded) if rounded.is_integer() else rounded


def _sidecar(updates: Updates) -> dict[str, Any]:
    info = {key: value for key, value in updates.sidecar.items() if key != "parts"}
    parts = {
        name: {
            role: dataclasses.asdict(rows) | {"r": r} for role, (rows, r) in matrix.parts.items()
        }
        for name, matrix in updates.matrices.items()
        if matrix.parts
    }
    info |= {"lorakit_version": __version__, "method": "lora"}
    return info | ({"parts": parts} if parts else {})


def _rank(updates: Updates, rank: int | None) -> int:
    name, needed = max(((n, m.r) for n, m in updates.matrices.items()), key=lambda item: item[1])
    if rank is not None:
        if rank < needed:
            raise AdapterError(f"--rank = {rank}: {name} has r = {needed}; allowed: from {needed}")
        return rank
    fitting = [r for r in VLLM_RANKS if r >= needed]
    if not fitting:
        raise AdapterError(
            f"{name} has r = {needed}, and vLLM takes {VLLM_RANKS[-1]} at most; --rank {needed} "
            "writes it for PEFT alone"
        )
    return fitting[0]


def _padded(matrix: LowRank, R: int, alpha: int) -> LowRank:
    """A (R, in_features) and B (out_features, R), float32; rounded once."""
    factor = _factor(matrix, R, alpha)
    A = matrix.A.new_zeros(R, matrix.A.shape[1], dtype=torch.float32)
    B = matrix.B.new_zeros(matrix.B.shape[0], R, dtype=torch.float32)
    A[: matrix.r] = matrix.A
    B[:, : matrix.r] = matrix.B if factor == 1 else matrix.B.double() * factor
    return LowRank(A, B, alpha / R, matrix.embedding)


def _factor(matrix: LowRank, R: int, alpha: int) -> float:
    """What B is multiplied by; 1 where only the last bits of the scaling say otherwise."""
    return float(number(matrix.scaling * R / alpha))


def _check_no_bias(updates: Updates) -> None:
    if biases := updates.biases:
        base = updates.config.get("base_model_name_or_path") or "BASE"
        raise AdapterError(
            f"{biases[0]}: a plain LoRA has no place for trained biases, {len(biases)} here; "
            f"lorakit merge {base} ADAPTER OUT makes a plain model of all"
        )


def _refused_by_vllm(updates: Updates, R: int) -> list[str]:
    notes = []
    read = tuple(f"{name}{BASE_WEIGHT}" for name in ("embed_tokens", "lm_head"))
    kept = sorted({n.rpartition(".")[0] for n in updates.beside if not n.endswith(read)})
    if kept:
        whole = updates.config.get("modules_to_save") or kept
        notes.append(
            f"{', '.join(whole)}: kept whole (modules_to_save): PEFT needs it, and vLLM refuses it"
        )
    largest = VLLM_RANKS[-1]
    if largest < R:
        notes.append(f"r = {R}: vLLM takes {largest} at most")
    return notes


def _commonest(values: Iterable[Any]) -> Any:
    return Counter(values).most_common(1)[0][0]


def _span(ranks: set[int]) -> str:
    low, high = min(ranks), max(ranks)
    return f"r was {low}" if low == high else f"r was {low} to {high}"
