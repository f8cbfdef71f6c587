"""Describes an adapter, or compares two: ``lorakit.inspect``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor

from lorakit.analysis.base_weights import visit_base
from lorakit.analysis.factors import AdapterFactors, Factors, read_factors
from lorakit.analysis.plots import check_folder, draw
from lorakit.analysis.report import (
    InspectReport,
    MatrixReport,
    MatrixSimilarity,
    Side,
    Similarity,
)
from lorakit.analysis.spectrum import directions, spectrum
from lorakit.analysis.subspaces import projection_metric, random_similarity, similarity
from lorakit.errors import AdapterError, listed
from lorakit.module_names import without_wrappers
from lorakit.notes import Say, to_stderr

#: Subspaces are nearly the same above the first phi, if that of random ones is below the second.
_SAME, _UNRELATED = 0.9, 0.5


def inspect(
    adapter: str | Path,
    other: str | Path | None = None,
    *,
    base: str | Path | None = None,
    side: Side = "right",
    plot: str | Path | None = None,
    trust_remote_code: bool = False,
    say: Say = to_stderr,
) -> InspectReport:
    """Describe every matrix that ``adapter`` updates and, with ``other``, how similar the two
    adapters' subspaces are.

    Adapters are directories or Hub ids, written by lorakit or PEFT. ``base`` adds the
    amplification; ``plot`` is a directory for the figures, which need the extra ``plots``.
    ``say`` receives notes.
    Raises AdapterError for an adapter that cannot be read or has no low-rank factors, for a base
    that it does not fit, for an ``other`` without a matrix in common, and for a ``plot`` that
    cannot be drawn.
    """
    if side not in get_args(Side):
        raise AdapterError(f"side = {side}: allowed: {', '.join(get_args(Side))}")
    if plot is not None:
        check_folder(Path(plot))
    read = read_factors(adapter, say)
    compared = None if other is None else read_factors(other, say)
    named = base if base is not None else read.files.config.get("base_model_name_or_path")
    report = InspectReport(
        adapter=str(adapter),
        method=read.method,
        base=None if named is None else str(named),
        modules=_measured(read, None if base is None else str(base), say, trust_remote_code),
        similarity=None if compared is None else _compared(read, compared, str(other), side, say),
    )
    if plot is not None:
        draw(report, Path(plot))
    return report


def _measured(
    read: AdapterFactors, base: str | None, say: Say, trust_remote_code: bool
) -> tuple[MatrixReport, ...]:
    if base is None:
        return tuple(_matrix(name, own, None) for name, own in read.matrices.items())
    by_owner: dict[tuple[str, ...], list[str]] = {}
    for name, own in read.matrices.items():
        by_owner.setdefault(tuple(without_wrappers(own.owner)), []).append(name)
    found: dict[str, MatrixReport] = {}

    def visit(owner: str, W: Tensor) -> None:
        for name in by_owner.get(tuple(without_wrappers(owner)), ()):
            own = read.matrices[name]
            found[name] = _matrix(name, own, own.rows.of(W.contiguous()) if own.rows else W)

    visit_base(base, read.files, visit, say, trust_remote_code)
    return tuple(
        found[name] if name in found else _matrix(name, own, None)
        for name, own in read.matrices.items()
    )


def _matrix(name: str, own: Factors, W: Tensor | None) -> MatrixReport:
    update = spectrum(own.A, own.B, own.scaling)
    return MatrixReport(
        module=name,
        layer=own.layer,
        role=own.role,
        shape=own.shape,
        r=own.r,
        effective_rank=update.effective_rank,
        norm_A=float(own.A.double().norm()),
        norm_B=float(own.B.double().norm()),
        norm_delta=update.norm,
        amplification=None if W is None else update.amplification(W),
    )


def _compared(
    read: AdapterFactors, other: AdapterFactors, name: str, side: Side, say: Say
) -> Similarity:
    first, second = read.matrices, other.matrices
    common = [n for n in first if n in second and first[n].shape == second[n].shape]
    if not common:
        raise AdapterError(
            f"{name}: has no matrix in common with {read.files.directory}, by name and shape; "
            "allowed: adapters of one base with targets in common"
        )
    if rest := sorted({*first, *second} - set(common)):
        say(f"not compared (in only one adapter, or of different shapes): {listed(rest)}")
    generator = torch.Generator().manual_seed(0)
    pairs = ((n, _directions(first[n], side), _directions(second[n], side)) for n in common)
    modules = tuple(_similar(n, U1, U2, generator) for n, U1, U2 in pairs)
    if side == "right" and _share_start(modules):
        say(
            "A spans nearly the same subspace in both adapters, as it does after runs with one "
            "seed, whatever they learned; hint: --side left, or runs with different seeds"
        )
    return Similarity(name, side, modules)


def _share_start(modules: Sequence[MatrixSimilarity]) -> bool:
    """Whether all directions of most matrices agree, though those of random ones would not: runs
    with one seed start with the same A, and training moves it little."""
    judged = [m for m in modules if m.phi and m.phi[0] and m.control_phi[-1][-1] < _UNRELATED]
    return sum(m.phi[-1][-1] > _SAME for m in judged) > len(judged) / 2


def _directions(own: Factors, side: Side) -> Tensor:
    return directions(own.A.t() if side == "right" else own.B)


def _similar(
    module: str, first: Tensor, second: Tensor, generator: torch.Generator
) -> MatrixSimilarity:
    control = random_similarity(len(first), (first.shape[1], second.shape[1]), generator)
    grids = (similarity(first, second), projection_metric(first, second), control)
    return MatrixSimilarity(module, *(grid.tolist() for grid in grids))
