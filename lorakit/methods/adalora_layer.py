"""AdaLoRA's layer, and its hooks: the penalty before a step, rank allocation after it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors

from lorakit.kernels.rank_allocation import (
    keep_top,
    orthogonality,
    triplet_scores,
    update_importance,
)
from lorakit.layers import CompositeLayer
from lorakit.methods.base import RunHooks
from lorakit.methods.lora_layer import LoraLayer

#: Factor -> along which dimension its importance is averaged for a triplet.
_ACROSS = {"lora_A": 1, "lora_E": 1, "lora_B": 0}


class AdaLoraLayer(LoraLayer):
    """y = W x + b + scaling * P Lambda Q dropout(x).

    P (out, r) is ``lora_B``, Lambda (r, 1) ``lora_E``, Q (r, in) ``lora_A``. ``kept`` (r,) says
    which triplets have not been pruned; ``schedule`` is (tinit, tfinal, total_steps) of the run.
    All have the number of matrices as first dimension for a stack, where each has its own rank.
    """

    kept: Tensor

    def __init__(
        self, base_layer: nn.Module, *, r: int, scaling: float, dropout: float = 0.0
    ) -> None:
        super().__init__(base_layer, r=r, scaling=scaling, dropout=dropout)
        self.lora_E = self.new_parameter(*self.stack, r, 1)
        kept = torch.ones(*self.stack, r, dtype=torch.bool, device=self.device)
        self.register_buffer("kept", kept, persistent=False)
        self.schedule: tuple[int, int, int] | None = None

    @torch.no_grad()
    def reset_parameters(self, init: str, name: str) -> None:
        """P and Q Gaussian with a standard deviation of 0.02, Lambda zero."""
        for factor in (self.lora_A, self.lora_B):
            factor.copy_(nn.init.normal_(torch.empty(factor.shape), std=0.02))
        nn.init.zeros_(self.lora_E)

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.staged or (self.lora_A * self.lora_E, self.lora_B)

    def kept_rows(self) -> list[int]:
        """The triplets to save: the kept ones or, since PEFT cannot load a rank of 0, a single one,
        whose lambda is zero."""
        rows: list[int] = self.kept.nonzero().flatten().tolist()
        return rows or [0]

    @property
    def saved_rank(self) -> int:
        return max(1, int(self.kept.sum(dim=-1).max()))

    def as_lora(self) -> LoraLayer:
        """A LoRA of the kept triplets: A' = Lambda Q, B' = P, the same scaling. In a stack, all
        matrices get the highest rank, with zeros for what others have pruned."""
        r = self.saved_rank
        folded = LoraLayer(self.base_layer, r=r, scaling=self.scaling)
        rows = self.kept.int().sort(dim=-1, descending=True, stable=True).indices[..., :r, None]
        A = (self.lora_A * self.lora_E * self.kept[..., None]).detach()
        B = self.lora_B.detach()
        folded.set_factors(A.take_along_dim(rows, -2), B.take_along_dim(rows.mT, -1))
        folded.lora_dropout = self.lora_dropout
        return folded

    @classmethod
    def join(cls, composite: CompositeLayer) -> LoraLayer:
        """Join the kept triplets as a LoRA layer, since PEFT's AdaLoRA does not support parts."""
        parts = {n: p.as_lora() for n, p in composite.parts.items() if isinstance(p, AdaLoraLayer)}
        return LoraLayer.join(CompositeLayer(composite.base_layer, parts))


@dataclass(frozen=True)
class Budget:
    """How many triplets of all matrices are trained at a step: ``start`` up to ``tinit``, ``end``
    from ``total_steps - tfinal`` on; in between they are reallocated every ``deltaT`` steps."""

    start: int
    end: int
    tinit: int
    tfinal: int
    total_steps: int
    deltaT: int

    @property
    def final_step(self) -> int:
        """The step from which the kept triplets are fixed."""
        return self.total_steps - self.tfinal

    def at(self, step: int) -> int:
        """b(t) = end + (start - end) * (1 - (t - tinit) / (T - tfinal - tinit))^3.

        The paper's equation 12 has t - tinit - tfinal in the numerator, which is not continuous at
        tinit; both public implementations have this, with b(tinit) = start, b(T - tfinal) = end.
        """
        if step <= self.tinit:
            return self.start
        if step >= self.final_step:
            return self.end
        left = 1 - (step - self.tinit) / (self.final_step - self.tinit)
        return int((self.start - self.end) * left**3 + self.end)

    def allocates(self, step: int) -> bool:
        inside = self.tinit < step < self.final_step
        return step == self.final_step or (inside and step % self.deltaT == 0)


