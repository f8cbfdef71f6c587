"""An adapter as low-rank updates of matrices, without the base model: read from a directory, and
written as a plain LoRA of PEFT with the same ranks."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, replace
from statistics import mode
from typing import Any

from torch import Tensor

from lorakit.adapters.expand import expanded
from lorakit.adapters.peft.initialization import reinitializes
from lorakit.adapters.peft.method import merge_command
from lorakit.adapters.peft.ranks import peft_rank, peft_scaling
from lorakit.adapters.peft.read import AdapterFiles
from lorakit.adapters.peft.schema import (
    ADALORA_FACTORS,
    BASE_LAYER,
    DEFAULTS,
    EMBEDDING_FACTORS,
    FACTOR_BIAS,
    LINEAR_FACTORS,
    LORA_FORMATS,
    MAGNITUDE,
    is_fully_trained,
)
from lorakit.adapters.peft.targets import exact_patterns
from lorakit.errors import AdapterError, shown
from lorakit.kernels.low_rank import LowRankDelta, RowSlice, is_covered_by
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
class AdaptedMatrix(LowRankDelta):
    """An update W + scaling * B A; for an embedding, in_features is the number of tokens.

    ``parts``: role -> (rows, r) of a fused projection of which only parts are adapted.
    """

    embedding: bool = False
    parts: Mapping[str, tuple[RowSlice, int]] | None = None

    @property
    def r(self) -> int:
        return int(self.A.shape[0])

    def factor_of_B(self, r: int, alpha: float) -> float:
        """What B is multiplied by so that the scaling is alpha / r; 1 if it differs from 1 only by
        floating-point noise."""
        return float(number(self.scaling * r / alpha))


@dataclass(frozen=True)
class Updates:
    """``matrices``: adapted module -> update; ``others``: tensors that are not factors (heads,
    biases), by PEFT's names; ``config`` and ``sidecar`` are the contents of the two JSON files."""

    matrices: dict[str, AdaptedMatrix]
    others: dict[str, Tensor]
    config: dict[str, Any]
    sidecar: dict[str, Any]

    @property
    def biases(self) -> list[str]:
        """The names in ``others`` of trained biases of the base."""
        trained = self.config.get("bias") in ("lora_only", "all")
        return [
            name
            for name in self.others
            if name.endswith(BASE_BIAS)
            or (
                trained
                and name.endswith(".bias")
                and not is_fully_trained(self.config, name.rpartition(".")[0])
            )
        ]


def read_updates(files: AdapterFiles) -> Updates:
    """Return the updates of a LoRA or AdaLoRA adapter, with AdaLoRA's Lambda folded into A.

    Raises AdapterError for a method that is not a low-rank product, and for tensors that are
    missing, unknown, misshapen, or not of the configured rank. The base of a PiSSA or OLoRA adapter
    is loaded.
    """
    _check_low_rank(files)
    return _updates(expanded(files) if reinitializes(files.config) else files)


def read_products(files: AdapterFiles) -> Updates:
    """As ``read_updates``; of DoRA, return the products without the magnitudes, and with
    ``lora_bias`` without the biases."""
    beside = (f".{MAGNITUDE}", f".{FACTOR_BIAS}")
    tensors = {k: v for k, v in files.tensors.items() if not k.endswith(beside)}
    return _updates(replace(files, tensors=tensors))


def _updates(files: AdapterFiles) -> Updates:
    if targets := files.config.get("target_parameters"):
        base = files.config.get("base_model_name_or_path")
        raise AdapterError(
            f"{files.directory}: target_parameters = {shown(targets)}: an adapter of parameters, "
            "such as stacked experts, can only be loaded and merged",
            hint=merge_command(base, files.directory, files.method.name),
        )
    names = _ADALORA if files.config["peft_type"] == "ADALORA" else _LORA
    factors: dict[str, dict[str, Tensor]] = {}
    embeddings: dict[str, bool] = {}
    others = {}
    for key, value in files.tensors.items():
        end = next((end for end in names if key.endswith(f".{end}")), None)
        if end is None:
            if "lora_" in key:
                raise AdapterError(f"{files.directory}: unknown tensor: {key}")
            others[key] = value
            continue
        module = key[: -len(end) - 1]
        factor, embedding = names[end]
        factors.setdefault(module, {})[factor] = value
        if embeddings.setdefault(module, embedding) != embedding:
            raise AdapterError(f"{files.directory}: {module} is adapted twice: {key}")
    if not factors:
        raise AdapterError(f"{files.directory}: contains no adapted matrix")
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
    return Updates(matrices, others, files.config, files.sidecar or {})


