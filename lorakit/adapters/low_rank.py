"""An adapter as what it adds to each matrix, read from its directory without the base model.

Updates of matrices as a PEFT LoRA; and as one of a single rank, which vLLM takes too.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lorakit.adapters.peft.read import AdapterFiles, is_finite
from lorakit.adapters.peft.schema import (
    ADALORA_FACTORS,
    BASE_LAYER,
    DEFAULTS,
    EMBEDDING_FACTORS,
    LINEAR_FACTORS,
    LORA_FORMATS,
    is_fully_trained,
    peft_rank,
    peft_scaling,
)
from lorakit.adapters.peft.targets import exact_patterns
from lorakit.errors import AdapterError
from lorakit.kernels.low_rank import RowSlice
from lorakit.methods.adalora import scaling_of
from lorakit.version import __version__

#: Suffix of the tensor name -> the factor, and whether the module is an embedding.
_LORA = {
    LINEAR_FACTORS.A: ("A", False),
    LINEAR_FACTORS.B: ("B", False),
    EMBEDDING_FACTORS.A: ("A", True),
    EMBEDDING_FACTORS.B: ("B", True),
}
_ADALORA = {
    ADALORA_FACTORS.A: ("A", False),
    ADALORA_FACTORS.B: ("B", False),
    ADALORA_FACTORS.E: ("E", False),
}
#: The base's weight of an adapted embedding, and an adapted module's bias.
BASE_WEIGHT, BASE_BIAS = f".{BASE_LAYER}weight", f".{BASE_LAYER}bias"


@dataclass(frozen=True)
class LowRank:
    """W + scaling * B A: A (r, in_features), B (out_features, r); for an embedding in_features are
    the tokens. ``parts``: role -> (rows, r) of a fused projection of which only parts are adapted.
    """

    A: Tensor
    B: Tensor
    scaling: float
    embedding: bool = False
    parts: Mapping[str, tuple[RowSlice, int]] | None = None

    @property
    def r(self) -> int:
        return int(self.A.shape[0])


@dataclass(frozen=True)
class Updates:
    """``matrices`` by the adapted modules' names; ``beside`` are the other tensors (heads, biases)
    by PEFT's names; ``config`` and ``sidecar`` as the two JSON files say it."""

    matrices: dict[str, LowRank]
    beside: dict[str, Tensor]
    config: dict[str, Any]
    sidecar: dict[str, Any]

    @property
    def biases(self) -> list[str]:
        """The names in ``beside`` of biases of the base that were trained."""
        trained = self.config.get("bias") in ("lora_only", "all")
        return [
            name
            for name in self.beside
            if name.endswith(BASE_BIAS)
            or (
                trained
                and name.endswith(".bias")
                and not is_fully_trained(self.config, name.rpartition(".")[0])
            )
        ]


def read_updates(files: AdapterFiles) -> Updates:
    """The updates of a LoRA or AdaLoRA adapter: A, B and the scaling of each matrix; AdaLoRA's
    Lambda is folded into A.

    Raises AdapterError for a method that has no such form, and for tensors that are missing,
    unknown, misshapen, or not of the rank that the configuration says.
    """
    _check_low_rank(files)
    names = _ADALORA if files.config["peft_type"] == "ADALORA" else _LORA
    factors: dict[str, dict[str, Tensor]] = {}
    embeddings: dict[str, bool] = {}
    beside = {}
    for key, value in files.tensors.items():
        end = next((end for end in names if key.endswith(f".{end}")), None)
        if end is None:
            if "lora_" in key:
                raise AdapterError(f"{files.directory}: unknown tensor: {key}")
            beside[key] = value
            continue
        module = key[: -len(end) - 1]
        factor, embedding = names[end]
        factors.setdefault(module, {})[factor] = value
        if embeddings.setdefault(module, embedding) != embedding:
            raise AdapterError(f"{files.directory}: {module} is adapted twice: {key}")
    if not factors:
        raise AdapterError(f"{files.directory}: holds no adapted matrix")
    try:
        matrices = {
            module: _low_rank(files.config, module, found, embeddings[module])
            for module, found in factors.items()
        }
        matrices |= {
            module: _in_parts(module, matrices[module], parts)
            for module, parts in files.parts.items()
            if module in matrices
        }
    except AdapterError as error:
        raise AdapterError(f"{files.directory}: {error}") from error
    return Updates(matrices, beside, files.config, files.sidecar or {})


