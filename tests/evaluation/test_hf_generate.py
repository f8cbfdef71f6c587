"""How many sequences fit into a batch."""

from __future__ import annotations

from lorakit.evaluation.hf_generate import MAX_SEQUENCES, MAX_TOKENS, BatchCapacity, batch_capacity
from tests.families import tiny


def test_memory_limits_a_batch_to_a_power_of_two() -> None:
    capacity = BatchCapacity(2048, token_bytes=100, sequence_bytes=1000, max_bytes=1_000_000)
    assert [capacity.sequences(tokens) for tokens in (10, 90, 91, 1000, 10**6)] == [
        256,
        64,
        64,
        8,
        1,
    ]
    assert BatchCapacity(16, 100, 1000, 1_000_000).sequences(10) == 16
    assert 1_000_000 // (100 * 10 + 1000) == 500, "of which 256 are taken"


def test_tokens_limit_a_batch_without_device_memory() -> None:
    capacity = batch_capacity(tiny("llama"))
    assert capacity.sequences(10) == MAX_SEQUENCES["cpu"]
    assert capacity.sequences(MAX_TOKENS // 5) == 5
    assert capacity.sequences(10 * MAX_TOKENS) == 1
