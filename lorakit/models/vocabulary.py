"""Extend a tokenizer, and the embeddings of its model: ``model.add_tokens`` and
``model.chat_template``."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from lorakit.data.chat.template import PROBE, ChatTemplate
from lorakit.data.chat.template_source import find_template
from lorakit.errors import DataError, UserError, listed, shown
from lorakit.models.hub import quiet
from lorakit.recipe.sections import ModelSection

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Vocabulary:
    """What a recipe changed. ``trained`` are the ids whose rows are trained: those of new tokens,
    and of every token in ``model.add_tokens``."""

    trained: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()


def extend_tokenizer(tokenizer: PreTrainedTokenizerBase, section: ModelSection) -> Vocabulary:
    """Set the chat template, and add its special tokens and ``add_tokens``, as far as they are new.

    The token that ends an answer in the template becomes EOS. Raises UserError for a template that
    cannot be used.
    """
    if section.chat_template is None and not section.add_tokens:
        return Vocabulary()
    known, notes = set(tokenizer.get_vocab()), []
    needed: tuple[str, ...] = ()
    if section.chat_template is not None:
        template = find_template(section.chat_template)
        tokenizer.chat_template = template.source
        needed = tuple(token for token in template.tokens if token not in known)
        _add(tokenizer, needed, special=True)
        notes += _set_eos(tokenizer, section.chat_template)
    present = known | {*needed}
    _add(tokenizer, [t for t in section.add_tokens if t not in present], special=False)
    ids: Any = tokenizer.convert_tokens_to_ids([*needed, *section.add_tokens])
    old = [token for token in section.add_tokens if token in known]
    if new := dict.fromkeys(t for t in (*needed, *section.add_tokens) if t not in known):
        notes.append(f"new tokens, whose rows are trained: {listed([*new], most=8)}")
    if old:
        notes.append(f"tokens of the vocabulary whose rows are trained too: {listed(old, most=8)}")
    return Vocabulary(tuple(sorted(set(ids))), tuple(notes))


def _add(tokenizer: PreTrainedTokenizerBase, tokens: Any, special: bool) -> None:
    from tokenizers import AddedToken

    added = [AddedToken(token, normalized=False, special=special) for token in tokens]
    tokenizer.add_tokens(added, special_tokens=special)


def _set_eos(tokenizer: PreTrainedTokenizerBase, name: str) -> list[str]:
    template = ChatTemplate(tokenizer)
    chat = [{"role": "user", "content": "."}, {"role": "assistant", "content": PROBE}]
    try:
        _, _, after = template.render(chat).text.rpartition(PROBE)
    except DataError as error:
        raise UserError(f"model.chat_template = {shown(name)}: {error}") from error
    end = template.added.match(after.lstrip())
    if end is None or end[0] == tokenizer.eos_token:
        return []
    tokenizer.eos_token = end[0]
    return [f"EOS is {end[0]}, which ends an answer in the chat template"]


def extend_vocabulary(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, section: ModelSection
) -> Vocabulary:
    """``extend_tokenizer``, and a row of the embeddings for each token. Rows that the model lacked
    are all trained, also those of tokens that the tokenizer had before."""
    found = extend_tokenizer(tokenizer, section)
    if not found.trained:
        return found
    before = len(model.get_input_embeddings().weight)  # type: ignore[arg-type]
    rows = max(tokenizer.get_vocab().values()) + 1
    extend_embeddings(model, rows)
    return replace(found, trained=tuple(sorted({*found.trained, *range(before, rows)})))


def extend_embeddings(model: PreTrainedModel, rows: int) -> None:
    """Extend the embedding and the output layer to ``rows`` rows, if they have fewer. New rows are
    the mean of the old ones (Hewitt 2021). Draws no random numbers.

    Raises UserError for a model without such a table.
    """
    import torch
    from torch import Tensor, nn

    layer = model.get_input_embeddings()
    if not isinstance(layer, nn.Embedding):
        raise UserError(
            f"model.add_tokens: {type(model).__name__} has no embedding table to extend; allowed: "
            "[]"
        )
    before = layer.num_embeddings
    if rows <= before:
        return
    with torch.random.fork_rng(devices=[]), quiet():
        model.resize_token_embeddings(rows, mean_resizing=False)
    with torch.no_grad():
        for end in (model.get_input_embeddings(), model.get_output_embeddings()):
            for value in () if end is None else (end.weight, getattr(end, "bias", None)):
                if isinstance(value, Tensor):
                    value[before:] = value[:before].mean(0, dtype=torch.float32).to(value.dtype)
