"""An adapter as what it adds to each matrix, read from its directory without the base model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lorakit.adapters.files import AdapterFiles
from lorakit.adapters.peft_config import SEQ_CLS_HEADS
from lorakit.errors import AdapterError
from lorakit.layers import Rows
from lorakit.methods.adalora import scaling_of
from lorakit.methods.lora_form import peft_rank, peft_scaling

#: What follows a module's name in the file -> the factor, and whether the module is an embedding.
_LORA = {
    "lora_A.weight": ("A", False),
    "lora_B.weight": ("B", False),
    "lora_embedding_A": ("A", True),
    "lora_embedding_B": ("B", True),
}
_ADALORA = {"lora_A": ("A", False), "lora_B": ("B", False), "lora_E": ("E", False)}
#: The base's weight of an adapted embedding, and an adapted module's bias.
BASE_WEIGHT, BASE_BIAS = ".base_layer.weight", ".base_layer.bias"


@dataclass(frozen=True)
class LowRank:
    """W + scaling * B A: A (r, in_features), B (out_features, r); for an embedding in_features are
    the tokens. ``parts``: role -> (rows, r) of a fused projection of which only parts are adapted.
    """

    A: Tensor
    B: Tensor
    scaling: float
    embedding: bool = False
    parts: Mapping[str, tuple[Rows, int]] | None = None

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
            or (trained and name.endswith(".bias") and not self._is_whole(name))
        ]

    def _is_whole(self, name: str) -> bool:
        """Whether the tensor is of a module that was trained whole."""
        ends = tuple(self.config.get("modules_to_save") or ())
        if self.config.get("task_type") == "SEQ_CLS":
            ends += SEQ_CLS_HEADS
        parts = name.split(".")[:-1]
        above = (".".join(parts[: depth + 1]) for depth in range(len(parts)))
        return any(module.endswith(ends or ("\0",)) for module in above)


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
    if name == "dora" or not files.method.peft_loads:
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


def _in_parts(module: str, whole: LowRank, parts: Mapping[str, tuple[Rows, int]]) -> LowRank:
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
