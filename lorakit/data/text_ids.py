"""Tokenize many texts without special tokens, as fast as the tokenizer allows.

A tokenizer of the ``tokenizers`` library is asked for ids alone, without the masks and offsets that
transformers returns. If it splits text into words, each word is tokenized only once.
"""

from __future__ import annotations

import json
import re
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from itertools import takewhile
from typing import Any

#: The methods through which transformers calls a tokenizer; a class may override them.
_CALLS = {"__call__", "_encode_plus", "_batch_encode_plus", "_call_one"}
#: A space that follows a letter, a digit or another character that is certainly not whitespace.
_SPACE = re.compile(r" (?<=[!-~\w] )")
#: The patterns of Llama 3, Qwen2 and Qwen3.5. As in GPT-2's, which is built into ByteLevel, a space
#: can only be at the beginning of a match or follow other whitespace.
_PATTERNS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)
#: How many words are remembered, and the length of the longest in characters.
_MOST_WORDS, _LONGEST_WORD = 60_000, 40
#: A new word costs about four times as much as a word within a text. If more than this share of the
#: words is new after a trial, texts are tokenized whole.
_TRIAL_WORDS, _MOST_NEW = 100_000, 0.25


class TextTokenizer:
    """Tokenizes texts to the same ids as ``tokenizer(texts, add_special_tokens=False)``."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def __call__(self, texts: Sequence[str]) -> list[array[int]]:
        if not texts:
            return []
        if self._words is not None and self._words.worthwhile:
            return self._words.ids(texts)
        return self._encode(texts)

    @cached_property
    def _backend(self) -> Any:
        """The ``tokenizers.Tokenizer``; None unless the tokenizer does nothing but call it."""
        from transformers import PreTrainedTokenizerFast as Fast

        if not isinstance(self._tokenizer, Fast):
            return None
        derived = takewhile(lambda base: base is not Fast, type(self._tokenizer).__mro__)
        overrides = any(_CALLS & vars(base).keys() for base in derived)
        return None if overrides else self._tokenizer.backend_tokenizer

    @cached_property
    def _words(self) -> WordIds | None:
        separate = self._backend is not None and has_separate_words(self._backend)
        return WordIds(self._encode) if separate else None

    def _encode(self, texts: Sequence[str]) -> list[array[int]]:
        backend = self._backend
        if backend is None:
            found = self._tokenizer(list(texts), add_special_tokens=False, verbose=False).input_ids
            return [array("i", ids) for ids in found]
        if backend.truncation is not None:  # left over from the tokenizer's last call
            backend.no_truncation()
        if backend.padding is not None:
            backend.no_padding()
        backend.encode_special_tokens = self._tokenizer.split_special_tokens
        encoded = backend.encode_batch_fast(texts, add_special_tokens=False)
        return [array("i", encoding.ids) for encoding in encoded]


class WordIds:
    """Tokenizes texts word by word and remembers the ids of the words.

    ``encode`` returns the ids of texts, with a tokenizer that satisfies ``has_separate_words``.
    """

    def __init__(self, encode: Callable[[Sequence[str]], list[array[int]]]) -> None:
        self._first, self._later = _Words(encode), _Words(encode, before=" ")
        self._seen = 0

    @property
    def worthwhile(self) -> bool:
        """Whether few enough words are new."""
        return self._seen < _TRIAL_WORDS or self._later.learned < _MOST_NEW * self._seen

    def ids(self, texts: Sequence[str]) -> list[array[int]]:
        """The ids of each text."""
        split = [_SPACE.split(text) for text in texts]
        first = [words.pop(0) for words in split]
        self._seen += sum(map(len, split))
        with self._first.known(first) as of_first, self._later.known(*split) as of_word:
            return [
                array("i", b"".join((of_first[begin], *map(of_word.__getitem__, words))))
                for begin, words in zip(first, split, strict=True)
            ]


class _Words:
    """The ids, as bytes, of words that follow ``before``, which is not part of their keys."""

    def __init__(
        self, encode: Callable[[Sequence[str]], list[array[int]]], before: str = ""
    ) -> None:
        self._encode, self._before = encode, before
        self._known: dict[str, bytes] = {}
        self.learned = 0

    @contextmanager
    def known(self, *texts: Sequence[str]) -> Iterator[dict[str, bytes]]:
        """Learn the words of the texts. Afterwards, forget those that are long or, if there are too
        many words, all that are new."""
        new = list(set().union(*texts) - self._known.keys())
        found = self._encode([self._before + word for word in new])
        self._known.update(zip(new, (ids.tobytes() for ids in found), strict=True))
        self.learned += len(new)
        yield self._known
        full = len(self._known) > _MOST_WORDS
        for word in new:
            if full or len(word) > _LONGEST_WORD:
                del self._known[word]


def has_separate_words(backend: Any) -> bool:
    """Whether the ids of a text are those of its parts if it is cut before each space that follows
    a letter, a digit or punctuation; False if that is unknown.

    This holds if no step of ``backend``, a ``tokenizers.Tokenizer``, looks beyond such a cut.
    """
    added = backend.get_added_tokens_decoder().values()
    return (
        not getattr(backend.model, "dropout", None)
        and not any(token.rstrip or _SPACE.search(token.content) for token in added)
        and _settings(backend.normalizer) in ({}, {"type": "NFC"})
        and _cuts_at_spaces(_settings(backend.pre_tokenizer))
    )


def _settings(component: Any) -> dict[str, Any]:
    """What tokenizer.json contains about a component, which may be None."""
    if component is None:
        return {}
    try:
        found: dict[str, Any] = json.loads(component.__getstate__())
    except Exception:  # written in Python
        return {"type": "Custom"}
    return found


def _cuts_at_spaces(settings: Mapping[str, Any]) -> bool:
    *before, last = settings.get("pretokenizers", [settings])
    splits = [step for step in before if step["type"] != "Digits"]
    return (
        last.get("type") == "ByteLevel"
        and all(map(_is_known_split, splits))
        and (last["use_regex"] or bool(splits))
    )


def _is_known_split(step: Mapping[str, Any]) -> bool:
    return (
        step["type"] == "Split"
        and step["pattern"].get("Regex") in _PATTERNS
        and step["behavior"] == "Isolated"
        and not step["invert"]
    )
