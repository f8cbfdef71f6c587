"""y + scaling * (x A^T) B^T, added into y in place.

PEFT makes four tensors of the size of y for this; here the product goes straight into the output
of the frozen layer, and what is kept for the backward pass is x, x A^T and the two factors.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def lora_add_(y: Tensor, x: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """Add the update to ``y`` (n, out_features) for ``x`` (n, in_features).

    lora_A is (r, in_features), lora_B (out_features, r). The arithmetic is in ``y``'s dtype, also
    where the factors are held in float32.
    """
    h = F.linear(x, lora_A.to(x.dtype))
    return y.addmm_(h.to(y.dtype), lora_B.to(y.dtype).t(), alpha=scaling)


def lora_add_reference(
    y: Tensor, x: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float
) -> Tensor:
    """The same in the paper's words: y + scaling * B A x (LoRA, section 4.1)."""
    return y + scaling * torch.einsum("or,ri,ni->no", lora_B, lora_A, x)
