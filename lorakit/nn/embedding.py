"""An embedding with a low-rank update."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from lorakit.errors import UserError
from lorakit.nn.layer import LoraLayer, check_arguments, wide


class Embedding(LoraLayer, nn.Embedding):
    """y = (W + (lora_alpha / r) * (B A)^T)[ids].

    W (num_embeddings, embedding_dim), lora_A (r, num_embeddings), lora_B (embedding_dim, r). A
    starts at zero and B is drawn from N(0, 1), so that only the rows of tokens seen move.
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
