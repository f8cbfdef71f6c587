"""The reference engine: PyTorch's eager mode, one micro-batch after another.

An objective is a module that maps a batch to the sum of its losses; the engine divides by their
number.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler
from transformers import PreTrainedModel

from lorakit.data.collate import Batch, CausalBatch, EncoderBatch
from lorakit.distributed.processes import collective_pass, gather
from lorakit.distributed.strategy import Strategy
from lorakit.methods.base import RunHooks
from lorakit.models.causal import (
    CausalParts,
    Kernels,
    final_states,
    split_model,
    state_losses,
    use_varlen,
    varlen_options,
)
from lorakit.models.host_masks import host_masks
from lorakit.models.label_losses import label_losses
from lorakit.training.engine import EngineState, StepResult
from lorakit.training.engine.probe import GradientProbe
from lorakit.training.engine.stored import fitted


@dataclass
class EagerEngine:
    """``objective`` maps a batch to the sum of its losses; it and ``optimizer`` are wrapped by
    ``strategy``. ``parameters`` are the trained ones by name. ``probe`` checks the gradients of the
    first step taken. ``keeps_gradients``: gradients stay in the same memory from step to step."""

    keeps_gradients: ClassVar[bool] = False

    strategy: Strategy
    objective: nn.Module
    parameters: dict[str, nn.Parameter]
    optimizer: Any
    scheduler: LRScheduler
    hooks: RunHooks
    max_grad_norm: float | None
    probe: GradientProbe | None
    steps: int = 0

    def __post_init__(self) -> None:
        self.objective.train()

    @property
    def value_names(self) -> tuple[str, ...]:
        return self.hooks.device_values

    @property
    def scales_loss(self) -> bool:
        return self.strategy.scaler is not None

    @property
    def weights(self) -> Mapping[str, Tensor]:
        return {name: parameter.detach() for name, parameter in self.parameters.items()}

    def step(self, micro_batches: Sequence[Batch], loss_count: float | None = None) -> StepResult:
        count = loss_count or sum(batch.loss_count for batch in micro_batches)
        with collective_pass(self.strategy.is_sharded):
            losses = [
                self._forward_backward(batch, 1 / count if is_counted else 0.0)
                for batch, is_counted in self.strategy.passes(micro_batches)
            ]
        return self.finish_step(losses, count)

    def finish_step(
        self, losses: Sequence[Tensor], count: float, scalars: Sequence[Tensor] | None = None
    ) -> StepResult:
        """Update the weights, whose gradients of the step's ``losses`` are there; each loss is
        already divided by their ``count``. ``scalars`` is what ``change_weights`` returned if it
        has been called."""
        first = losses[0] if losses else torch.zeros((), device=self.strategy.device)
        own = sum(losses[1:], start=first)
        loss = self.strategy.reduce_gradients(list(self.parameters.values()), own)
        if self.probe is not None and losses:  # a process may have no rows in a step
            self.probe.check()
            self.probe = None
        norm, *values = self.change_weights() if scalars is None else scalars
        self.steps += 1
        self.hooks.after_step(self.steps, self.scales_loss)
        if not self.strategy.skipped_update:
            self.scheduler.step()
        self.discard_gradients()
        return StepResult(loss, norm, tuple(values), count)

    def change_weights(self) -> list[Tensor]:
        """Clip and take the optimizer's step; return the gradient's norm before it, and the
        method's values."""
        values = self.hooks.before_step(self.strategy.scale)
        max_norm = math.inf if self.max_grad_norm is None else self.max_grad_norm
        norm = self.strategy.clip_grad_norm(list(self.parameters.values()), max_norm)
        self.optimizer.step()
        return [norm, *values]

    def discard_gradients(self) -> None:
        """Forget the gradients, after the step or if its passes have failed."""
        self.optimizer.zero_grad(set_to_none=not self.keeps_gradients)

    def _forward_backward(self, batch: Batch, factor: float | Tensor) -> Tensor:
        """Add the gradient of the sum of the batch's losses times ``factor``; return that sum."""
        loss = self.objective(batch) * factor
        if loss.requires_grad:  # false if only experts train and none got a token
            self.strategy.backward(loss)
        detached: Tensor = loss.detach()
        return detached

    @torch.no_grad()
    def loss(self, micro_batches: Sequence[Batch]) -> float:
        self.objective.eval()
        try:
            with collective_pass(self.strategy.is_sharded):
                passes = self.strategy.passes(micro_batches)
                total = sum(float(self.objective(batch)) * counts for batch, counts in passes)
        finally:
            self.objective.train()
        totals = gather((total, sum(batch.loss_count for batch in micro_batches)))
        return sum(total for total, _ in totals) / sum(count for _, count in totals)

    def log_values(self) -> dict[str, float]:
        rate = float(self.scheduler.get_last_lr()[0])
        return {"learning_rate": rate, **self.hooks.logged(self.steps, self.optimizer)}

    def changed_ranks(self, steps: int) -> Tensor | None:
        return self.hooks.changed_ranks(self.steps - steps + 1, self.steps)

    def is_final_form(self) -> bool:
        return self.hooks.is_final_form(self.steps)

    def ranks(self) -> dict[str, int] | None:
        return self.hooks.ranks()

    @torch.no_grad()
    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        for name, parameter in self.parameters.items():
            parameter.copy_(weights[name])

    def state_dict(self) -> EngineState:
        scaler = self.strategy.scaler
        return EngineState(
            step=self.steps,
            weights=dict(self.weights),
            method=self.hooks.state(),
            optimizer=self.optimizer.state_dict(),
            scheduler=self.scheduler.state_dict(),
            scaler=None if scaler is None else scaler.state_dict(),
        )

    def load_state_dict(self, state: EngineState) -> None:
        state = fitted(state, self.state_dict(), self.optimizer.param_groups)
        self.load_weights(state.weights)
        self.hooks.load_state(state.method)
        self.optimizer.load_state_dict(state.optimizer)
        self.scheduler.load_state_dict(state.scheduler)
        if state.scaler is not None and self.strategy.scaler is not None:
            self.strategy.scaler.load_state_dict(state.scaler)
        self.steps = state.step


