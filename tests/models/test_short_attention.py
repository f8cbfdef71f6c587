"""Passes over short rows run without cuDNN's attention; afterwards the setting is what it was."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.backends import cuda

from lorakit.models.short_attention import SHORT_TOKENS, use_short_attention
from tests import families


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    before = cuda.cudnn_sdp_enabled()
    yield
    cuda.enable_cudnn_sdp(before)


class Watched:
    """A model that records, in each pass, whether cuDNN's attention is enabled."""

    def __init__(self, family: str) -> None:
        self.model: Any = families.tiny(family, max_position_embeddings=512)
        use_short_attention(self.model)
        self.seen: list[bool] = []
        embeddings = self.model.get_input_embeddings()
        embeddings.register_forward_hook(lambda *_: self.seen.append(cuda.cudnn_sdp_enabled()))

    def enabled(self, length: int, **inputs: Any) -> bool:
        self.model(input_ids=torch.ones(2, length, dtype=torch.long), **inputs)
        return self.seen.pop()


@pytest.mark.parametrize("was_enabled", [True, False])
@pytest.mark.parametrize("family", ["llama", "bert", "gpt2", "opt"])
def test_rows_up_to_the_limit(family: str, was_enabled: bool) -> None:
    cuda.enable_cudnn_sdp(was_enabled)
    watched, options = Watched(family), {} if family == "bert" else {"use_cache": False}
    assert not watched.enabled(SHORT_TOKENS, **options)
    assert cuda.cudnn_sdp_enabled() == was_enabled
    assert watched.enabled(SHORT_TOKENS + 1, **options) == was_enabled


def test_generation_keeps_the_setting() -> None:
    cuda.enable_cudnn_sdp(True)
    assert Watched("llama").enabled(1, use_cache=True)


def test_it_may_be_used_twice_and_saved(tmp_path: Path) -> None:
    watched = Watched("bert")
    use_short_attention(watched.model)
    assert not watched.enabled(8)
    assert cuda.cudnn_sdp_enabled()
    watched.model.get_input_embeddings()._forward_hooks.clear()  # the test's own
    torch.save(watched.model, tmp_path / "model.pt")


def test_a_pass_that_fails_restores_the_setting() -> None:
    cuda.enable_cudnn_sdp(True)
    watched = Watched("bert")
    with pytest.raises(IndexError):
        watched.model(input_ids=torch.full((1, 4), 10**6))
    assert cuda.cudnn_sdp_enabled()
