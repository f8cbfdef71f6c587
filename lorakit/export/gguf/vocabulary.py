"""The tokenizer of a GGUF file: tokens, types, merges or scores, special tokens, chat template.

Everything is read from the fast tokenizer, which is what training used. Scores of a SentencePiece
vocabulary are those of ``tokenizer.model`` where it exists. ``tokenizer.json`` has merges instead,
in the order of the scores of what they produce.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorakit.errors import ModelError, shown
from lorakit.export.gguf.pre_tokenizer import pre_tokenizer_name
from lorakit.export.gguf.sentencepiece import read_pieces
from lorakit.models.hub import load_tokenizer

if TYPE_CHECKING:
    from gguf import GGUFWriter
    from transformers import PreTrainedTokenizerBase

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)
_SPACE = "\u2581"
#: Added tokens that structure chats, also where the tokenizer does not call them special.
_CONTROL_LIKE = re.compile(r"<\|.*\|>|<(?:start|end)_of_turn>|\[/?INST\]")
_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
#: llama.cpp's key of a special token -> transformers' attribute.
_SPECIAL = {
    "bos": "bos_token_id", "eos": "eos_token_id", "unk": "unk_token_id", "pad": "pad_token_id",
}  # fmt: skip


@dataclass(frozen=True)
class Tokens:
    """Texts and types by id; ``scores`` of a SentencePiece vocabulary, or ``merges``."""

    texts: Sequence[str]
    types: Sequence[int]
    scores: Sequence[float] | None = None
    merges: Sequence[str] = ()


def add_tokenizer(writer: GGUFWriter, directory: Path, vocab_size: int) -> None:
    """Add the keys of the tokenizer in ``directory``; ids without a token up to ``vocab_size`` are
    unused. Raises ModelError, which starts with the directory, for a tokenizer that llama.cpp does
    not have."""
    name = str(directory)
    tokenizer, changed = load_tokenizer(name, {})
    fast = json.loads(tokenizer.backend_tokenizer.to_str())
    model = fast["model"]
    if model.get("type") != "BPE":
        raise ModelError(
            f"{name}: tokenizer.json: model.type = {shown(model.get('type'))}: cannot be written "
            "as GGUF; allowed: BPE"
        )
    if model.get("byte_fallback"):
        tokens = _pieces(fast, directory, vocab_size)
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_scores(tokens.scores or ())
        writer.add_add_space_prefix(_prefixes_space(fast))
    else:
        tokens = _bpe(fast, name, vocab_size)
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre_tokenizer_name(fast, name))
        writer.add_token_merges(tokens.merges)
    writer.add_token_list(tokens.texts)
    writer.add_token_types(tokens.types)
    _add_special(writer, tokenizer, has_pad=not changed)


def _add_special(writer: GGUFWriter, tokenizer: PreTrainedTokenizerBase, has_pad: bool) -> None:
    for key, attribute in _SPECIAL.items():
        token_id = getattr(tokenizer, attribute)
        if token_id is not None and (has_pad or key != "pad"):
            getattr(writer, f"add_{key}_token_id")(token_id)
    ids = tokenizer("a")["input_ids"]
    writer.add_add_bos_token(bool(ids) and ids[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(bool(ids) and ids[-1] == tokenizer.eos_token_id)
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = [{"name": n, "template": text} for n, text in template.items()]
    if template:
        writer.add_chat_template(template)


def _bpe(fast: Mapping[str, Any], name: str, vocab_size: int) -> Tokens:
    texts, types = _listed(fast, name, vocab_size)
    merges = [" ".join(pair) for pair in _merges(fast)]
    return Tokens(texts, types, merges=merges)


def _pieces(fast: Mapping[str, Any], directory: Path, vocab_size: int) -> Tokens:
    texts, types = _listed(fast, str(directory), vocab_size)
    added = {token["id"] for token in fast["added_tokens"]}
    unknown = fast["model"].get("unk_token")
    for index, text in enumerate(texts):
        if text == unknown:
            types[index] = _UNKNOWN
        elif index not in added and _BYTE_TOKEN.fullmatch(text):
            types[index] = _BYTE
    scores = _scores(fast, texts, directory)
    for index in added:
        texts[index] = texts[index].replace(_SPACE, " ")
        scores[index] = -1000.0
    return Tokens(texts, types, scores)


def _scores(fast: Mapping[str, Any], texts: Sequence[str], directory: Path) -> list[float]:
    """Those of ``tokenizer.model``, if it has the same tokens; else minus the rank of the first
    merge that produces a token."""
    file = directory / "tokenizer.model"
    if file.is_file():
        pieces = read_pieces(file)
        vocabulary = fast["model"]["vocab"]
        if all(vocabulary.get(piece.text) == index for index, piece in enumerate(pieces)):
            rest = len(texts) - len(pieces)
            return [*(piece.score for piece in pieces), *[-10000.0] * rest][: len(texts)]
    merges = _merges(fast)
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(merges):
        ranks.setdefault(left + right, rank)
    return [-float(ranks.get(text, len(merges))) for text in texts]


def _merges(fast: Mapping[str, Any]) -> list[Sequence[str]]:
    merges = fast["model"]["merges"]
    return [merge.split(" ", 1) if isinstance(merge, str) else merge for merge in merges]


def _listed(fast: Mapping[str, Any], name: str, vocab_size: int) -> tuple[list[str], list[int]]:
    """Texts and types by id, without what distinguishes the kinds of vocabularies."""
    texts = [f"[PAD{index}]" for index in range(vocab_size)]
    types = [_UNUSED] * vocab_size
    added = {token["content"]: token for token in fast["added_tokens"]}
    vocabulary = {**fast["model"]["vocab"], **{text: t["id"] for text, t in added.items()}}
    if (largest := max(vocabulary.values(), default=-1)) >= vocab_size:
        raise ModelError(
            f"{name}: the tokenizer has ids up to {largest:,}, and the model's embedding "
            f"{vocab_size:,} rows: llama.cpp cannot load such a model"
        )
    for text, index in vocabulary.items():
        texts[index] = text
        types[index] = _NORMAL
        if (token := added.get(text)) is not None:
            control = token["special"] or _CONTROL_LIKE.fullmatch(text)
            types[index] = _CONTROL if control else _USER_DEFINED
    return texts, types


def _prefixes_space(fast: Mapping[str, Any]) -> bool:
    """Whether a space is put before a text."""
    parts = [fast.get("normalizer") or {}, fast.get("pre_tokenizer") or {}]
    for part in parts:
        parts += part.get("normalizers", []) + part.get("pretokenizers", [])
    return any(
        (part.get("type") == "Prepend" and part.get("prepend") == _SPACE)
        or (part.get("type") == "Metaspace" and part.get("prepend_scheme", "always") != "never")
        for part in parts
    )
