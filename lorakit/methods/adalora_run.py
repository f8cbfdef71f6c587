"""AdaLoRA's part in a run: the penalty before a step, importance and ranks after it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lorakit.methods.base import RunHooks

if TYPE_CHECKING:
    from torch import Tensor

    from lorakit.layers import AdapterLayer

#: Factor -> along which dimension its importance is averaged for a triplet.
_ACROSS = {"lora_A": 1, "lora_E": 1, "lora_B": 0}


@dataclass(frozen=True)
class Budget:
    """How many triplets of all matrices train at a step: ``start`` of them up to ``tinit``, ``end``
    from ``total_steps - tfinal`` on, allocated anew every ``deltaT`` steps between."""

    start: int
    end: int
    tinit: int
    tfinal: int
    total_steps: int
    deltaT: int

    @property
    def final_step(self) -> int:
        """From here on the kept triplets are fixed."""
        return self.total_steps - self.tfinal

    def at(self, step: int) -> int:
        """b(t) = end + (start - end) * (1 - (t - tinit) / (T - tfinal - tinit))^3.

        The paper's equation 12 has t - tinit - tfinal in the numerator, which is not continuous at
        tinit; both public codes have this, with b(tinit) = start and b(T - tfinal) = end.
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
    """The importance of every element of A, E and B, and the mask of the triplets kept.

    As in both public codes the sensitivity |w * grad| takes the weights after the optimizer's step
    and the gradients before it, penalty and clipping included.
    """

    device_values = ("orthogonality_loss",)

    def __init__(self, layers: Mapping[str, AdapterLayer], config: Any, budget: Budget) -> None:
        import torch

        self._names = list(layers)
        self._config, self.budget = config, budget
        self._factors = {f: [getattr(x, f) for x in layers.values()] for f in _ACROSS}
        weights: list[Any] = [w for factors in self._factors.values() for w in factors]
        self._weights = weights
        # One row for all elements: what is done to each of them takes one kernel, not hundreds.
        sizes = [w.numel() for w in weights]
        self._rows = torch.zeros(2, sum(sizes), device=weights[0].device)
        self._averages, self._uncertainties = (
            [part.view_as(w) for part, w in zip(row.split(sizes), weights, strict=True)]
            for row in self._rows
        )
        self._kept = torch.stack([layer.kept for layer in layers.values()])
        for layer, kept in zip(layers.values(), self._kept.unbind(0), strict=True):
            layer.kept = kept
            layer.__dict__["schedule"] = (budget.tinit, budget.tfinal, budget.total_steps)

    def before_step(self, scale: Callable[[Tensor], Tensor]) -> list[Tensor]:
        """Add the gradient of gamma * sum_k R(P_k, Q_k) (equation 4); its value is what is logged,
        and no loss contains it."""
        from lorakit.kernels.rank_allocation import orthogonality

        total = None
        mean_norm = self._config.orth_reg_form == "mean_norm"
        weight = self._config.orth_reg_weight / (2 * len(self._names) if mean_norm else 1)
        for factor in ("lora_A", "lora_B"):
            factors = self._factors[factor]
            value, gradients = orthogonality(factors, factor == "lora_B", mean_norm, weight)
            total = value if total is None else total + value
            _add_gradients(factors, [scale(gradient) for gradient in gradients])
        assert total is not None
        return [total]

    def after_step(self, step: int, scaled: bool = False) -> None:
        import torch

        if step < self.budget.final_step:
            self._update(scaled)
        if self.budget.allocates(step):
            self._allocate(self.budget.at(step))
        if self.budget.allocates(step) or step > self.budget.final_step:
            with torch.no_grad():
                mask = self._kept.unsqueeze(-1).float().unbind(0)
                torch._foreach_mul_(self._factors["lora_E"], list(mask))

    def _update(self, scaled: bool) -> None:
        import torch

        from lorakit.kernels.rank_allocation import update_importance

        with torch.no_grad():
            gradients = _in_a_row([_gradient(w) for w in self._weights])
            if scaled:  # what is not finite would stay in the averages for ever
                gradients = torch.nan_to_num(gradients, 0.0, 0.0, 0.0)
            weights = _in_a_row(self._weights)
            average, uncertainty = self._rows
            beta1, beta2 = self._config.beta1, self._config.beta2
            update_importance([average], [uncertainty], [weights], [gradients], beta1, beta2)

    def _allocate(self, budget: int) -> None:
        from lorakit.kernels.rank_allocation import keep_top

        self._kept.copy_(keep_top(self.scores(), budget))

    def scores(self) -> Tensor:
        """S = s(lambda) + mean s(column of P) + mean s(row of Q), with s the smoothed sensitivity
        times its uncertainty (equations 7, 11): (matrices, init_r)."""
        from lorakit.kernels.rank_allocation import triplet_scores

        sizes = [weight.numel() for weight in self._weights]
        rows = (self._rows[0] * self._rows[1]).split(sizes)
        importance = [row.view_as(w) for row, w in zip(rows, self._weights, strict=True)]
        count = len(self._names)
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

    def ranks(self) -> dict[str, int]:
        return dict(zip(self._names, self._kept.sum(dim=1).tolist(), strict=True))

    def state(self) -> dict[str, Tensor]:
        names = [f"{name}.{factor}" for factor in _ACROSS for name in self._names]
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
    """To what the loss gave; a matrix that the loss does not reach gets these alone."""
    import torch

    there = [i for i, weight in enumerate(weights) if weight.grad is not None]
    if there:
        torch._foreach_add_([weights[i].grad for i in there], [gradients[i] for i in there])
    for i in set(range(len(weights))) - set(there):
        weights[i].grad = gradients[i].clone()


def _in_a_row(tensors: list[Tensor]) -> Tensor:
    from torch._utils import _flatten_dense_tensors

    row: Tensor = _flatten_dense_tensors(tensors)
    return row


def _gradient(weight: Tensor) -> Tensor:
    import torch

    return torch.zeros_like(weight) if weight.grad is None else weight.grad
