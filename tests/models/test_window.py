from __future__ import annotations

import pytest
import torch

from lorakit.errors import UserError
from lorakit.models.window import check_length, window
from tests.families import tiny, token_ids


@pytest.mark.parametrize(
    ("family", "tokens"),
    [("bert", 64), ("roberta", 62), ("gpt2", 64), ("opt", 64), ("llama", 64), ("bloom", None)],
)
def test_window_is_what_the_model_takes(family: str, tokens: int | None) -> None:
    model = tiny(family, max_position_embeddings=64) if family != "bloom" else tiny("bloom")
    assert window(model) == tokens
    if tokens is not None:
        with torch.no_grad():
            model(input_ids=token_ids(1, tokens))


@pytest.mark.parametrize("family", ["bert", "roberta", "gpt2"])
def test_learnt_positions_end(family: str) -> None:
    model = tiny(family)
    room = window(model)
    assert room is not None
    check_length(model, room)
    with pytest.raises(UserError, match=rf"task\.max_length = {room + 1}: .* allowed: 1 to {room}"):
        check_length(model, room + 1)
    with pytest.raises((IndexError, RuntimeError)), torch.no_grad():
        model(input_ids=token_ids(1, room + 1))


def test_rotary_positions_go_on() -> None:
    check_length(tiny("llama"), 10_000)
