"""A two-dimensional convolution with a low-rank update."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lorakit.errors import UserError
from lorakit.nn.layer import LoraLayer, check_arguments, kaiming_, wide


class Conv2d(LoraLayer, nn.Conv2d):
    """y = conv(x, W) + bias + conv(dropout(x), (lora_alpha / r) * reshape(B A)).

    W (out_channels, in_channels / groups, k, k) for a square kernel of k; lora_A
    (k * r, k * in_channels), lora_B (k * out_channels / groups, k * r); their product has as many
    values as W and is read in W's shape. ``kwargs`` are those of ``nn.Conv2d``. loralib takes
    ``lora_dropout`` here and never applies it. Its shapes do not fit one- and three-dimensional
    kernels, so there is no Conv1d and no Conv3d.

    Parameters are named as in torch's class; ``conv.weight`` and ``conv.bias``, loralib 0.1.2's
    names, are read as well.
    Raises UserError if r > 0 and the kernel is not square, r is negative, or lora_dropout is no
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
        y: Tensor = self._conv_forward(x, weight, bias)  # as torch's class: strides, padding_mode
        return y

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        for key in ("weight", "bias"):
            if (theirs := f"{prefix}conv.{key}") in state_dict:
                state_dict[f"{prefix}{key}"] = state_dict.pop(theirs)
        super()._load_from_state_dict(state_dict, prefix, *args)
