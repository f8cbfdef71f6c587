"""A model and an encoded split -> losses, predictions and the task's metrics."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lorakit.data.batches import collate_causal, collate_encoder, eval_batches, to_device
from lorakit.data.encode import EncodedSplit
from lorakit.data.sources import Split
from lorakit.errors import EvaluationError
from lorakit.evaluation.generation import generate_text
from lorakit.evaluation.prompts import encode_prompts
from lorakit.evaluation.watch import EvaluationStopped, OnProgress, ShouldStop, Watch
from lorakit.models.causal import CausalParts, split_model, token_losses
from lorakit.models.host_masks import host_masks
from lorakit.models.window import window
from lorakit.tasks.base import Prediction, Task

__all__ = ["Evaluation", "EvaluationStopped", "evaluate_model"]


@dataclass(frozen=True)
class Evaluation:
    """``predictions`` in the split's order: class indices, floats or generated texts; empty where
    a causal model generated nothing."""

    metrics: dict[str, float]
    predictions: list[Prediction]


def evaluate_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    config: Any,
    split: Split,
    encoded: EncodedSplit,
    *,
    batch_size: int,
    parts: CausalParts | None = None,
    generate: bool = True,
    on_progress: OnProgress | None = None,
    should_stop: ShouldStop | None = None,
) -> Evaluation:
    """Measure the model on ``encoded``, which is ``split`` in tokens.

    A causal model gives ``loss``, the mean over the split's trained tokens, and ``perplexity`` =
    exp(loss); if ``generate`` and the task generates, also the task's scores of the continued
    prompts. An encoder gives ``loss``, the mean over rows (cross entropy, or the squared error of
    a regression), and the task's scores. ``parts`` are ``split_model(model)``, for a caller that
    has them. ``on_progress`` gets rows done and rows in all; rows that are generated for count
    twice. No random number is drawn, and the model's training mode is left as it was.

    Raises EvaluationError for a metric that is not finite, EvaluationStopped if ``should_stop``
    returns true.
    """
    assert len(encoded) == len(split), "the encoded rows are the split's"
    generate = generate and task.kind == "causal" and task.generates(config)
    watch = Watch(len(split) * (1 + generate), on_progress, should_stop)
    predictions: list[Prediction] = []
    with _evaluation_mode(model):
        if task.kind == "encoder":
            with host_masks(model.device):
                loss, predictions = _classify(model, tokenizer, encoded, batch_size, watch)
            metrics = {"loss": loss}
        else:
            parts = parts or split_model(model)
            with host_masks(model.device):
                loss = _mean_token_loss(model, tokenizer, parts, encoded, batch_size, watch)
            metrics = {"loss": loss, "perplexity": math.exp(loss) if loss < 700 else math.inf}
        if generate:
            predictions = _generate(model, tokenizer, task, config, split, watch)
    if predictions:
        metrics |= task.metrics(predictions, split, config)
    return Evaluation(_finite(metrics, split), predictions)


@contextmanager
def _evaluation_mode(model: PreTrainedModel) -> Iterator[None]:
    """Without dropout and gradients.

    Not ``inference_mode``: a buffer that a model first makes in here would be unusable in the
    training that goes on afterwards.
    """
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def _mean_token_loss(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    parts: CausalParts,
    encoded: EncodedSplit,
    batch_size: int,
    watch: Watch,
) -> float:
    sums = []
    for rows in eval_batches(encoded.lengths, batch_size):
        watch.check()
        batch = collate_causal([encoded[int(i)] for i in rows], _pad_id(tokenizer))
        batch = to_device(batch, model.device)
        sums.append(
            token_losses(model, parts, batch["input_ids"], batch["positions"], batch["targets"])
        )
        watch.advance(len(rows))
    return _total(sums) / encoded.trained_tokens


def _generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    config: Any,
    split: Split,
    watch: Watch,
) -> list[Prediction]:
    prompts = encode_prompts(task, config, split, tokenizer, window(model))
    return generate_text(
        model,
        tokenizer,
        prompts,
        max_new_tokens=config.max_new_tokens,
        stop=task.stop_texts(config),
        on_progress=lambda done, _: watch.reach(len(split) + done),
        should_stop=watch.should_stop,
    )


def _classify(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    encoded: EncodedSplit,
    batch_size: int,
    watch: Watch,
) -> tuple[float, list[Prediction]]:
    """The mean loss, and a class index (or a regression's float) for each row."""
    order: list[NDArray[np.int64]] = []
    outputs: list[Tensor] = []
    sums: list[Tensor] = []
    for rows in eval_batches(encoded.lengths, batch_size):
        watch.check()
        batch = collate_encoder([encoded[int(i)] for i in rows], _pad_id(tokenizer))
        batch = to_device(batch, model.device)
        labels = batch.pop("labels")
        logits = model(**batch).logits.float()
        if model.config.num_labels == 1:
            outputs.append(logits.squeeze(-1))
            sums.append((outputs[-1] - labels.float()).square().sum())
        else:
            outputs.append(logits.argmax(dim=-1))
            sums.append(torch.nn.functional.cross_entropy(logits, labels, reduction="sum"))
        order.append(rows)
        watch.advance(len(rows))
    predicted = torch.cat(outputs).cpu().numpy()
    in_order = np.empty_like(predicted)
    in_order[np.concatenate(order)] = predicted
    return _total(sums) / len(encoded), in_order.tolist()


def _total(sums: list[Tensor]) -> float:
    """The batches' float32 sums, added in float64; the device is waited for here, once."""
    return float(torch.stack(sums).cpu().double().sum())


def _pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    assert isinstance(tokenizer.pad_token_id, int), "load_tokenizer sets a pad token"
    return tokenizer.pad_token_id


def _finite(metrics: dict[str, float], split: Split) -> dict[str, float]:
    wrong = {name: value for name, value in metrics.items() if not math.isfinite(value)}
    if wrong:
        names = ", ".join(f"{name} = {value}" for name, value in wrong.items())
        raise EvaluationError(
            f"{split.source}: {names}: the model's outputs are not finite or not usable; "
            "likely causes: diverged weights, or a float16 model that overflows (try bfloat16)"
        )
    return metrics
