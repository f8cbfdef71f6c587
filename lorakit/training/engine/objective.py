"""What is minimised: a module from a batch to the sum of its losses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from lorakit.data.collate import CausalBatch, EncoderBatch
from lorakit.models.causal import (
    CausalParts,
    host_masks,
    split_model,
    token_losses,
    use_varlen,
    varlen_options,
)


class CausalObjective(nn.Module):
    """The sum over a batch's trained tokens of -log p(token | tokens before it).

    With ``packing``, ``longest_row`` bounds the tokens of a packed row, and ``varlen`` says whether
    the model, which is on its device, attends to packed rows through ``varlen_attn``.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        label_smoothing: float = 0.0,
        packing: bool = False,
        longest_row: int = 0,
    ) -> None:
        super().__init__()
        self.model = model
        self.varlen = packing and use_varlen(model)
        self.parts: CausalParts = split_model(model)
        self.label_smoothing = label_smoothing
        self.longest_row = longest_row

    def forward(self, batch: CausalBatch) -> Tensor:
        inputs: dict[str, Any] = {}
        if batch.position_ids is not None:
            inputs["position_ids"] = batch.position_ids
        if batch.cu_seq_lens is not None:
            inputs |= varlen_options(batch.cu_seq_lens, self.longest_row)
        block_mask = batch.position_ids is not None and batch.cu_seq_lens is None
        with host_masks(batch.input_ids.device, packed=block_mask):
            return token_losses(
                self.model,
                self.parts,
                batch.input_ids,
                batch.loss_indices,
                batch.targets,
                self.label_smoothing,
                **inputs,
            )


class EncoderObjective(nn.Module):
    """The sum over a batch's rows of the cross entropy, or of the squared error for a model with
    one output. ``columns`` are the logits of the task's classes, in order; None takes all."""

    parts = None
    varlen = False
    columns: Tensor | None

    def __init__(
        self,
        model: PreTrainedModel,
        label_smoothing: float = 0.0,
        columns: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        indices = None if columns is None else torch.tensor(columns)
        self.register_buffer("columns", indices, persistent=False)
        self.label_smoothing = label_smoothing

    def forward(self, batch: EncoderBatch) -> Tensor:
        with host_masks(batch.input_ids.device):
            logits = self.model(**batch.model_inputs()).logits.float()
        labels = batch.labels
        if logits.shape[-1] == 1:
            return F.mse_loss(logits.squeeze(-1), labels.float(), reduction="sum")
        if self.columns is not None:
            labels = self.columns[labels]
        return F.cross_entropy(
            logits, labels, reduction="sum", label_smoothing=self.label_smoothing
        )
