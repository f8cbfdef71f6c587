"""A model and an encoded split -> losses, predictions and the task's metrics.

Generated turns of chats -> their contents, as the chat template writes those.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lorakit.data.chat import around_answer
from lorakit.data.chat.template import PAYLOAD, ChatTemplate
from lorakit.data.chat.turns import TurnReader, content_text
from lorakit.data.collate import collate_causal, collate_encoder, eval_batches
from lorakit.data.encode import EncodedSplit
from lorakit.data.examples import ChatExample
from lorakit.data.sources import Split
from lorakit.distributed.processes import check_peers, gather, run_on_main, shard, unshard
from lorakit.errors import EvaluationError
from lorakit.evaluation.generation import generate_text
from lorakit.evaluation.hf_generate import pad_id
from lorakit.evaluation.progress import EvaluationStopped, OnPhase, ShouldStop, Watch
from lorakit.evaluation.prompts import encode_prompts
from lorakit.evaluation.sampling import task_decoding
from lorakit.models.causal import CausalParts, host_masks, split_model, token_losses
from lorakit.models.heads import head_labels, label_columns
from lorakit.models.load import window
from lorakit.tasks.base import Prediction, Task

__all__ = ["Evaluation", "EvaluationStopped", "evaluate_model"]


@dataclass(frozen=True)
class Evaluation:
    """``predictions`` in the split's order: class indices, floats or generated texts; empty where
    a causal model generated nothing."""

    metrics: dict[str, float]
    predictions: list[Prediction]


@dataclass(frozen=True)
class _Share:
    """What one process measured: the sum of the losses of its ``rows`` of tokens, and its
    predictions."""

    loss: float
    rows: int
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
    seed: int,
    parts: CausalParts | None = None,
    generate: bool = True,
    on_progress: OnPhase | None = None,
    should_stop: ShouldStop | None = None,
) -> Evaluation:
    """Measure the model on ``encoded``, which is ``split`` in tokens.

    A causal model gives ``loss``, the mean over the split's trained tokens, and ``perplexity`` =
    exp(loss); if ``generate`` and the task generates, also the task's scores of the continued
    prompts, in which only ``task.temperature`` above 0 draws, from ``seed``. An encoder gives
    ``loss``, the mean over rows (cross entropy, or the squared error of a regression), and the
    task's scores. ``parts`` are ``split_model(model)``, for a caller that has them.
    ``on_progress`` gets the phase, rows done and rows in all. No generator's state is touched, and
    the model's training mode is left as it was.

    In a group of processes each measures its share of the rows, and all return the same.

    Raises EvaluationError for a metric that is not finite, EvaluationStopped if ``should_stop``
    returns true.
    """
    assert encoded.counts.rows == len(split), "the encoded rows are the split's"
    own = shard(len(encoded))  # of a causal model's, some may be of one row of the split
    watch = _watches(on_progress, should_stop)
    with _evaluation_mode(model):
        if task.kind == "encoder":
            with host_masks(model.device):
                columns = label_columns(model, task.labels(config, None))
                share = _classify(
                    model, tokenizer, encoded, own, batch_size, columns, watch("evaluated", own)
                )
        else:
            parts = parts or split_model(model)
            with host_masks(model.device):
                losses = watch("loss", own)
                loss = _token_loss(model, tokenizer, parts, encoded, own, batch_size, losses)
            texts: list[Prediction] = []
            if generate and task.generates(config):
                prompts = shard(len(split))
                generated = watch("generated", prompts)
                texts = _generate(model, tokenizer, task, config, split, prompts, seed, generated)
            share = _Share(loss, len(own), texts)
    return _together(gather(share), task, config, split, encoded)


def _together(
    shares: list[_Share], task: Task, config: Any, split: Split, encoded: EncodedSplit
) -> Evaluation:
    assert sum(share.rows for share in shares) == len(encoded), "each row is measured once"
    encoder = task.kind == "encoder"
    loss = sum(share.loss for share in shares)
    loss /= len(encoded) if encoder else encoded.trained_tokens
    metrics = {"loss": loss}
    if not encoder:
        metrics["perplexity"] = math.exp(loss) if loss < 700 else math.inf
    predictions = unshard([share.predictions for share in shares])
    if predictions:
        metrics |= run_on_main(lambda: task.metrics(predictions, split, config))
    return Evaluation(_finite(metrics, split), predictions)


def _watches(
    on_progress: OnPhase | None, should_stop: ShouldStop | None
) -> Callable[[str, range], Watch]:
    """Phase and its rows -> its watch."""

    def stops() -> bool:
        check_peers()
        return should_stop is not None and should_stop()

    return lambda phase, rows: Watch(len(rows), on_progress and partial(on_progress, phase), stops)


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


def _token_loss(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    parts: CausalParts,
    encoded: EncodedSplit,
    own: range,
    batch_size: int,
    watch: Watch,
) -> float:
    """The sum over the trained tokens of ``own`` rows."""
    sums = []
    for rows in _own_batches(encoded, own, batch_size):
        watch.check()
        batch = collate_causal([encoded[int(i)] for i in rows], pad_id(tokenizer)).to(model.device)
        sums.append(token_losses(model, parts, batch.input_ids, batch.loss_indices, batch.targets))
        watch.advance(len(rows))
    return _total(sums)


def _generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    config: Any,
    split: Split,
    own: range,
    seed: int,
    watch: Watch,
) -> list[Prediction]:
    texts = generate_text(
        model,
        tokenizer,
        encode_prompts(task, config, split, tokenizer, window(model), own),
        task_decoding(config, task.stop_texts(config), seed),
        rows=own,
        batch_size=config.generation_batch_size,
        watch=watch,
    )
    return contents(task, config, split, tokenizer, own, texts)


def _classify(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    encoded: EncodedSplit,
    own: range,
    batch_size: int,
    columns: list[int] | None,
    watch: Watch,
) -> _Share:
    """The sum of the losses, and a class index (or a regression's float) for each row.

    ``columns`` are the logits of the task's classes by index, None where they are all, in order. A
    row for which another logit is the largest gets ``{"error": ...}``, which names its class.
    """
    predicted: dict[int, Prediction] = {}
    place = None if columns is None else torch.tensor(columns, device=model.device)
    outputs: list[tuple[NDArray[np.int64], Tensor]] = []
    sums: list[Tensor] = []
    for rows in _own_batches(encoded, own, batch_size):
        watch.check()
        batch = collate_encoder([encoded[int(i)] for i in rows], pad_id(tokenizer))
        batch = batch.to(model.device)
        labels = batch.labels
        logits = model(**batch.model_inputs()).logits.float()
        if model.config.num_labels == 1:
            outputs.append((rows, logits.squeeze(-1)))
            sums.append((outputs[-1][1] - labels.float()).square().sum())
        else:
            labels = labels if place is None else place[labels]
            outputs.append((rows, logits.argmax(dim=-1)))
            sums.append(torch.nn.functional.cross_entropy(logits, labels, reduction="sum"))
        watch.advance(len(rows))
    classes: dict[Any, Prediction] = {}
    if columns is not None:
        names = enumerate(head_labels(model.config))
        classes = {at: {"error": f"the class {name}"} for at, name in names}
        classes |= {at: index for index, at in enumerate(columns)}
    for rows, values in outputs:
        found = [classes.get(value, value) for value in values.tolist()]
        predicted |= zip(rows.tolist(), found, strict=True)
    return _Share(_total(sums), len(predicted), [predicted[row] for row in own])


def _own_batches(encoded: EncodedSplit, own: range, batch_size: int) -> Iterator[NDArray[np.int64]]:
    rows = np.array(own, dtype=np.int64)
    for places in eval_batches(encoded.lengths[rows], batch_size):
        yield rows[places]


def _total(sums: list[Tensor]) -> float:
    """The batches' float32 sums, added in float64; the device is waited for here, once."""
    return float(torch.stack(sums).cpu().double().sum()) if sums else 0.0


def _finite(metrics: dict[str, float], split: Split) -> dict[str, float]:
    wrong = {name: value for name, value in metrics.items() if not math.isfinite(value)}
    if wrong:
        names = ", ".join(f"{name} = {value}" for name, value in wrong.items())
        raise EvaluationError(
            f"{split.source}: {names}: the model's outputs are not finite or not usable; "
            "likely causes: diverged weights, or a float16 model that overflows (try bfloat16)"
        )
    return metrics


def contents(
    task: Task,
    config: Any,
    split: Split,
    tokenizer: PreTrainedTokenizerBase,
    rows: Iterable[int],
    texts: list[Prediction],
) -> list[Prediction]:
    """The generated ``texts`` of ``rows`` as they compare with a row's text.

    A text that is what the row's turn is trained as is the content of that turn, whatever the
    template makes of it (upper case, escaped characters). Of other texts only the fixed text goes
    that the template writes before or behind each answer, such as an empty ``<think>`` block.
    """
    found = []
    trained = _TrainedTexts(tokenizer)
    for row, text in zip(rows, texts, strict=True):
        prompt = task.prompt(split.rows[row], config)
        if isinstance(prompt, ChatExample):
            content = trained.content(prompt, task.example(split.rows[row], config), text)
            if content is None:
                before, behind = around_answer(prompt.messages, tokenizer, prompt.tools)
                content = _without(text, before, behind)
            text = content
        found.append(text)
    return found


class _TrainedTexts:
    """Recognises what a turn is trained as."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._reader: TurnReader | None = None

    def content(self, prompt: ChatExample, example: Any, text: str) -> str | None:
        """The content of the turn that answers ``prompt`` in ``example``, if ``text`` is that turn
        as the template renders it, white space at both ends and special tokens aside. None also
        where the template renders the content as it stands."""
        index = len(prompt.messages)
        if not isinstance(example, ChatExample) or len(example.messages) != index + 1:
            return None
        content = content_text(example.messages[index])
        if not content.strip() or any(example.messages[index].get(key) for key in PAYLOAD):
            return None
        if self._reader is None:
            self._reader = TurnReader(ChatTemplate(self._tokenizer))
        turn = self._reader.read(example.messages, example.tools, index)
        answer = self._reader.template.special.sub("", turn.answer).strip()
        return content if text.strip() == answer != content.strip() else None


def _without(text: str, before: str, behind: str) -> str:
    head, tail = before.strip(), behind.strip()
    if head and text.lstrip().startswith(head):
        text = text.lstrip()[len(head) :].lstrip()
    if tail and text.rstrip().endswith(tail):
        text = text.rstrip()[: -len(tail)].rstrip()
    return text
