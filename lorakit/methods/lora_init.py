"""How the factors of a low-rank update start. Whatever the start, the output is unchanged."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from lorakit.errors import TargetError

if TYPE_CHECKING:
    from torch import Tensor

    from lorakit.layers import AdapterLayer

#: Matrices no larger than this in one dimension are decomposed exactly.
_EXACT_SVD = 1024


def initialise(layer: AdapterLayer, init: str, name: str) -> None:
    """Fill ``lora_A`` (r, in) and ``lora_B`` (out, r).

    - ``default``: A Kaiming-uniform as in loralib, B zero; an embedding has A zero and B standard
      Gaussian, as in loralib.
    - ``b_gaussian``: A zero, B Gaussian of variance 1 / r, which keeps B h of the size of h.
    - ``pissa`` (Meng et al. 2024, arXiv 2404.02948, section 3): with W = U S V^T,
      A = (S_r / scaling)^(1/2) V_r^T and B = U_r (S_r / scaling)^(1/2), as in PEFT. The start is
      taken off again (buffers ``initial_A``, ``initial_B``), which leaves W's other singular
      values frozen: W itself keeps its bits.
    - ``orthogonal``: of a random orthogonal Q (r, r) A gets half of the rows and B the other
      half, mixed with Gaussians of standard deviation 0.1, so that B A = 0 with neither zero.

    Random values come from torch's default generator. Raises TargetError for an odd r with
    ``orthogonal``, and for an r above the rank of W with ``pissa``.
    """
    import torch

    if init == "pissa":
        return _pissa(layer, name)
    if init == "orthogonal":
        return _orthogonal(layer, name)
    b_random = init == "b_gaussian" or layer.kind == "embedding"
    torch.nn.init.zeros_(layer.lora_A if b_random else layer.lora_B)
    if layer.kind == "embedding":
        torch.nn.init.normal_(layer.lora_B)
    elif b_random:
        torch.nn.init.normal_(layer.lora_B, std=1 / math.sqrt(layer.r))
    else:
        torch.nn.init.kaiming_uniform_(layer.lora_A, a=math.sqrt(5))
    return None


def _pissa(layer: AdapterLayer, name: str) -> None:
    import torch

    if layer.r > (most := min(layer.in_features, layer.out_features)):
        raise TargetError(f"adapter.r = {layer.r}: init: pissa on {name}; allowed: up to {most}")
    weight = layer.weight.detach().float()
    with torch.no_grad():
        left, values, right = _principal(weight if layer.kind == "linear" else weight.t(), layer.r)
        root = (values / layer.scaling).sqrt()
        layer.lora_A.copy_(root[:, None] * right.t())
        layer.lora_B.copy_(left * root)
    for factor in "AB":
        start = getattr(layer, f"lora_{factor}").detach().clone()
        layer.register_buffer(f"initial_{factor}", start, persistent=False)


def _principal(weight: Tensor, r: int) -> tuple[Tensor, Tensor, Tensor]:
    """U (out, r), S (r,), V (in, r): exact for small matrices, else by subspace iteration."""
    import torch

    if min(weight.shape) <= _EXACT_SVD:
        left, values, right_t = torch.linalg.svd(weight, full_matrices=False)
        right = right_t.t()
    else:
        left, values, right = torch.svd_lowrank(weight, q=r + 8, niter=8)
    return left[:, :r], values[:r], right[:, :r]


def _orthogonal(layer: AdapterLayer, name: str) -> None:
    import torch

    if layer.r % 2:
        raise TargetError(f"adapter.r = {layer.r}: init: orthogonal on {name}; allowed: even ranks")
    half = layer.r // 2
    with torch.no_grad():
        q, _ = torch.linalg.qr(torch.randn(layer.r, layer.r))
        mix_A = torch.randn(layer.in_features, half) * 0.1
        mix_B = torch.randn(layer.out_features, half) * 0.1
        layer.lora_A.copy_((mix_A @ q[:half]).t())
        layer.lora_B.copy_(mix_B @ q[half:])
