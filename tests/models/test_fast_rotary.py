"""Rotary embeddings whose calls a kernel takes on a GPU: which formulas, and which calls."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch

from lorakit.models.fast_rotary import is_usual, use_fast_rotary
from tests import families


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_nothing_changes_on_the_cpu(family: str) -> None:
    code: Any = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    before = code.apply_rotary_pos_emb
    use_fast_rotary(families.tiny(family).to(torch.bfloat16))
    assert code.apply_rotary_pos_emb is before


@pytest.mark.parametrize(
    ("family", "expected"),
    [("llama", True), ("qwen3", True), ("gemma2", True), ("glm", False), ("cohere", False)],
)
def test_which_formulas_the_kernel_computes(family: str, expected: bool) -> None:
    code: Any = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    assert is_usual(code.apply_rotary_pos_emb) == expected