def _check_low_rank(files: AdapterFiles) -> None:
    name = "dora" if files.config.get("use_dora") else files.method.name
    if name == "dora" or files.config["peft_type"] not in LORA_FORMATS:
        base = files.config.get("base_model_name_or_path") or "BASE"
        raise AdapterError(
            f"{files.directory}: {name} is no product of two factors; lorakit merge {base} "
            f"{files.directory} OUT makes a plain model of it"
        )


def _low_rank(
    config: Mapping[str, Any], module: str, found: Mapping[str, Tensor], embedding: bool
) -> LowRank:
    adalora = config["peft_type"] == "ADALORA"
    if lacking := {"A", "B", *(("E",) if adalora else ())} - set(found):
        raise AdapterError(f"missing tensor: {module}: lora_{min(lacking)}")
    A, B, E = found["A"], found["B"], found.get("E")
    check_factors(module, A, B)
    r = len(A)
    if E is not None:
        if tuple(E.shape) != (r, 1):
            raise AdapterError(f"{module}.lora_E is {tuple(E.shape)}, and lora_A needs ({r}, 1)")
        A = (E.double() * A.double()).float()
        return LowRank(A, B, scaling_of(config.get("lora_alpha", 8), config.get("init_r", 12)))
    if (said := peft_rank(config, module)) != r:
        raise AdapterError(f"{module} has r = {r}, and adapter_config.json says {said}")
    return LowRank(A, B, peft_scaling(config, module, r), embedding)


def check_factors(module: str, A: Tensor, B: Tensor) -> None:
    """Raise AdapterError unless A (r, in_features) and B (out_features, r) are such."""
    check_matrices(module, A, B)
    if A.shape[0] != B.shape[1]:
        raise AdapterError(
            f"{module}: lora_A is {tuple(A.shape)} and lora_B {tuple(B.shape)}: the rows of A and "
            "the columns of B are not as many"
        )


def check_matrices(module: str, A: Tensor, B: Tensor) -> None:
    """Raise AdapterError unless both are matrices of floating-point numbers."""
    for factor, value in (("A", A), ("B", B)):
        if value.ndim != 2 or not value.is_floating_point():
            dtype = str(value.dtype).removeprefix("torch.")
            raise AdapterError(
                f"{module}: lora_{factor} is {tuple(value.shape)}, {dtype}: allowed: a matrix of "
                "floating-point numbers (linear layers and embeddings are converted)"
            )


def _in_parts(module: str, whole: LowRank, parts: Mapping[str, tuple[RowSlice, int]]) -> LowRank:
    """With ``parts``, once each has its own columns of B, and nothing outside of its rows."""
    rest, at = whole.B.clone(), 0
    for rows, r in parts.values():
        if whole.B.shape[0] % rows.period or at + r > whole.r:
            at = -1
            break
        columns = rest[:, at : at + r]
        rows.put(columns, torch.zeros_like(rows.of(columns)))
        at += r
    if at != whole.r or rest.any():
        raise AdapterError(f"{module}: the parts {', '.join(parts)} are not all that it holds")
    return replace(whole, parts=parts)


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
        own = EMBEDDING_FACTORS if matrix.embedding else LINEAR_FACTORS
        tensors[f"{name}.{own.A}"] = matrix.A
        tensors[f"{name}.{own.B}"] = matrix.B
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
