"""Evaluate a model on a tokenized split: its loss, its predictions and the task's metrics.

In a group of processes each one measures its share of the rows, and all return the same result.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lorakit.data.collate import (
    collate_causal,
    collate_encoder,
    eval_batches,
)
from lorakit.data.encode import EncodedSplit
from lorakit.data.sources import Split
from lorakit.distributed.group import rank_and_world_size
from lorakit.distributed.processes import (
    any_wants_to_stop,
    check_peers,
    collective_pass,
    gather,
    run_on_main,
    shard,
    unshard,
)
from lorakit.errors import EvaluationError
from lorakit.evaluation.generation import generate_text
from lorakit.evaluation.hf_generate import BatchCapacity, batch_capacity, pad_id
from lorakit.evaluation.label_predictions import LabelPredictions, as_prediction
from lorakit.evaluation.progress import (
    EvaluationStopped,
    OnPhase,
    ProgressMonitor,
    ShouldStop,
)
from lorakit.evaluation.prompts import answer_contents
from lorakit.evaluation.sampling import task_decoding
from lorakit.evaluation.scorer import ModelScorer, Scorer
from lorakit.models.causal import CausalParts, split_model
from lorakit.models.host_masks import host_masks
from lorakit.models.label_losses import label_losses
from lorakit.tasks.base import Prediction, Task


@dataclass(frozen=True)
class EvalData:
    """A split to evaluate on.

    ``encoded`` is the tokenized split. ``prompts`` are the token ids to generate from, one prompt
    per row of the split; None if the task generates no text.
    """

    task: Task
    config: Any
    split: Split
    encoded: EncodedSplit
    prompts: Sequence[Sequence[int]] | None = None

    def measured_metrics(self, generate: bool) -> set[str]:
        """Return the names of the metrics that ``evaluate_model`` computes."""
        task, split, config = self.task, self.split, self.config
        if task.kind == "encoder":
            assert self.encoded.labels is not None
            problem = task.problem(config)
            right = [as_prediction(label, problem) for label in self.encoded.labels]
            return {"loss", *task.metrics(right, split, config)}
        names = {"loss", "perplexity"}
        if generate and self.prompts is not None:
            names |= set(task.metrics([""] * len(split), split, config))
        return names


@dataclass(frozen=True)
class Evaluation:
    """Metrics, and ``predictions`` in the split's order: class indices, floats or generated texts.
    There are none if a causal model generated no text."""

    metrics: dict[str, float]
    predictions: list[Prediction]


def evaluate_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: EvalData,
    *,
    batch_size: int,
    seed: int,
    parts: CausalParts | None = None,
    generate: bool = True,
    on_progress: OnPhase | None = None,
    should_stop: ShouldStop | None = None,
    in_step: bool = False,
    scorer: Scorer | None = None,
    loss: float | None = None,
) -> Evaluation:
    """Measure the model on ``data``.

    The metrics of a causal model are ``loss``, the mean over the split's trained tokens, and
    ``perplexity`` = exp(loss). If ``generate`` is true and ``data`` has prompts, they include the
    task's scores of the texts generated from them; text is sampled, with ``seed``, only if
    ``task.temperature`` is above 0. The metrics of an encoder are ``loss``, the mean of
    ``label_losses`` over the rows or words, and the task's scores.

    ``parts`` is ``split_model(model)``, if the caller already has it. ``scorer`` replaces the
    model's passes, but not its generation. ``loss`` is that of a causal model, if these weights
    have been measured before. ``on_progress`` receives the phase, the rows done and the total. With
    ``in_step``, for a model whose passes need all processes, each one runs as many passes, and
    generates all texts. The state of random generators is not changed, and the model's training
    mode is restored.

    Raises EvaluationError for a metric that is not finite, and EvaluationStopped if
    ``should_stop`` returns true.
    """
    assert data.encoded.counts.rows == len(data.split), "the encoded rows are the split's"
    monitor = _monitors(on_progress, should_stop, in_step)
    result = None
    with _evaluation_mode(model), collective_pass(in_step), suppress(EvaluationStopped):
        if scorer is None:
            causal = data.task.kind == "causal"
            scorer = ModelScorer(model, (parts or split_model(model)) if causal else None)
        measure = _Measure(model, tokenizer, data, batch_size, seed, monitor, in_step, scorer)
        if data.task.kind == "encoder":
            result = measure.classify()
        else:
            result = measure.language_model(generate, loss is None)
    shares = [share for share in gather(result) if share is not None]
    if len(shares) < rank_and_world_size()[1]:
        raise EvaluationStopped
    return _combined(shares, data, loss)


@dataclass(frozen=True)
class _Share:
    """The results of one process: the sum of the losses of its ``rows`` encoded rows, and its
    predictions."""

    loss: float
    rows: int
    predictions: list[Prediction]


@dataclass(frozen=True)
class _Measure:
    """Measures this process's share of the rows; ``monitor`` creates the monitor of a phase."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    data: EvalData
    batch_size: int
    seed: int
    monitor: Callable[[str, range], ProgressMonitor]
    in_step: bool
    scorer: Scorer

    def language_model(self, generate: bool, measures_loss: bool) -> _Share:
        share = shard(len(self.data.encoded))  # a chat may be several of these rows
        with host_masks(self.model.device):
            loss = self._token_loss(share) if measures_loss else 0.0
        texts = []
        if generate and self.data.prompts is not None:
            texts = self._share_of_texts(self.data.prompts)
        return _Share(loss, len(share), texts)

    def classify(self) -> _Share:
        """Sum the losses, and predict a class index (of several per row, the list of those with a
        probability of at least 0.5; of words, a list of one each; for a regression, a float) for
        each row.

        A row whose largest logit belongs to a class that the task does not have is predicted as
        ``{"error": ...}``, which names the class.
        """
        share = shard(len(self.data.encoded))
        predictions = LabelPredictions.of(self.model, self.data.task, self.data.config)
        with host_masks(self.model.device):
            outputs, losses = self._class_outputs(share, predictions)
        predicted: dict[int, Prediction] = {}
        for rows, chosen in outputs:
            found = predictions.read(chosen.cpu().numpy(), self.data.encoded, rows)
            predicted |= zip(rows.tolist(), found, strict=True)
        return _Share(_total(losses), len(predicted), [predicted[row] for row in share])

    def _token_loss(self, share: range) -> float:
        """Sum the losses of the trained tokens of the rows ``share``."""
        monitor, sums = self.monitor("loss", share), []
        for rows, is_own in self._batches(share):
            monitor.check()
            chosen = [self.data.encoded[int(i)] for i in rows]
            batch = collate_causal(chosen, pad_id(self.tokenizer)).to(self.model.device)
            loss = self.scorer.token_loss(batch)
            if is_own:
                sums.append(loss)
                monitor.advance(len(rows))
        return _total(sums)

    def _share_of_texts(self, prompts: Sequence[Sequence[int]]) -> list[Prediction]:
        share = shard(len(prompts))
        if not self.in_step:
            return self._generate(prompts, share)
        # A batch ends with its longest text, so all processes must have the same batches.
        texts = self._generate(prompts, range(len(prompts)))
        return [texts[row] for row in share]

    def _generate(self, prompts: Sequence[Sequence[int]], share: range) -> list[Prediction]:
        task, config = self.data.task, self.data.config
        texts = generate_text(
            self.model,
            self.tokenizer,
            [prompts[row] for row in share],
            task_decoding(config, task.stop_texts(config), self.seed),
            rows=share,
            batch_size=config.generation_batch_size,
            capacity=self._capacity(),
            monitor=self.monitor("generated", share),
        )
        return answer_contents(task, config, self.data.split, self.tokenizer, share, texts)

    def _class_outputs(
        self, share: range, predictions: LabelPredictions
    ) -> tuple[list[tuple[NDArray[np.int64], Tensor]], list[Tensor]]:
        """Return rows and choices of each batch, and the batches' losses."""
        device = self.model.device
        monitor = self.monitor("predicted", share)
        outputs: list[tuple[NDArray[np.int64], Tensor]] = []
        losses: list[Tensor] = []
        for rows, is_own in self._batches(share):
            monitor.check()
            chosen = [self.data.encoded[int(i)] for i in rows]
            batch = collate_encoder(chosen, pad_id(self.tokenizer)).to(device)
            logits = self.scorer.logits(batch).float()
            if not is_own:
                continue
            outputs.append((rows, predictions.choose(logits)))
            losses.append(label_losses(logits, batch.labels, predictions.columns))
            monitor.advance(len(rows))
        return outputs, losses

    def _capacity(self) -> BatchCapacity | None:
        """The smallest of the processes' capacities if their batches must be the same."""
        if not self.in_step:
            return None
        return min(gather(batch_capacity(self.model)), key=lambda each: each.max_bytes or 0)

    def _batches(self, share: range) -> Iterator[tuple[NDArray[np.int64], bool]]:
        """Yield batches of the rows ``share`` and, if all processes need as many, others that do
        not count."""
        rows = np.array(share, dtype=np.int64)
        batches = [rows[i] for i in eval_batches(self.data.encoded.lengths[rows], self.batch_size)]
        missing = max(gather(len(batches))) - len(batches) if self.in_step else 0
        yield from ((batch, True) for batch in batches)
        yield from [(np.zeros(1, dtype=np.int64), False)] * missing


