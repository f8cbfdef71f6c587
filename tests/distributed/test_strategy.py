from __future__ import annotations

import pytest
import torch

from lorakit.distributed.processes import gather, rank_and_world_size, run_on_main, shard, unshard
from lorakit.distributed.strategy import build_strategy
from lorakit.errors import UserError


def test_a_single_process_reduces_nothing() -> None:
    strategy = build_strategy("float32")
    value = torch.tensor(0.1)
    assert strategy.total(7) == 7
    assert torch.equal(strategy.reduce(value), value)
    assert torch.equal(strategy.scale(value), value)
    assert strategy.scaler is None
    assert rank_and_world_size() == (0, 1)
    assert gather("x") == ["x"]
    assert run_on_main(lambda: 3) == 3


def test_several_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="launched as 2 processes: this version trains in one"):
        build_strategy("float32")


@pytest.mark.skipif(torch.cuda.is_available(), reason="float16 is fine on a GPU")
def test_float16_on_the_cpu_is_refused() -> None:
    with pytest.raises(UserError, match="allowed on the CPU: bfloat16, float32"):
        build_strategy("float16")


@pytest.mark.parametrize("total", [0, 1, 5, 9])
def test_shards_are_put_back_in_order(total: int) -> None:
    assert list(shard(total)) == list(range(total))
    shards = [list(range(rank, total, 4)) for rank in range(4)]
    assert unshard(shards) == list(range(total))