class CausalObjective(nn.Module):
    """The sum over a batch's trained tokens of -weight * log p(token | tokens before it).

    With ``packing``, ``longest_row`` bounds the tokens of a packed row, and ``varlen`` is
    whether the model, already on its device, attends to packed rows through ``varlen_attn``.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        label_smoothing: float = 0.0,
        packing: bool = False,
        longest_row: int = 0,
        kernels: Kernels = "auto",
    ) -> None:
        super().__init__()
        self.model = model
        self.varlen = packing and use_varlen(model)
        self.parts: CausalParts = split_model(model)
        self.label_smoothing = label_smoothing
        self.longest_row = longest_row
        self.kernels = kernels

    def forward(self, batch: CausalBatch) -> Tensor:
        return self.losses(self.states(batch), batch)

    def states(self, batch: CausalBatch) -> Tensor:
        """What the model computes for each token, from which its loss follows: see
        ``final_states``."""
        inputs: dict[str, Any] = {}
        if batch.position_ids is not None:
            inputs["position_ids"] = batch.position_ids
        if batch.cu_seq_lens is not None:
            inputs |= varlen_options(batch.cu_seq_lens, self.longest_row)
        block_mask = batch.position_ids is not None and batch.cu_seq_lens is None
        with host_masks(batch.input_ids.device, packed=block_mask):
            return final_states(self.model, self.parts, batch.input_ids, **inputs)

    def losses(self, states: Tensor, batch: CausalBatch) -> Tensor:
        """The sum of the losses, given the ``states``."""
        return state_losses(
            self.model,
            self.parts,
            states,
            batch.loss_indices,
            batch.targets,
            self.label_smoothing,
            self.kernels,
            batch.weights,
        )


class EncoderObjective(nn.Module):
    """The sum of ``label_losses`` over a batch's rows. ``columns`` are the logits of the task's
    classes, in order; None means all. ``weights`` are those of the task's classes. Objectives with
    the same ``loss_settings`` compute the same losses."""

    parts = None
    varlen = False
    columns: Tensor | None
    weights: Tensor | None

    def __init__(
        self,
        model: PreTrainedModel,
        label_smoothing: float = 0.0,
        columns: Sequence[int] | None = None,
        weights: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        indices = None if columns is None else torch.tensor(columns, device=model.device)
        self.register_buffer("columns", indices, persistent=False)
        values = None if weights is None else torch.tensor(weights, device=model.device)
        if values is not None and indices is not None:
            others = values.new_ones(model.config.num_labels or 0)
            values = others.index_copy(0, indices, values)
        self.register_buffer("weights", values, persistent=False)
        self.label_smoothing = label_smoothing
        listed = [None if each is None else tuple(each) for each in (columns, weights)]
        self.loss_settings = (model.config.num_labels, label_smoothing, *listed)

    def forward(self, batch: EncoderBatch) -> Tensor:
        return self.losses(self.states(batch), batch)

    def states(self, batch: EncoderBatch) -> Tensor:
        """The logits (rows, outputs)."""
        with host_masks(batch.input_ids.device):
            logits: Tensor = self.model(**batch.model_inputs()).logits
        return logits

    def losses(self, states: Tensor, batch: EncoderBatch, reduction: str = "sum") -> Tensor:
        """The sum of the losses, given the logits; ``reduction`` as in ``label_losses``."""
        return label_losses(
            states.float(), batch.labels, self.columns, self.label_smoothing, self.weights,
            reduction,
        )  # fmt: skip
