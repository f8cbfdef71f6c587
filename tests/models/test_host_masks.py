"""Masks that transformers builds for attention on a GPU."""

from __future__ import annotations

import pytest
import torch
from transformers import masking_utils

from lorakit.models.host_masks import host_masks
from tests.families import tiny


def test_no_mask_is_built_for_a_graph_that_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    config, states = tiny("llama").config, torch.zeros(1, 8, 4)
    config._attn_implementation = "sdpa"
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with host_masks(torch.device("cuda")):
        assert not masking_utils.is_tracing(None), "some versions ask this without a mask"
        assert masking_utils.create_causal_mask(config, states, None, None) is None
        padded = torch.tensor([[1] * 6 + [0] * 2])
        assert masking_utils.create_causal_mask(config, states, padded, None) is not None


def test_a_version_without_one_of_the_functions(monkeypatch: pytest.MonkeyPatch) -> None:
    """The others are still replaced, and afterwards all is as before."""
    monkeypatch.delattr(masking_utils, "is_tracing")
    before = masking_utils.find_packed_sequence_indices
    with host_masks(torch.device("cuda")):
        assert masking_utils.find_packed_sequence_indices is not before
        assert not hasattr(masking_utils, "is_tracing")
    assert masking_utils.find_packed_sequence_indices is before
