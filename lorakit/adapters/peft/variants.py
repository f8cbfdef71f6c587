"""Variants of LoRA that PEFT trains and lorakit only reads: PiSSA, OLoRA and ``lora_bias``.

PiSSA and OLoRA replace the base's W by W - scaling * B_0 A_0, where B_0 and A_0 are computed from
W, and PEFT does the same again when it loads the adapter. The output is therefore that of
W + scaling * (B A - B_0 A_0), which is a LoRA of twice the rank on the unchanged W.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.adapters.peft.initialization import INITIALIZATION, reinitializes
from lorakit.base_weight import kind_of
from lorakit.errors import AdapterError
from lorakit.kernels.low_rank import LowRankDelta
from lorakit.methods.lora_layer import LoraLayer


class ReinitializedLayer(LoraLayer):
    """y = W x + b + scaling * (B A - B_0 A_0) x, with the factors of the ``initialization``
    computed from W on each access."""

    initialization: str = ""

    def factors(self) -> tuple[Tensor, Tensor]:
        A, B = initial_factors(self.initialization, self.dense_weight(), self.r, self.scaling)
        return torch.cat([self.lora_A, A]), torch.cat([self.lora_B, -B], dim=1)

    def low_rank(self) -> LowRankDelta | None:
        """None, since W is not known until it is merged."""
        return None

    def as_lora(self) -> LoraLayer:
        """The same update as a plain LoRA of twice the rank."""
        layer = LoraLayer(self.base_layer, r=2 * self.r, scaling=self.scaling)
        A, B = self.factors()
        layer.set_factors(A.detach(), B.detach())
        layer.lora_dropout = self.lora_dropout
        return layer


class BiasedLayer(LoraLayer):
    """y = W x + b + scaling * (B A x + ``lora_bias``), with a trained ``lora_bias`` (out,)."""

    def __init__(
        self, base_layer: nn.Module, *, r: int, scaling: float, dropout: float = 0.0
    ) -> None:
        super().__init__(base_layer, r=r, scaling=scaling, dropout=dropout)
        self.lora_bias = self.new_parameter(self.out_features)

    def update(self, x: Tensor, y: Tensor) -> Tensor:
        return super().update(x, y) + self.bias_delta().to(y.dtype)

    def bias_delta(self) -> Tensor:
        return self.scaling * self.lora_bias

    def merge(self, dtype: torch.dtype | None = None) -> nn.Module:
        if self.bias is None:
            raise AdapterError("the adapter's bias: the base has none that it can be added to")
        bias = (self.bias.float() + self.bias_delta()).to(dtype or self.bias.dtype)
        base = super().merge(dtype)
        base.bias = nn.Parameter(bias, requires_grad=False)
        return base


@torch.no_grad()
def initial_factors(name: str, W: Tensor, r: int, scaling: float) -> tuple[Tensor, Tensor]:
    """A_0 (r, in) and B_0 (out, r) of ``init_lora_weights`` = ``name`` for W (out, in), as in PEFT.

    ``pissa``: with W = U S V^T, A = (S_r / scaling)^(1/2) V_r^T and B = U_r (S_r / scaling)^(1/2);
    ``pissa_niter_N`` approximates it by N subspace iterations, from random values that are always
    the same here. ``olora``: the first r rows of R and columns of Q, with W = Q R.
    """
    W = W.float()
    if name.lower() == "olora":
        Q, R = torch.linalg.qr(W)
        return R[:r], Q[:, :r]
    if name == "pissa":
        U, S, Vt = torch.linalg.svd(W, full_matrices=False)
        U, S, Vt = U[:, :r], S[:r], Vt[:r]
    else:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            U, S, V = torch.svd_lowrank(W, r, niter=int(name.rpartition("_")[2]))
        Vt = V.t()
    root = (S / scaling).sqrt()
    return root[:, None] * Vt, U * root


def variant_class(
    settings: Mapping[str, Any], module: nn.Module, name: str
) -> type[LoraLayer] | None:
    """The class for the module ``name``, None if it is plain LoRA or DoRA. Raises AdapterError for
    a combination that PEFT does not support either."""
    kind = kind_of(module)
    if settings.get("lora_bias"):
        if kind in ("embedding", "parameter") or settings.get("use_dora"):
            what = "use_dora = true" if settings.get("use_dora") else f"the {kind}"
            raise AdapterError(f"{name}: lora_bias = true: not supported with {what}")
        return BiasedLayer
    if not reinitializes(settings) or kind == "embedding":
        return None
    value = settings[INITIALIZATION]
    if settings.get("use_dora"):
        raise AdapterError(
            f"{name}: {INITIALIZATION} = {value}: not supported with use_dora = true"
        )
    if kind == "parameter" or (kind == "conv1d" and value.lower() == "olora"):
        what = "a parameter" if kind == "parameter" else "GPT-2's Conv1D"
        raise AdapterError(f"{name}: {INITIALIZATION} = {value}: not supported for {what}")
    return ReinitializedLayer
