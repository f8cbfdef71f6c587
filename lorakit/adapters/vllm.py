"""Writes the updates of an adapter with a single rank and scaling, which vLLM supports."""

from __future__ import annotations

from dataclasses import replace
from statistics import mode

import torch

from lorakit.adapters.low_rank import BASE_WEIGHT, AdaptedMatrix, Updates
from lorakit.adapters.peft.method import merge_command
from lorakit.adapters.peft.read import is_finite
from lorakit.adapters.peft.tokens import row_names
from lorakit.errors import AdapterError

#: The values of vLLM's ``--max-lora-rank``.
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
#: Those of them that not every version accepts.
NEWER_RANKS = (320,)
#: Modules that vLLM takes from an adapter although they are trained as a whole.
EMBEDDINGS = ("embed_tokens", "lm_head")


def padded(updates: Updates, rank: int | None) -> tuple[Updates, list[str]]:
    """Return the same updates with one rank R and one scaling lora_alpha / R, and notes.

    R is ``rank``, or the smallest of vLLM's ranks that fits all; A and B are padded with zeros.
    lora_alpha is the integer nearest to the most common scaling times R, and
    B' = B * scaling * R / lora_alpha in float32, or B itself if the factor is 1.
    Raises AdapterError if there are trained biases, or if R is too small.
    """
    _check_no_bias(updates)
    R = _rank(updates, rank)
    scaling = mode(m.scaling for m in updates.matrices.values())
    alpha = max(1, round(scaling * R))
    notes = []
    ranks = {m.r for m in updates.matrices.values()}
    if ranks != {R}:
        why = "" if rank else ", the smallest --max-lora-rank of vLLM that fits all matrices"
        notes.append(f"padded with zeros to r = {R}{why}: {_range(ranks)}")
    if scaled := sum(m.factor_of_B(R, alpha) != 1 for m in updates.matrices.values()):
        count = len(updates.matrices)
        notes.append(f"B is scaled in {scaled} of {count} matrices to fit one lora_alpha = {alpha}")
    matrices = {}
    for name, matrix in updates.matrices.items():
        matrices[name] = _padded(matrix, R, alpha)
        if not is_finite(matrices[name].B):
            raise AdapterError(f"{name}: lora_B exceeds the range of float32 when scaled")
    notes += _refused_by_vllm(updates, R)
    config = {**updates.config, "bias": "none"}
    return replace(updates, matrices=matrices, config=config), notes


def _rank(updates: Updates, rank: int | None) -> int:
    name, needed = max(((n, m.r) for n, m in updates.matrices.items()), key=lambda item: item[1])
    if rank is not None:
        if rank < needed:
            raise AdapterError(f"--rank = {rank}: {name} has r = {needed}; allowed: from {needed}")
        return rank
    fitting = [r for r in VLLM_RANKS if r >= needed]
    if not fitting:
        raise AdapterError(
            f"{name} has r = {needed}, and vLLM supports at most {VLLM_RANKS[-1]}; hint: --rank "
            f"{needed} writes it for PEFT only"
        )
    return fitting[0]


def _padded(matrix: AdaptedMatrix, R: int, alpha: int) -> AdaptedMatrix:
    """A (R, in_features) and B (out_features, R) in float32, rounded once."""
    factor = matrix.factor_of_B(R, alpha)
    A = matrix.A.new_zeros(R, matrix.A.shape[1], dtype=torch.float32)
    B = matrix.B.new_zeros(matrix.B.shape[0], R, dtype=torch.float32)
    A[: matrix.r] = matrix.A
    B[:, : matrix.r] = matrix.B if factor == 1 else matrix.B.double() * factor
    return AdaptedMatrix(A, B, alpha / R, matrix.embedding)


def _check_no_bias(updates: Updates) -> None:
    if biases := updates.biases:
        base = updates.config.get("base_model_name_or_path")
        merge = merge_command(base, "ADAPTER", str(updates.sidecar.get("method") or ""))
        raise AdapterError(
            f"{biases[0]}: a plain LoRA cannot store trained biases ({len(biases)} here); hint: "
            f"{merge} writes a plain model instead"
        )


def fully_trained(updates: Updates) -> list[str]:
    """The modules that are trained as a whole, which vLLM rejects but for the embeddings."""
    known = {*row_names(updates.others), *updates.biases}
    kept = tuple(f"{name}{BASE_WEIGHT}" for name in EMBEDDINGS)
    names = (name for name in updates.others if name not in known and not name.endswith(kept))
    return sorted({name.rpartition(".")[0] for name in names})


def _refused_by_vllm(updates: Updates, R: int) -> list[str]:
    notes = []
    rejected = fully_trained(updates)
    if row_names(updates.others):
        notes.append("the rows of new tokens are kept, which PEFT reads and vLLM rejects")
    if rejected:
        named = updates.config.get("modules_to_save") or rejected
        notes.append(
            f"{', '.join(named)}: kept as fully trained (modules_to_save), which PEFT "
            "needs and vLLM rejects"
        )
    largest = VLLM_RANKS[-1]
    if largest < R:
        notes.append(f"r = {R}: vLLM supports at most {largest}")
    return notes


def _range(ranks: set[int]) -> str:
    return f"r was {min(ranks)}" + (f" to {max(ranks)}" if len(ranks) > 1 else "")
