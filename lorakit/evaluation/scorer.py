"""What an evaluation asks of a model for each batch, besides generated text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor
from transformers import PreTrainedModel

from lorakit.data.collate import CausalBatch, EncoderBatch
from lorakit.models.causal import CausalParts, token_losses


class Scorer(Protocol):
    """Computes what an evaluation measures of each batch; called once for each batch, in order."""

    def logits(self, batch: EncoderBatch) -> Tensor:
        """An encoder's logits (rows, outputs)."""

    def token_loss(self, batch: CausalBatch) -> Tensor:
        """The sum of the losses of a causal model's trained tokens."""


@dataclass(frozen=True)
class ModelScorer:
    """Calls the model; ``parts`` is ``split_model(model)`` for a causal one."""

    model: PreTrainedModel
    parts: CausalParts | None = None

    def logits(self, batch: EncoderBatch) -> Tensor:
        logits: Tensor = self.model(**batch.model_inputs()).logits
        return logits

    def token_loss(self, batch: CausalBatch) -> Tensor:
        assert self.parts is not None
        ids, indices = batch.input_ids, batch.loss_indices
        return token_losses(
            self.model, self.parts, ids, indices, batch.targets, weights=batch.weights
        )
