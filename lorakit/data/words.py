"""Which tokens of a text begin its words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

#: What torch's cross entropy ignores.
IGNORED_LABEL = -100


def first_tokens(words: Sequence[str], offsets: Any) -> NDArray[np.int32]:
    """Return for each token the index of the word that it is the first token of, else -1.

    ``words`` are joined by spaces in the text, and ``offsets`` (tokens, 2) are the first character
    of each token and the one after its last; of special tokens, the same twice. A token belongs to
    the word of its last character, since some tokenizers count the space before a word as part of
    its first token.
    """
    spans: NDArray[np.int64] = np.asarray(offsets, np.int64).reshape(-1, 2)
    lengths = np.array([len(word) for word in words], np.int64)
    starts = np.cumsum(lengths + 1) - lengths - 1
    last = spans[:, 1] - 1
    owners = np.searchsorted(starts, last, side="right") - 1
    inside = (spans[:, 1] > spans[:, 0]) & (last < (starts + lengths)[owners])
    found = np.full(len(spans), -1, np.int32)
    tokens = np.flatnonzero(inside)
    owned, first = np.unique(owners[tokens], return_index=True)
    found[tokens[first]] = owned
    return found


def token_labels(word_labels: NDArray[np.int64], words: NDArray[np.int32]) -> NDArray[np.int64]:
    """The label of each token: that of the word it begins, else ``IGNORED_LABEL``. ``words`` is
    what ``first_tokens`` returned."""
    return np.where(words < 0, IGNORED_LABEL, word_labels[words])


def label_weight(
    label: Any, words: NDArray[np.int32] | None, class_weights: NDArray[np.float64]
) -> float:
    """The sum of the weights of the classes of a row, or of its words with a token."""
    classes = label if words is None else label[words[words >= 0]]
    return float(class_weights[classes].sum())