def _monitors(
    on_progress: OnPhase | None, should_stop: ShouldStop | None, in_step: bool
) -> Callable[[str, range], ProgressMonitor]:
    """Return a function that creates the monitor of a phase over some rows."""

    def stops() -> bool:
        wanted = should_stop is not None and should_stop()
        if in_step:
            return any(gather(wanted))
        check_peers()
        return any_wants_to_stop(wanted)

    def monitor(phase: str, rows: range) -> ProgressMonitor:
        return ProgressMonitor(len(rows), on_progress and partial(on_progress, phase), stops)

    return monitor


@contextmanager
def _evaluation_mode(model: PreTrainedModel) -> Iterator[None]:
    """Disable dropout and gradients.

    Not ``inference_mode``: a buffer that a model first creates here would be unusable in the
    training that continues afterwards.
    """
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def _total(sums: list[Tensor]) -> float:
    """Add the batches' float32 sums in float64; the only wait for the device."""
    return float(torch.stack(sums).cpu().double().sum()) if sums else 0.0


def _combined(shares: list[_Share], data: EvalData, known_loss: float | None) -> Evaluation:
    """Combine the processes' shares. Raises EvaluationError for a metric that is not finite."""
    encoded = data.encoded
    assert sum(share.rows for share in shares) == len(encoded), "each row is measured once"
    encoder = data.task.kind == "encoder"
    loss = sum(share.loss for share in shares) / encoded.loss_counts.sum().item()
    loss = loss if known_loss is None else known_loss
    metrics = {"loss": loss}
    if not encoder:
        metrics["perplexity"] = math.exp(loss) if loss < 700 else math.inf
    predictions = unshard([share.predictions for share in shares])
    if predictions:
        metrics |= run_on_main(lambda: data.task.metrics(predictions, data.split, data.config))
    if wrong := {name: value for name, value in metrics.items() if not math.isfinite(value)}:
        names = ", ".join(f"{name} = {value}" for name, value in wrong.items())
        raise EvaluationError(
            f"{data.split.source}: {names}: the model's outputs are not finite or not usable; "
            "likely causes: diverged weights, or float16 overflow (try bfloat16)"
        )
    return Evaluation(metrics, predictions)
