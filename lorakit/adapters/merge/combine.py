"""Combines several adapters into one before a merge, as PEFT's ``add_weighted_adapter`` does.

``cat`` is the exact sum of the updates, which needs no combined adapter: ``updates`` adds them one
by one, for every method. ``svd`` is the best approximation of that sum with one rank. The others
combine the factors A and B each on their own, scaled by the square root of weight * scaling, so
that they apply to LoRA adapters of equal ranks, and their sum is not that of the updates.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lorakit import registry
from lorakit.adapters.low_rank import AdaptedMatrix, Updates, lora_files, read_updates
from lorakit.adapters.merge.updates import Weighted, check_same_values, check_unscaled
from lorakit.adapters.peft.read import AdapterFiles
from lorakit.adapters.peft.tokens import row_names
from lorakit.errors import AdapterError, did_you_mean, shown
from lorakit.kernels.combination import (
    agreeing_mean,
    keep_largest,
    keep_random,
    truncated_product,
    weighted_sum,
)

#: PEFT's names; ``dare`` is ``dare_linear``.
COMBINATIONS = ("cat", "linear", "svd", "ties", "dare_linear", "dare_ties", "magnitude_prune")
_ALIASES = {"dare": "dare_linear"}
_PRUNING = ("ties", "dare_linear", "dare_ties", "magnitude_prune")
#: The combinations that read an option.
_USED_BY = {
    "density": _PRUNING,
    "svd_rank": ("svd",),
    "majority_sign_method": ("ties", "dare_ties"),
    "seed": ("dare_linear", "dare_ties"),
}
_SIGNS = ("total", "frequency")
_DEFAULT_SEED = 42
#: Keys of ``adapter_config.json`` that select modules; the combined adapter lists them by name.
_SELECTION = ("exclude_modules", "layers_pattern", "layers_to_transform", "target_modules")

Combine = Callable[[Sequence[Tensor], Sequence[float]], Tensor]


@dataclass(frozen=True)
class Combination:
    """``density`` is the share of values that pruning keeps; ``svd_rank`` defaults to the largest
    rank of the adapters, ``majority_sign_method`` to ``total``, ``seed`` of the dropped values to
    42."""

    name: str = "cat"
    density: float | None = None
    svd_rank: int | None = None
    majority_sign_method: str | None = None
    seed: int | None = None

    def check(self) -> None:
        """Raise AdapterError for unknown values, and for options that the combination lacks or does
        not use."""
        for option, users in _USED_BY.items():
            if (value := getattr(self, option)) is not None and self.name not in users:
                raise AdapterError(
                    f"{option} = {shown(value)}: not used by {self.name}; allowed with: "
                    f"{', '.join(users)}"
                )
        if self.name in _PRUNING and (self.density is None or not 0 < self.density <= 1):
            given = f"density = {self.density:g}" if self.density is not None else "density"
            raise AdapterError(
                f"{given}: {self.name} needs the share of values to keep; allowed: above 0, up to 1"
            )
        if self.svd_rank is not None and self.svd_rank < 1:
            raise AdapterError(f"svd_rank = {self.svd_rank}: allowed: an integer above 0")
        if (sign := self.majority_sign_method) is not None and sign not in _SIGNS:
            raise AdapterError(
                f"majority_sign_method = {shown(sign)}: allowed: {', '.join(_SIGNS)}"
            )
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise AdapterError(f"seed = {self.seed}: allowed: 0 to 2^63 - 1")


def combination_named(name: str) -> str:
    """Return the combination that ``name`` stands for; raises AdapterError for an unknown one."""
    found = _ALIASES.get(name, name)
    if found not in COMBINATIONS:
        message = did_you_mean(f"method = {shown(name)}: unknown", name, COMBINATIONS)
        raise AdapterError(
            f"{message}; allowed: {', '.join(COMBINATIONS)}, or FILE.py:CLASS, a method of your own"
        )
    return found


def combined(adapters: Sequence[Weighted], how: Combination) -> Sequence[Weighted]:
    """Return the adapters to add: ``adapters`` themselves for ``cat``, else a single one.

    Its fully trained values are those of the first; the others must have the same or none. Raises
    AdapterError for an adapter that is not LoRA or AdaLoRA, and for shapes that differ.
    """
    if how.name == "cat":
        return adapters
    first, *others = adapters
    if not others:
        raise AdapterError(
            f"method = {shown(how.name)}: combines several adapters; hint: add another one, or "
            "leave method out"
        )
    read = [_updates(adapter.files, how) for adapter in adapters]
    check_unscaled(first, [*read[0].biases, *row_names(read[0].others)])
    for adapter, updates in zip(others, read[1:], strict=True):
        check_same_values(read[0].others, updates.others, first.files, adapter.files)
    matrices: dict[str, dict[int, AdaptedMatrix]] = {}
    for index, updates in enumerate(read):
        for name, matrix in updates.matrices.items():
            matrices.setdefault(name, {})[index] = matrix
    _check_shapes(matrices, adapters, how)
    merged = _merged(matrices, [adapter.weight for adapter in adapters], how)
    return [Weighted(_files(first.files, read[0], merged))]


def _updates(files: AdapterFiles, how: Combination) -> Updates:
    try:
        return read_updates(files)
    except AdapterError as error:
        hint = "method cat adds adapters of every method"
        raise AdapterError(
            error.problem, about=error.about, allowed=error.allowed, hint=hint
        ) from error


def _check_shapes(
    matrices: Mapping[str, Mapping[int, AdaptedMatrix]],
    adapters: Sequence[Weighted],
    how: Combination,
) -> None:
    for name, own in sorted(matrices.items()):
        (start, first), *others = own.items()
        for index, other in others:
            directories = [str(adapters[i].files.directory) for i in (index, start)]
            sizes = [(m.B.shape[0], m.A.shape[1], m.embedding) for m in (other, first)]
            if sizes[0] != sizes[1]:
                raise AdapterError(
                    f"{directories[0]}: {name} is {sizes[0][:2]}, and {sizes[1][:2]} in "
                    f"{directories[1]}: the adapters belong to different base models"
                )
            if other.r != first.r and how.name != "svd":
                raise AdapterError(
                    f"{directories[0]}: {name} has r = {other.r}, and {first.r} in "
                    f"{directories[1]}: {how.name} combines the factors, which needs equal ranks; "
                    "hint: method svd or cat"
                )


def _merged(
    matrices: Mapping[str, Mapping[int, AdaptedMatrix]],
    weights: Sequence[float],
    how: Combination,
) -> dict[str, AdaptedMatrix]:
    combine = _combine(how)
    r = how.svd_rank or max(matrix.r for own in matrices.values() for matrix in own.values())
    found = {}
    for name, own in sorted(matrices.items()):
        parts = list(own.values())
        factors = [weights[index] * matrix.scaling for index, matrix in own.items()]
        roots = [math.sqrt(abs(factor)) for factor in factors]
        As, Bs = [m.A.float() for m in parts], [m.B.float() for m in parts]
        if combine is None:
            A = torch.cat([A * factor for A, factor in zip(As, factors, strict=True)])
            A, B = truncated_product(A, torch.cat(Bs, dim=1), r)
        else:
            signed = [math.copysign(root, f) for root, f in zip(roots, factors, strict=True)]
            A, B = combine(As, signed), combine(Bs, roots)
        found[name] = AdaptedMatrix(A, B, 1.0, parts[0].embedding)
    return found


def _combine(how: Combination) -> Combine | None:
    """How the factors of one matrix are combined; None for ``svd``."""
    if how.name == "svd":
        return None
    if how.name == "linear":
        return weighted_sum
    density = how.density or 1.0
    seed = _DEFAULT_SEED if how.seed is None else how.seed
    prune = keep_largest(density)
    if how.name.startswith("dare"):
        prune = keep_random(density, torch.Generator().manual_seed(seed))
    sign = how.majority_sign_method or _SIGNS[0]

    def combine(values: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
        kept = [prune(value) for value in values]
        if how.name.endswith("ties"):
            return agreeing_mean(kept, weights, sign)
        return weighted_sum(kept, weights)

    return combine


def _files(first: AdapterFiles, own: Updates, matrices: dict[str, AdaptedMatrix]) -> AdapterFiles:
    config = {key: value for key, value in first.config.items() if key not in _SELECTION}
    config["target_modules"] = sorted(matrices)
    updates = dataclasses.replace(own, matrices=matrices, config=config)
    settings, tensors, sidecar = lora_files(updates)
    return AdapterFiles(
        first.directory,
        settings,
        tensors,
        None if first.sidecar is None else sidecar,
        registry.methods()["lora"],
    )
