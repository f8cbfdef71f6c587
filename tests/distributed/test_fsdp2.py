from __future__ import annotations

import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from lorakit.distributed import fsdp2
from lorakit.distributed.fsdp2 import Fsdp2, kept_layers


@pytest.mark.parametrize(
    ("sizes", "room_bytes", "kept"),
    [([3, 3, 3], 7, 2), ([3, 3, 3], 9, 3), ([9, 1, 2], 4, 2), ([3, 3, 3], 0, 1), ([3, 8], 4, 1)],
)
def test_the_last_layers_that_fit_stay_gathered(
    sizes: list[int], room_bytes: int, kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FSDP_RESHARD_AFTER_FORWARD", "true")
    assert kept_layers(sizes, room_bytes) == kept


def test_the_launcher_may_keep_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FSDP_RESHARD_AFTER_FORWARD", "false")
    assert kept_layers([3, 3, 3], 0) == 3


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    """A process group of one."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    dist.destroy_process_group()
    AcceleratorState._reset_state()
    PartialState._reset_state()


@pytest.mark.usefixtures("group")
def test_a_sharded_weight_is_freed_before_the_next_layer_is_moved(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise each device holds the whole model until all layers are sharded."""
    monkeypatch.delenv("FSDP_RESHARD_AFTER_FORWARD", raising=False)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama).requires_grad_(False)
    layers = list(model.model.layers)
    assert len(layers) > 1
    weights = [weakref.ref(layer.mlp.up_proj.weight) for layer in layers]
    alive: list[int] = []
    shard: Any = fsdp2.fully_shard

    def counting(module: Any, **options: Any) -> None:
        alive.append(sum(weight() is not None for weight in weights))
        shard(module, **options)

    monkeypatch.setattr(fsdp2, "fully_shard", counting)
    Fsdp2(Accelerator(cpu=True)).place(model)
    assert alive == [*range(len(layers), -1, -1)]


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("checkpoints", [False, True])
def test_few_weights_are_sharded_only_to_save_memory(
    checkpoints: bool, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fsdp2, "room_bytes", lambda _device: 2**30)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama).requires_grad_(False)
    strategy = Fsdp2(Accelerator(cpu=True))
    note = strategy.place(model, checkpoints)
    assert strategy.is_sharded == checkpoints
    assert ("are not sharded" in note) == (not checkpoints)
    assert any(isinstance(p, DTensor) for p in model.parameters()) == checkpoints