def _check_low_rank(files: AdapterFiles) -> None:
    name = "dora" if files.config.get("use_dora") else files.method.name
    if name == "dora" or files.config["peft_type"] not in LORA_FORMATS:
        reason = f"{name} is not a product of two factors"
    elif files.config.get("lora_bias"):
        reason = "lora_bias = true: its update is more than a product of two factors"
    else:
        return
    merge = merge_command(files.config.get("base_model_name_or_path"), files.directory, name)
    raise AdapterError(f"{files.directory}: {reason}", hint=f"{merge} writes a plain model instead")


def _low_rank(
    config: Mapping[str, Any], module: str, found: Mapping[str, Tensor], embedding: bool
) -> AdaptedMatrix:
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
        return AdaptedMatrix(
            A, B, scaling_of(config.get("lora_alpha", 8), config.get("init_r", 12))
        )
    if (configured := peft_rank(config, module)) != r:
        raise AdapterError(f"{module} has r = {r}, but {configured} in adapter_config.json")
    return AdaptedMatrix(A, B, peft_scaling(config, module, r), embedding)


def check_factors(module: str, A: Tensor, B: Tensor) -> None:
    """Raise AdapterError unless A is (r, in_features) and B (out_features, r)."""
    check_matrices(module, A, B)
    if A.shape[0] != B.shape[1]:
        raise AdapterError(
            f"{module}: lora_A is {tuple(A.shape)} and lora_B {tuple(B.shape)}: A must have as "
            "many rows as B has columns"
        )


def check_matrices(module: str, A: Tensor, B: Tensor) -> None:
    """Raise AdapterError unless both are matrices of floating-point numbers."""
    for factor, value in (("A", A), ("B", B)):
        if value.ndim != 2 or not value.is_floating_point():
            dtype = str(value.dtype).removeprefix("torch.")
            raise AdapterError(
                f"{module}: lora_{factor} is {tuple(value.shape)}, {dtype}: allowed: a matrix of "
                "floating-point numbers (of a linear layer or an embedding)"
            )


def _in_parts(
    module: str, matrix: AdaptedMatrix, parts: Mapping[str, tuple[RowSlice, int]]
) -> AdaptedMatrix:
    if not is_covered_by(matrix.B, parts.values()):
        raise AdapterError(f"{module}: the parts {', '.join(parts)} do not cover all of lora_B")
    return replace(matrix, parts=parts)


#: Keys of ``adapter_config.json`` that conversion does not change.
_UNCHANGED_KEYS = (
    "auto_mapping", "base_model_name_or_path", "bias", "exclude_modules", "fan_in_fan_out",
    "layers_pattern", "layers_to_transform", "lora_dropout", "modules_to_save", "revision",
    "target_modules", "task_type", "trainable_token_indices",
)  # fmt: skip


def lora_files(
    updates: Updates,
) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Any]]:
    """Return ``adapter_config.json``, the tensors by PEFT's names (without its prefix), and
    ``lorakit.json``. r and lora_alpha are the most common values; patterns have the others."""
    ranks = {name: matrix.r for name, matrix in updates.matrices.items()}
    alphas = {n: number(m.scaling * m.r) for n, m in updates.matrices.items()}
    r, alpha = mode(ranks.values()), mode(alphas.values())
    patterns = {
        "rank_pattern": exact_patterns({n: v for n, v in ranks.items() if v != r}, ranks),
        "alpha_pattern": exact_patterns({n: v for n, v in alphas.items() if v != alpha}, alphas),
    }
    settings = DEFAULTS | {
        key: updates.config[key] for key in _UNCHANGED_KEYS if key in updates.config
    }
    settings |= {"peft_type": "LORA", "r": r, "lora_alpha": alpha, "inference_mode": True}
    settings |= patterns
    settings["target_modules"] = settings.get("target_modules") or sorted(ranks)
    tensors = dict(updates.others)
    for name, matrix in updates.matrices.items():
        own = EMBEDDING_FACTORS if matrix.embedding else LINEAR_FACTORS
        tensors[f"{name}.{own.A}"] = matrix.A
        tensors[f"{name}.{own.B}"] = matrix.B
    return settings, tensors, _sidecar(updates)


def number(value: float) -> float | int:
    """Round to twelve digits, which drops floating-point noise, and to an int if it is one."""
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
