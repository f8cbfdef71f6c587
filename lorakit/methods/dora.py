"""DoRA (Liu et al. 2024, arXiv 2402.09353, section 4.1): W' = m * (W + s B A) / ||W + s B A||.

W (out, in) is frozen, A (r, in) and B (out, r) are LoRA's, s its scaling; the norm is that of each
row, and the magnitudes m (out,) start as it. The norm is a constant in the backward pass (section
4.3). An embedding's rows count as those of W^T: one magnitude a dimension. As PEFT's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from lorakit.errors import AdapterError
from lorakit.methods.lora import Lora, LoraConfig, embedding_add
from lorakit.recipe.sections import AdapterSection

if TYPE_CHECKING:
    from torch import Tensor, nn

    from lorakit.layers import AdapterLayer, FusedLayer

#: How far the norm of a row may move when W is rounded to bfloat16.
_ROUNDING = 2**-8


class DoraConfig(LoraConfig):
    """LoRA's keys. ``lora_dropout`` drops from the input of all that DoRA adds to W x + b, which
    is (m / norm - 1) W dropout(x) besides the low-rank part: a second product with W a step."""

    method: str = "dora"


class Dora(Lora):
    name = "dora"
    summary = "W' = m * (W + s B A) / ||W + s B A||, each row's m trained (Liu et al. 2024)"
    Config: ClassVar[type[AdapterSection]] = DoraConfig

    def wrap(self, module: nn.Module, config: Any, name: str) -> AdapterLayer:
        """m starts as the norm that the forward pass divides by: the same bits, for every init."""
        import torch

        layer = super().wrap(module, config, name)
        layer.lora_magnitude_vector = torch.nn.Parameter(self.norms(layer))
        return layer

    def norms(self, layer: AdapterLayer) -> Tensor:
        """||W_i + s (B A)_i|| (out,), without a gradient."""
        from lorakit.kernels.low_rank import row_norms
        from lorakit.layers import as_matrix

        W = as_matrix(layer.base_layer, layer.weight)
        return row_norms(W, _base_squares(layer, W), *self.factors(layer), layer.scaling)

    def update(self, layer: AdapterLayer, x: Tensor, y: Tensor) -> Tensor:
        import torch.nn.functional as F

        from lorakit.kernels.low_rank import dora_add
        from lorakit.layers import as_matrix

        factor = layer.lora_magnitude_vector / self.norms(layer)
        if layer.training and layer.lora_dropout.p > 0:
            x = layer.lora_dropout(x)
            plain = F.linear(x, as_matrix(layer.base_layer, layer.weight))
        else:
            plain = y if layer.bias is None else y - layer.bias
        return dora_add(y, plain, x, *self.factors(layer), layer.scaling, factor)

    def embed(self, layer: AdapterLayer, ids: Tensor) -> Tensor:
        y = layer.base_layer(ids)
        factor = layer.lora_magnitude_vector / self.norms(layer)
        A, B = self.factors(layer)
        y = y.addcmul(y, (factor - 1).to(y.dtype))
        return embedding_add(y, layer, ids, A, factor[:, None] * B)

    def merged_weight(self, layer: AdapterLayer, weight: Tensor) -> Tensor:
        import torch

        from lorakit.layers import as_matrix

        merged = weight.float() + super().delta_weight(layer)
        rows = as_matrix(layer.base_layer, merged)
        norm = torch.linalg.vector_norm(rows, dim=1).clamp_min(torch.finfo(torch.float32).tiny)
        factor = layer.lora_magnitude_vector.detach().float() / norm
        return merged.mul_(factor[:, None] if layer.kind == "linear" else factor)

    def merged_rows(self, layer: AdapterLayer, weight: Tensor, start: int) -> Tensor | None:
        import torch

        if layer.kind != "linear" or type(self).merged_weight is not Dora.merged_weight:
            return None
        A, B = self.factors(layer)
        own = slice(start, start + len(weight))
        merged = (B[own].detach().float() @ A.detach().float()).mul_(layer.scaling).add_(weight)
        norm = torch.linalg.vector_norm(merged, dim=1).clamp_min(torch.finfo(torch.float32).tiny)
        factor = layer.lora_magnitude_vector.detach()[own].float() / norm
        return merged.mul_(factor[:, None])

    def delta_weight(self, layer: AdapterLayer) -> Tensor:
        return self.merged_weight(layer, layer.weight) - layer.weight.float()

    def reads(self, settings: Mapping[str, Any]) -> bool:
        return settings["peft_type"] == "LORA" and bool(settings.get("use_dora"))

    def compose(self, fused: FusedLayer) -> AdapterLayer:
        """Rows outside of the parts have their own norm for m, by the operation with which PEFT
        takes it again: m / norm is 1."""
        import torch

        layer = super().compose(fused)
        m = _norms_of_W(layer)
        for role, part in fused.parts.items():
            fused.rows(role).put(m, part.lora_magnitude_vector.detach())
        layer.lora_magnitude_vector = torch.nn.Parameter(m, requires_grad=False)
        return layer

    def split(self, layer: AdapterLayer, parts: Mapping[str, Any]) -> FusedLayer:
        import torch

        fused = super().split(layer, parts)
        m = layer.lora_magnitude_vector.detach()
        expected = m.clone() if layer.weight.is_meta else _norms_of_W(layer)
        for role, part in fused.parts.items():
            own = fused.rows(role).of(m).clone()
            part.lora_magnitude_vector = torch.nn.Parameter(own, requires_grad=False)
            fused.rows(role).put(expected, own)
        if ((m - expected).abs() > expected.abs() * _ROUNDING).any():
            raise AdapterError(
                f"the parts {', '.join(parts)} are not all that lora_magnitude_vector changes"
            )
        return fused


def _norms_of_W(layer: AdapterLayer) -> Tensor:
    import torch

    from lorakit.layers import as_matrix

    W = as_matrix(layer.base_layer, layer.weight.detach()).float()
    norms: Tensor = torch.linalg.vector_norm(W, dim=1)
    return norms


def _base_squares(layer: AdapterLayer, W: Tensor) -> Tensor:
    """||W_i||^2 (out,), kept until W moves, or its values change."""
    import torch

    from lorakit.kernels.low_rank import row_squares
    from lorakit.layers import RowsOf

    if torch.compiler.is_compiling():  # which cannot trace where a tensor lies
        return row_squares(W.detach())
    base = layer.base_layer
    owner: Any = base._whole[0] if isinstance(base, RowsOf) else base
    weight: Tensor = owner.weight
    key = (weight.data_ptr(), weight._version, weight.device, weight.dtype)
    kept: Any = layer.__dict__.get("base_squares")
    if kept is None or kept[0] != key:
        kept = key, row_squares(W.detach())
        layer.__dict__["base_squares"] = kept
    squares: Tensor = kept[1]
    return squares


METHOD = Dora()
