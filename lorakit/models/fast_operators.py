"""Operators that compute what a model's own do, faster."""

from __future__ import annotations

from transformers import PreTrainedModel

from lorakit.models.cpu_attention import use_cpu_attention
from lorakit.models.fast_norms import use_fast_norms
from lorakit.models.fast_rotary import use_fast_rotary
from lorakit.models.short_attention import use_short_attention


def use_fast_operators(model: PreTrainedModel, recomputes: bool = False) -> None:
    """Compute by fewer kernels what compilation would fuse, norms and rotary embeddings, and short
    rows' attention by kernels that start faster, unless the backward pass ``recomputes`` layers."""
    use_fast_norms(model)
    use_fast_rotary(model)
    if model.device.type == "cuda" and not recomputes:
        use_short_attention(model)


def use_operators_of_training(model: PreTrainedModel) -> None:
    """Compute with the operators of an eager run, so that an evaluation has the metrics that the
    run has reported, although bfloat16 rounds differently in each of them."""
    if model.device.type == "cpu":
        use_cpu_attention(model)
    use_fast_operators(model)
