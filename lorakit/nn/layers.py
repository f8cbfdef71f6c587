"""Linear, embedding and convolution layers with a low-rank update."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from lorakit.errors import UserError, shown
from lorakit.kernels.low_rank import lora_add_
from lorakit.nn.base import LoraMixin, check_arguments, kaiming_, wide


class Linear(LoraMixin, nn.Linear):
    """y = W x + bias + (lora_alpha / r) * B A dropout(x) (LoRA, section 4.1).

    W (out_features, in_features), lora_A (r, in_features), lora_B (out_features, r).
    ``fan_in_fan_out``: ``weight`` stores W^T (in_features, out_features), as GPT-2's Conv1D does.
    Dropout is applied in training, to the input of A only. ``kwargs`` are those of ``nn.Linear``.
    Code that reads ``weight`` without calling the layer, as torch's MultiheadAttention does with
    ``out_proj``, sees the update only in eval mode, where it is merged, and never trains it.
    Raises UserError if r is negative or lora_dropout is not a probability.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int = 0,
        lora_alpha: float = 1,
        lora_dropout: float = 0.0,
        fan_in_fan_out: bool = False,
        merge_weights: bool = True,
        **kwargs: Any,
    ) -> None:
        check_arguments("Linear", r, lora_dropout)
        super().__init__(in_features, out_features, **kwargs)
        self.fan_in_fan_out = fan_in_fan_out
        self.lora_dropout = nn.Dropout(lora_dropout)
        if fan_in_fan_out:
            self.weight.data = self.weight.data.t().contiguous()
        self._add_factors(
            (r, in_features),
            (out_features, r),
            r=r,
            lora_alpha=lora_alpha,
            merge_weights=merge_weights,
        )

    def reset_factors(self) -> None:
        kaiming_(self.lora_A, self.lora_B)

    def delta_weight(self) -> Tensor:
        delta = wide(self.lora_B) @ wide(self.lora_A) * self.scaling
        return delta.t() if self.fan_in_fan_out else delta

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        y = F.linear(flat, self.weight.t() if self.fan_in_fan_out else self.weight, self.bias)
        if self.r and not self.merged:
            h = self.lora_dropout(flat)
            y = lora_add_(y, h, self.lora_A, self.lora_B, self.scaling)
        return y.view(*x.shape[:-1], self.out_features)


class MergedLinear(LoraMixin, nn.Linear):
    """len(enable_lora) projections stacked along the output; each enabled one has its own B A.

    With n of them enabled and s = out_features / len(enable_lora) rows each: lora_A
    (n * r, in_features), lora_B (n * s, r); block i of r rows of A and block i of s rows of B are
    the factors of the i-th enabled projection, y_i = W_i x + (lora_alpha / r) * B_i A_i dropout(x).
    The other rows of the output equal those of the base bit for bit, merged or not. GPT-2's query
    and value are ``enable_lora=[True, False, True]``. ``fan_in_fan_out`` as in ``Linear``;
    ``kwargs`` are those of ``nn.Linear``.

    Raises UserError if out_features is not a multiple of len(enable_lora), r > 0 and none is
    enabled, r is negative, or lora_dropout is not a probability.
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
    start = f"MergedLinear: enable_lora = {shown(enable_lora)}"
    if not enable_lora or not all(isinstance(on, bool) for on in enable_lora):
        raise UserError(f"{start}: allowed: a list of true and false, one for each projection")
    if out_features % len(enable_lora):
        raise UserError(
            f"{start}: out_features = {out_features} is not a multiple of its length, "
            f"{len(enable_lora)}"
        )
    if r > 0 and not any(enable_lora):
        raise UserError(f"{start}: r = {r} needs at least one true")


class Embedding(LoraMixin, nn.Embedding):
    """y = (W + (lora_alpha / r) * (B A)^T)[ids].

    W (num_embeddings, embedding_dim), lora_A (r, num_embeddings), lora_B (embedding_dim, r). A
    starts at zero and B is drawn from N(0, 1), so that only the rows of tokens in the data change.
    ``kwargs`` are those of ``nn.Embedding``; the row of ``padding_idx`` gets no update.
    Raises UserError if r is negative, or if with r > 0 ``max_norm`` is given (torch then scales
    the rows of W in place, which a frozen W must not have) or ``sparse`` (A^T has no sparse
    gradient).
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        r: int = 0,
        lora_alpha: float = 1,
        merge_weights: bool = True,
        **kwargs: Any,
    ) -> None:
        check_arguments("Embedding", r)
        if r > 0 and kwargs.get("max_norm") is not None:
            raise UserError(f"Embedding: max_norm changes the frozen weight: r = {r}; allowed: 0")
        if r > 0 and kwargs.get("sparse"):
            raise UserError(
                f"Embedding: sparse: the factors' gradients are dense: r = {r}; allowed: 0"
            )
        super().__init__(num_embeddings, embedding_dim, **kwargs)
        self._add_factors(
            (r, num_embeddings),
            (embedding_dim, r),
            r=r,
            lora_alpha=lora_alpha,
            merge_weights=merge_weights,
        )

    def reset_factors(self) -> None:
        nn.init.zeros_(self.lora_A)
        nn.init.normal_(self.lora_B)

    def delta_weight(self) -> Tensor:
        return (wide(self.lora_B) @ wide(self.lora_A) * self.scaling).t()

    def forward(self, ids: Tensor) -> Tensor:
        y = super().forward(ids)
        if self.r == 0 or self.merged:
            return y
        h = F.embedding(
            ids,
            self.lora_A.t(),
            padding_idx=self.padding_idx,
            scale_grad_by_freq=self.scale_grad_by_freq,
        )
        return y + F.linear(h.to(y.dtype), self.lora_B.to(y.dtype)) * self.scaling


