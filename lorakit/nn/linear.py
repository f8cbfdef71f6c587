"""A linear layer with a low-rank update."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from lorakit.kernels.lora import lora_add_
from lorakit.nn.layer import LoraLayer, check_arguments, kaiming_, wide


class Linear(LoraLayer, nn.Linear):
    """y = W x + bias + (lora_alpha / r) * B A dropout(x) (LoRA, section 4.1).

    W (out_features, in_features), lora_A (r, in_features), lora_B (out_features, r).
    ``fan_in_fan_out``: ``weight`` holds W^T (in_features, out_features), as GPT-2's Conv1D does.
    Dropout acts while training, on the input of A only. ``kwargs`` are those of ``nn.Linear``.
    What reads ``weight`` without calling the layer, as torch's MultiheadAttention does with
    ``out_proj``, has the update in eval mode only, while it is merged, and never trains it.
    Raises UserError if r is negative or lora_dropout is no probability.
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
