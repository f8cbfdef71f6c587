from __future__ import annotations

import pytest
import torch

from lorakit.distributed.build import build_strategy
from lorakit.distributed.group import rank_and_world_size
from lorakit.distributed.processes import (
    first_on_each_host,
    gather,
    largest,
    run_on_main,
    shard,
    unshard,
)
from lorakit.errors import UserError


def test_a_single_process_reduces_nothing() -> None:
    strategy = build_strategy("float32")
    value = torch.tensor(0.1)
    parameter = torch.nn.Parameter(torch.ones(2))
    assert strategy.reduce_gradients([parameter], value) is value
    assert parameter.grad is None
    assert torch.equal(strategy.scale(value), value)
    assert strategy.scaler is None
    assert rank_and_world_size() == (0, 1)
    assert gather("x") == ["x"]
    assert largest([3, 0]) == [3, 0]
    assert run_on_main(lambda: 3) == 3
    with first_on_each_host():
        pass


def test_deepspeed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(UserError, match="DeepSpeed is not supported; allowed: distributed_type"):
        build_strategy("float32")


def test_fsdp_in_a_single_process_shards_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert not build_strategy("float32").is_sharded


@pytest.mark.skipif(torch.cuda.is_available(), reason="float16 is fine on a GPU")
def test_float16_on_the_cpu_is_refused() -> None:
    with pytest.raises(UserError, match="allowed on the CPU: bfloat16, float32"):
        build_strategy("float16")


@pytest.mark.parametrize("total", [0, 1, 5, 9])
def test_shards_are_put_back_in_order(total: int) -> None:
    assert list(shard(total)) == list(range(total))
    shards = [list(range(rank, total, 4)) for rank in range(4)]
    assert unshard(shards) == list(range(total))