class Conv2d(LoraMixin, nn.Conv2d):
    """y = conv(x, W) + bias + conv(dropout(x), (lora_alpha / r) * reshape(B A)).

    W (out_channels, in_channels / groups, k, k) for a square kernel of k; lora_A
    (k * r, k * in_channels), lora_B (k * out_channels / groups, k * r); their product has as many
    values as W and is reshaped to W's shape. ``kwargs`` are those of ``nn.Conv2d``. loralib accepts
    ``lora_dropout`` here but never applies it. Its shapes do not fit one- and three-dimensional
    kernels, so there is no Conv1d and no Conv3d.

    Parameters are named as in torch's class; ``conv.weight`` and ``conv.bias``, loralib 0.1.2's
    names, are read as well.
    Raises UserError if r > 0 and the kernel is not square, r is negative, or lora_dropout is not a
    probability.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        r: int = 0,
        lora_alpha: float = 1,
        lora_dropout: float = 0.0,
        merge_weights: bool = True,
        **kwargs: Any,
    ) -> None:
        check_arguments("Conv2d", r, lora_dropout)
        super().__init__(in_channels, out_channels, kernel_size, **kwargs)
        k, width = self.kernel_size
        if r > 0 and k != width:
            raise UserError(f"Conv2d: kernel_size = {self.kernel_size}: r = {r} needs a square one")
        self.lora_dropout = nn.Dropout(lora_dropout)
        self._add_factors(
            (k * r, k * in_channels),
            (k * (out_channels // self.groups), k * r),
            r=r,
            lora_alpha=lora_alpha,
            merge_weights=merge_weights,
        )

    def reset_factors(self) -> None:
        kaiming_(self.lora_A, self.lora_B)

    def delta_weight(self) -> Tensor:
        product = wide(self.lora_B) @ wide(self.lora_A)
        return product.view(self.weight.shape) * self.scaling

    def forward(self, x: Tensor) -> Tensor:
        if self.r == 0 or self.merged:
            return super().forward(x)
        if not (self.training and self.lora_dropout.p):
            return self._convolve(x, self.merged_weight(), self.bias)
        delta = self.delta_weight().to(self.weight.dtype)
        y = self._convolve(x, self.weight, self.bias)
        return y + self._convolve(self.lora_dropout(x), delta, None)

    def _convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        y: Tensor = self._conv_forward(x, weight, bias)  # with padding_mode
        return y

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        for key in ("weight", "bias"):
            if (theirs := f"{prefix}conv.{key}") in state_dict:
                state_dict[f"{prefix}{key}"] = state_dict.pop(theirs)
        super()._load_from_state_dict(state_dict, prefix, *args)
