"""Beam search, a batch at a time, through transformers' ``generate``.

A continuation's score is the sum of its log probabilities / length ** length_penalty; the length
is in generated tokens and counts the EOS, or the tokens of the stop text, that end it. A
hypothesis that ends with a stop text is finished and ranked there, as one that ends with an EOS.
The search of a row ends when ``num_beams`` hypotheses are finished and the best running one, at
its present length, scores below the worst of them (transformers' ``early_stopping=False``), or at
``max_new_tokens``, where the running ones are ranked too.

The LoRA authors' ``examples/NLG/src/gpt2_beam.py`` has the same score, length and n-gram rule. It
differs in two things. It searches to ``eval_len`` tokens in any case, so a longer hypothesis may
still win there. And it looks at the best ``num_beams`` candidates of a step, of which those that
finish leave no place to others; transformers looks at twice as many or more, so that ``num_beams``
always run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedModel, StoppingCriteriaList

from lorakit.evaluation.choosing import processors
from lorakit.evaluation.decoding import Decoding
from lorakit.evaluation.ending import Ended, Reader
from lorakit.evaluation.prepare import generation_config, left_padded
from lorakit.evaluation.watch import Watch


def search(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    decoding: Decoding,
    reader: Reader,
    watch: Watch,
) -> list[str]:
    """The best continuation of each prompt. Raises EvaluationStopped between two tokens."""
    ids, mask = left_padded(prompts, reader.tokenizer, model.device)
    width = ids.shape[1]
    generate: Any = model.generate
    found = generate(
        input_ids=ids,
        attention_mask=mask,
        generation_config=generation_config(
            reader,
            max_new_tokens=decoding.max_new_tokens,
            num_beams=decoding.num_beams,
            length_penalty=decoding.length_penalty,
            early_stopping=False,
        ),
        logits_processor=processors(decoding, width),
        stopping_criteria=StoppingCriteriaList([Ended(reader, width, watch.check)]),
    )
    # Behind its end a row is filled up, for a model without EOS with -1.
    rows = found[:, width:].tolist()
    return [reader.read([token for token in row if token >= 0])[0] for row in rows]
