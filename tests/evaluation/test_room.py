"""How many sequences a batch holds."""

from __future__ import annotations

from lorakit.evaluation.hf_generate import MOST_SEQUENCES, MOST_TOKENS, Room, room_for
from tests.families import tiny


def test_memory_bounds_a_batch_by_powers_of_two() -> None:
    room = Room(2048, token_bytes=100, sequence_bytes=1000, most_bytes=1_000_000)
    assert [room.sequences(tokens) for tokens in (10, 90, 91, 1000, 10**6)] == [256, 64, 64, 8, 1]
    assert Room(16, 100, 1000, 1_000_000).sequences(10) == 16
    assert 1_000_000 // (100 * 10 + 1000) == 500, "of which 256 are taken"


def test_without_a_device_tokens_do() -> None:
    room = room_for(tiny("llama"))
    assert room.sequences(10) == MOST_SEQUENCES["cpu"]
    assert room.sequences(MOST_TOKENS // 5) == 5
    assert room.sequences(10 * MOST_TOKENS) == 1
