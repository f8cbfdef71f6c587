"""Encoded rows of different lengths, for tests of packing."""

from __future__ import annotations

import numpy as np

from lorakit.data.encode import EncodedRow


def rows() -> list[EncodedRow]:
    generator = np.random.default_rng(0)
    lengths = (9, 1, 14, 5, 2, 20, 7)
    return [
        EncodedRow(generator.integers(5, 64, n).astype(np.int32), np.arange(n) >= n // 3)
        for n in lengths
    ]
