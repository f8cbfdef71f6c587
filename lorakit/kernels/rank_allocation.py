"""AdaLoRA's arithmetic over all matrices at once: importance, triplet selection, orthogonality.

A model has hundreds of small factors, and a loop over them would take longer than the model's own
step. Fused multi-tensor kernels do the element-wise work, and batched products of factors of equal
shape the rest. Nothing is read back to the host.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def by_shape(tensors: Sequence[Tensor]) -> list[list[int]]:
    """The indices of ``tensors``, grouped by shape."""
    groups: dict[torch.Size, list[int]] = {}
    for index, tensor in enumerate(tensors):
        groups.setdefault(tensor.shape, []).append(index)
    return list(groups.values())


@torch.no_grad()
def update_importance(
    averages: list[Tensor],
    uncertainties: list[Tensor],
    weights: list[Tensor],
    gradients: list[Tensor],
    beta1: float,
    beta2: float,
) -> None:
    """One step of the smoothed sensitivity and of its uncertainty, in place (AdaLoRA, eq. 8 to 10).

    I = |w * grad|; average <- beta1 average + (1 - beta1) I;
    uncertainty <- beta2 uncertainty + (1 - beta2) |I - average|, with the updated average, as in
    both public implementations.
    """
    sensitivity = list(torch._foreach_mul(weights, gradients))
    torch._foreach_abs_(sensitivity)
    torch._foreach_mul_(averages, beta1)
    torch._foreach_add_(averages, sensitivity, alpha=1 - beta1)
    torch._foreach_sub_(sensitivity, averages)
    torch._foreach_abs_(sensitivity)
    torch._foreach_mul_(uncertainties, beta2)
    torch._foreach_add_(uncertainties, sensitivity, alpha=1 - beta2)


@torch.no_grad()
def triplet_scores(importance: Sequence[Tensor], dim: int) -> Tensor:
    """(matrices, r): the mean importance of each factor along ``dim``: 1 for A (r, in) and E
    (r, 1), 0 for B (out, r). A factor may be a stack of those of several matrices."""
    rows: list[Tensor | None] = [None] * len(importance)
    for group in by_shape(importance):
        means = torch.stack([importance[i] for i in group]).mean(dim=dim - 2)
        for index, row in zip(group, means.unbind(0), strict=True):
            rows[index] = row.reshape(-1, row.shape[-1])
    return torch.cat([row for row in rows if row is not None])


@torch.no_grad()
def keep_top(scores: Tensor, budget: int) -> Tensor:
    """A mask of the ``budget`` highest ``scores``; of equal scores, the earlier ones are kept."""
    order = scores.flatten().sort(descending=True, stable=True).indices
    kept = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
    return kept.index_fill_(0, order[:budget], True).view(scores.shape)


@torch.no_grad()
def orthogonality(
    factors: Sequence[Tensor], columns: bool, mean_norm: bool, weight: float = 1.0
) -> tuple[Tensor, list[Tensor]]:
    """A measure of how far the factors (matrices, or stacks of them) are from having orthonormal
    rows (or ``columns``), and its gradients, all multiplied by ``weight``.

    With G = F F^T - I (or F^T F - I), it is sum ||G||_F^2, whose gradient is 4 G F (or 4 F G). With
    ``mean_norm`` it is sum ||G||_F, with gradient 2 G F / ||G||_F, as in the public
    implementations."""
    total = factors[0].new_zeros(())
    gradients: list[Tensor] = [total] * len(factors)
    for group in by_shape(factors):
        stack = torch.stack([factors[i] for i in group])
        rows = stack.mT if columns else stack
        gram = rows @ rows.mT
        gram.diagonal(dim1=-2, dim2=-1).sub_(1)
        if mean_norm:
            norms = gram.flatten(-2).norm(dim=-1)
            total = total + norms.sum()
            factor = (2 * weight) / norms.clamp_min(torch.finfo(norms.dtype).tiny)
            gram = gram * factor[..., None, None]
        else:
            total = total + gram.square().sum()
            gram = gram * (4 * weight)
        gradient = stack @ gram if columns else gram @ stack
        for index, own in zip(group, gradient.unbind(0), strict=True):
            gradients[index] = own
    return total * weight, gradients
