"""A linear layer that computes several projections at once, some of them with an update."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from lorakit.errors import UserError, shown
from lorakit.kernels.lora import lora_add_
from lorakit.nn.layer import LoraLayer, check_arguments, kaiming_, wide


class MergedLinear(LoraLayer, nn.Linear):
    """len(enable_lora) projections stacked along the output; those enabled have their own B A.

    With n of them enabled and s = out_features / len(enable_lora) rows each: lora_A
    (n * r, in_features), lora_B (n * s, r); block i of r rows of A and block i of s rows of B make
    the update of the i-th enabled projection, y_i = W_i x + (lora_alpha / r) * B_i A_i dropout(x).
    The rows of the others are the base's bit for bit, merged or not. GPT-2's query and value are
    ``enable_lora=[True, False, True]``. ``fan_in_fan_out`` as in ``Linear``; ``kwargs`` are those
    of ``nn.Linear``.

    Raises UserError if out_features is no multiple of len(enable_lora), r > 0 and none is enabled,
    r is negative, or lora_dropout is no probability.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int = 0,
        lora_alpha: float = 1,
        lora_dropout: float = 0.0,
        enable_lora: Sequence[bool] = (False,),
        fan_in_fan_out: bool = False,
        merge_weights: bool = True,
        **kwargs: Any,
    ) -> None:
        check_arguments("MergedLinear", r, lora_dropout)
        _check_enabled(r, out_features, enable_lora)
        super().__init__(in_features, out_features, **kwargs)
        self.enable_lora = list(enable_lora)
        self.fan_in_fan_out = fan_in_fan_out
        self.lora_dropout = nn.Dropout(lora_dropout)
        if fan_in_fan_out:
            self.weight.data = self.weight.data.t().contiguous()
        n, self.size = sum(enable_lora), out_features // len(enable_lora)
        self._add_factors(
            (n * r, in_features),
            (n * self.size, r),
            r=r,
            lora_alpha=lora_alpha,
            merge_weights=merge_weights,
        )

    def reset_factors(self) -> None:
        kaiming_(self.lora_A, self.lora_B)

    def delta_weight(self) -> Tensor:
        delta = wide(self.lora_A).new_zeros(self.out_features, self.in_features)
        for rows, A, B in self._blocks():
            delta[rows] = wide(B) @ wide(A) * self.scaling
        return delta.t() if self.fan_in_fan_out else delta

    def merged_weight(self) -> Tensor:
        merged = self.weight.clone()
        by_row = merged.t() if self.fan_in_fan_out else merged
        for rows, A, B in self._blocks():
            by_row[rows] = (by_row[rows] + wide(B) @ wide(A) * self.scaling).to(merged.dtype)
        return merged

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        y = F.linear(flat, self.weight.t() if self.fan_in_fan_out else self.weight, self.bias)
        if self.r and not self.merged:
            h = self.lora_dropout(flat)
            for rows, A, B in self._blocks():
                lora_add_(y[:, rows], h, A, B, self.scaling)
        return y.view(*x.shape[:-1], self.out_features)

    def _blocks(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """(rows of W, A_i, B_i) for each enabled projection."""
        enabled = [i for i, on in enumerate(self.enable_lora) if on]
        A, B = self.lora_A.split(self.r), self.lora_B.split(self.size)
        for i, A_i, B_i in zip(enabled, A, B, strict=True):
            yield slice(i * self.size, (i + 1) * self.size), A_i, B_i


def _check_enabled(r: int, out_features: int, enable_lora: Sequence[bool]) -> None:
    said = f"MergedLinear: enable_lora = {shown(enable_lora)}"
    if not enable_lora or not all(isinstance(on, bool) for on in enable_lora):
        raise UserError(f"{said}: allowed: a list of true and false, one for each projection")
    if out_features % len(enable_lora):
        raise UserError(
            f"{said}: out_features = {out_features} is no multiple of its length, "
            f"{len(enable_lora)}"
        )
    if r > 0 and not any(enable_lora):
        raise UserError(f"{said}: r = {r} needs at least one true")
