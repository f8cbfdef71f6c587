from __future__ import annotations

import pytest
import torch

from lorakit.errors import UserError
from lorakit.models.load import fit_max_length, window
from lorakit.recipe.sections import TaskSection
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
    said: list[str] = []
    assert fit_max_length(model, task(max_length=room), said.append).max_length == room
    with pytest.raises(UserError, match=rf"task\.max_length = {room + 1}: .* allowed: 1 to {room}"):
        fit_max_length(model, task(max_length=room + 1), said.append)
    with pytest.raises((IndexError, RuntimeError)), torch.no_grad():
        model(input_ids=token_ids(1, room + 1))
    assert said == []


def test_a_default_is_shortened_to_the_positions() -> None:
    said: list[str] = []
    assert fit_max_length(tiny("gpt2"), task(), said.append).max_length == 64
    assert said == ["task.max_length: 64 instead of the default 512: the model has 64 positions"]


def test_rotary_positions_go_on() -> None:
    assert fit_max_length(tiny("llama"), task(), print).max_length == 512


def task(**keys: int) -> TaskSection:
    return TaskSection(name="text", **keys)
