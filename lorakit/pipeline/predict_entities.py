"""Find the entities in texts with a classifier of tokens, as transformers' pipeline does."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TokenClassificationPipeline
from transformers.pipelines.token_classification import AggregationStrategy

from lorakit.data.encode import EncodedSplit
from lorakit.evaluation.classify import batch_logits, check_finite, softmax
from lorakit.evaluation.progress import ProgressMonitor

_KEYS = ("entity_group", "score", "word", "start", "end")


class EntityFinder:
    """Groups the tokens of texts into entities: those of ``TokenClassificationPipeline`` with the
    aggregation strategy ``first``, by which a word has the tag of its first token. ``name`` is the
    model's in messages."""

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str
    ) -> None:
        self._model, self._tokenizer, self._name = model, tokenizer, name
        self._pipeline: Any = TokenClassificationPipeline(
            model=model, tokenizer=tokenizer, device=model.device
        )

    def find(
        self,
        texts: Sequence[str],
        encoded: EncodedSplit,
        batch_size: int,
        max_length: int,
        monitor: ProgressMonitor,
    ) -> list[dict[str, Any]]:
        """Return ``{"entities": [...]}`` for each text, which ``encoded`` has the tokens of.

        Raises EvaluationError for outputs that are not finite.
        """
        found: dict[int, dict[str, Any]] = {}
        for rows, logits in batch_logits(
            self._model, self._tokenizer, encoded, batch_size, monitor
        ):
            values: NDArray[np.float32] = logits.cpu().numpy()
            chosen = [texts[row] for row in rows]
            placed = self._tokenizer(
                chosen,
                truncation=True,
                max_length=max_length,
                return_offsets_mapping=True,
                return_special_tokens_mask=True,
            )
            for at, row in enumerate(rows.tolist()):
                own = values[at, : len(placed["input_ids"][at])]
                check_finite(own, self._name)
                found[row] = {"entities": self._entities(chosen[at], own, placed, at)}
        return [found[row] for row in range(len(texts))]

    def _entities(
        self, text: str, logits: NDArray[np.float32], placed: Any, at: int
    ) -> list[dict[str, Any]]:
        """The entities of one text; ``logits`` are those of its tokens."""
        with warnings.catch_warnings():  # about tokenizers that do not mark the pieces of words
            warnings.simplefilter("ignore", UserWarning)
            tokens = self._pipeline.gather_pre_entities(
                text,
                placed["input_ids"][at],
                softmax(logits),
                placed["offset_mapping"][at],
                placed["special_tokens_mask"][at],
                AggregationStrategy.FIRST,
            )
        groups = self._pipeline.aggregate(tokens, AggregationStrategy.FIRST)
        return [
            {key: float(group[key]) if key == "score" else group[key] for key in _KEYS}
            for group in groups
            if group["entity_group"] != "O"
        ]
