"""The factors of each matrix that an adapter updates, by module."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from lorakit.adapters.expand import expanded
from lorakit.adapters.low_rank import AdaptedMatrix, read_products
from lorakit.adapters.peft.initialization import reinitializes
from lorakit.adapters.peft.read import AdapterFiles, read_adapter
from lorakit.adapters.peft.schema import LORA_FORMATS
from lorakit.errors import AdapterError
from lorakit.kernels.low_rank import LowRankDelta, RowSlice
from lorakit.module_names import ROLES, layer_of
from lorakit.notes import Say

#: Names that several modules of one layer have, and that need their parent's to be told apart.
_SHARED = ("dense",)
_INDEX = re.compile(r"[0-9]{1,9}")


@dataclass(frozen=True)
class Factors(LowRankDelta):
    """The update of a matrix, or of the ``rows`` of one role in a fused projection.

    ``owner`` is the module that has the matrix; ``r`` counts the triplets of AdaLoRA whose lambda
    is not zero, and the rows of A for other methods.
    """

    owner: str
    role: str
    r: int
    rows: RowSlice | None = None

    @property
    def layer(self) -> int | None:
        return layer_of(self.owner)

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features); of an embedding, (dimensions, tokens)."""
        return self.B.shape[0], self.A.shape[1]


@dataclass(frozen=True)
class AdapterFactors:
    """``matrices``: module -> factors, where the parts of a fused projection have their role at
    the end (``h.0.attn.c_attn.q``)."""

    files: AdapterFiles
    method: str
    matrices: dict[str, Factors]


def read_factors(adapter: str | Path, say: Say) -> AdapterFactors:
    """Read an adapter that lorakit or PEFT wrote. Raises AdapterError for one that is missing or
    corrupt, and for methods whose update is not a product of two factors."""
    files = read_adapter(adapter, say, "it cannot be inspected")
    method = (files.sidecar or {}).get("method") or files.method.name
    if files.config["peft_type"] not in LORA_FORMATS:
        raise AdapterError(
            f"{files.directory}: {method} has no low-rank factors; allowed: adapters of LoRA, "
            "LoRA+, AdaLoRA, DoRA and MoSLoRA"
        )
    if reinitializes(files.config):
        files = expanded(files)
    adalora = method == "adalora"
    matrices: dict[str, Factors] = {}
    products = read_products(files).matrices
    for module in sorted(products, key=_natural):
        _check_range(f"{files.directory}: {module}", products[module])
        matrices |= _parts(module, products[module], adalora)
    return AdapterFactors(files, method, matrices)


def _check_range(where: str, matrix: AdaptedMatrix) -> None:
    """Raise AdapterError if the squares of the update may not fit into float64."""
    bound = abs(matrix.scaling) * float(matrix.A.double().norm()) * float(matrix.B.double().norm())
    if not math.isfinite(bound * bound):
        raise AdapterError(
            f"{where}: the update is too large for float64: scaling = {matrix.scaling:.4g}, "
            f"largest |A| = {float(matrix.A.abs().max()):.4g}, "
            f"largest |B| = {float(matrix.B.abs().max()):.4g}"
        )


def _natural(name: str) -> list[tuple[int, str]]:
    """A sort key that orders numbers by value."""
    return [(int(part), "") if _INDEX.fullmatch(part) else (-1, part) for part in name.split(".")]


def _parts(module: str, matrix: AdaptedMatrix, adalora: bool) -> dict[str, Factors]:
    if not matrix.parts:
        factors = (matrix.A, matrix.B)
        return {module: _factors(module, role_of(module), *factors, matrix.scaling, adalora)}
    found, at = {}, 0
    for role, (rows, r) in matrix.parts.items():
        own = slice(at, at + r)
        A, B = matrix.A[own], rows.of(matrix.B[:, own])
        found[f"{module}.{role}"] = _factors(module, role, A, B, matrix.scaling, adalora, rows)
        at += r
    return found


def _factors(
    module: str,
    role: str,
    A: Tensor,
    B: Tensor,
    scaling: float,
    adalora: bool,
    rows: RowSlice | None = None,
) -> Factors:
    r = int(A.any(dim=1).sum()) if adalora else len(A)
    return Factors(A, B, scaling, module, role, r, rows)


def role_of(module: str) -> str:
    """q, k, v or o, else the last part of the module's name that is not a number, such as
    ``up_proj``."""
    for role, pattern in ROLES.items():
        if re.search(pattern, module):
            return role
    names = [part for part in module.split(".") if not part.isdigit()] or [module]
    return ".".join(names[-2:]) if names[-1] in _SHARED else names[-1]
