"""The report on an adapter, and on two."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Side = Literal["right", "left"]
#: Row i - 1 and column j - 1 have the value for the first i and the first j directions.
Grid = list[list[float]]


@dataclass(frozen=True)
class MatrixReport:
    """One update dW = scaling * B A of a matrix W.

    ``shape`` is (out_features, in_features); ``effective_rank`` is that of dW, 0 for dW = 0;
    ``amplification`` is ||dW||_F / ||U^T W V||_F, where U and V are the singular vectors of dW:
    None without the base, and if dW or the denominator is zero.
    """

    module: str
    layer: int | None
    role: str
    shape: tuple[int, int]
    r: int
    effective_rank: float
    norm_A: float
    norm_B: float
    norm_delta: float
    amplification: float | None


@dataclass(frozen=True)
class MatrixSimilarity:
    """phi and the projection metric of a matrix in two adapters, and phi of two Gaussian matrices
    of the same shapes. Empty if a factor is zero."""

    module: str
    phi: Grid
    projection_metric: Grid
    control_phi: Grid


@dataclass(frozen=True)
class Similarity:
    """``side``: whether the directions are the right-singular vectors of A, or the left-singular
    vectors of B."""

    other: str
    side: Side
    modules: tuple[MatrixSimilarity, ...]


@dataclass(frozen=True)
class InspectReport:
    """``base`` is the model that the amplification refers to, else the one that the adapter
    names."""

    adapter: str
    method: str
    base: str | None
    modules: tuple[MatrixReport, ...]
    similarity: Similarity | None = None