class Allocation(RunHooks):
    """Tracks the importance of every element of A, E and B, and prunes triplets.

    As in both public implementations, the sensitivity |w * grad| is computed from the weights after
    the optimizer's step and the gradients before it, including penalty and clipping.
    """

    device_values = ("orthogonality_loss",)
    adds_same_terms = True

    def __init__(
        self,
        layers: Mapping[str, AdaLoraLayer],
        budget: Budget,
        *,
        beta1: float,
        beta2: float,
        orth_reg_weight: float,
        orth_reg_form: Literal["squared", "mean_norm"],
    ) -> None:
        self._layers = dict(layers)
        matrices = sum(layer.kept[..., 0].numel() for layer in layers.values())
        self.budget = budget
        self._betas = beta1, beta2
        self._mean_norm = orth_reg_form == "mean_norm"
        self._gamma = orth_reg_weight / (2 * matrices if self._mean_norm else 1)
        self._factors = {f: [getattr(x, f) for x in layers.values()] for f in _ACROSS}
        weights: list[Any] = [w for factors in self._factors.values() for w in factors]
        self._weights = weights
        # All elements in one flat tensor, so that an operation is one kernel instead of hundreds.
        sizes = [w.numel() for w in weights]
        self._rows = torch.zeros(2, sum(sizes), device=weights[0].device)
        self._averages, self._uncertainties = (
            [part.view_as(w) for part, w in zip(row.split(sizes), weights, strict=True)]
            for row in self._rows
        )
        self._kept = torch.cat([x.kept.view(-1, x.kept.shape[-1]) for x in layers.values()])
        for layer, kept in zip(layers.values(), self._by_layer(self._kept), strict=True):
            layer.kept = kept.view_as(layer.kept)
            layer.schedule = (budget.tinit, budget.tfinal, budget.total_steps)

    def before_step(self, scale: Callable[[Tensor], Tensor]) -> list[Tensor]:
        """Add the gradient of gamma * sum_k R(P_k, Q_k) (equation 4) and return its value, which is
        logged separately from the loss."""
        total = None
        for factor in ("lora_A", "lora_B"):
            factors = self._factors[factor]
            value, gradients = orthogonality(
                factors, factor == "lora_B", self._mean_norm, self._gamma
            )
            total = value if total is None else total + value
            _add_gradients(factors, [scale(gradient) for gradient in gradients])
        assert total is not None
        return [total]

    def after_step(self, step: int, scaled: bool = False) -> None:
        if step < self.budget.final_step:
            self._update(scaled)
        if self.budget.allocates(step):
            self._allocate(self.budget.at(step))
        if self.budget.allocates(step) or step > self.budget.final_step:
            with torch.no_grad():
                mask = self._by_layer(self._kept.unsqueeze(-1).float())
                values = self._factors["lora_E"]
                own = [m.view_as(E) for m, E in zip(mask, values, strict=True)]
                torch._foreach_mul_(values, own)

    def _by_layer(self, value: Tensor) -> list[Tensor]:
        """``value`` (matrices, ...), split into the matrices of each layer."""
        return list(value.split([x.kept[..., 0].numel() for x in self._layers.values()]))

    def _update(self, scaled: bool) -> None:
        with torch.no_grad():
            gradients = _flattened([_gradient(w) for w in self._weights])
            if scaled:  # non-finite values would remain in the averages
                gradients = torch.nan_to_num(gradients, 0.0, 0.0, 0.0)
            weights = _flattened(self._weights)
            average, uncertainty = self._rows
            update_importance([average], [uncertainty], [weights], [gradients], *self._betas)

    def _allocate(self, budget: int) -> None:
        self._kept.copy_(keep_top(self.scores(), budget))

    def scores(self) -> Tensor:
        """S = s(lambda) + mean s(column of P) + mean s(row of Q), with s the smoothed sensitivity
        times its uncertainty (equations 7, 11): (matrices, init_r)."""
        sizes = [weight.numel() for weight in self._weights]
        rows = (self._rows[0] * self._rows[1]).split(sizes)
        importance = [row.view_as(w) for row, w in zip(rows, self._weights, strict=True)]
        count = len(self._layers)
        total = None
        for index, dim in enumerate(_ACROSS.values()):
            own = triplet_scores(importance[index * count : (index + 1) * count], dim)
            total = own if total is None else total + own
        assert total is not None
        return total

    def is_final_form(self, step: int) -> bool:
        return step >= self.budget.final_step

    def logged(self, step: int, optimizer: Any) -> dict[str, float]:
        return {"budget": self.budget.at(step)}

    def changed_ranks(self, first: int, last: int) -> Tensor | None:
        allocated = any(self.budget.allocates(step) for step in range(first, last + 1))
        return self._kept.sum(dim=1) if allocated else None

    def ranks(self) -> dict[str, int]:
        """The rank of each matrix; those of a stack are ``NAME[0]``, ``NAME[1]``, and so on."""
        names = [
            f"{name}[{index}]" if layer.stack else name
            for name, layer in self._layers.items()
            for index in range(layer.kept[..., 0].numel())
        ]
        return dict(zip(names, self._kept.sum(dim=1).tolist(), strict=True))

    def state(self) -> dict[str, Tensor]:
        names = [f"{name}.{factor}" for factor in _ACROSS for name in self._layers]
        averages = zip(names, self._averages, strict=True)
        uncertainties = zip(names, self._uncertainties, strict=True)
        return {
            "kept": self._kept,
            **{f"{name}.average": value for name, value in averages},
            **{f"{name}.uncertainty": value for name, value in uncertainties},
        }

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        for name, value in self.state().items():
            value.copy_(state[name])


def _add_gradients(weights: list[Any], gradients: list[Tensor]) -> None:
    """Add ``gradients`` to those of the loss, which may be missing for a matrix."""
    there = [i for i, weight in enumerate(weights) if weight.grad is not None]
    if there:
        torch._foreach_add_([weights[i].grad for i in there], [gradients[i] for i in there])
    for i in set(range(len(weights))) - set(there):
        weights[i].grad = gradients[i].clone()


def _flattened(tensors: list[Tensor]) -> Tensor:
    row: Tensor = _flatten_dense_tensors(tensors)
    return row


def _gradient(weight: Tensor) -> Tensor:
    return torch.zeros_like(weight) if weight.grad is None else weight.grad
