"""The stacked parameters of the members of a joint training, and which of them share passes."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorakit.methods.adalora_layer import AdaLoraLayer
from lorakit.methods.lora_layer import LoraLayer
from lorakit.training.joint.bank import FactorStack, StagedStacks, match_strides, stacks_of
from lorakit.training.joint.parts import LEAST_ROWS, Part, members_of_passes

IN, OUT = 6, 5


def layers(*ranks: int) -> dict[int, nn.Module | None]:
    torch.manual_seed(0)
    found: dict[int, nn.Module | None] = {}
    for member, r in enumerate(ranks):
        layer = LoraLayer(nn.Linear(IN, OUT), r=r, scaling=16 / r)
        nn.init.normal_(layer.lora_A)
        nn.init.normal_(layer.lora_B)
        found[member] = layer
    return found


def values(own: dict[int, nn.Module | None]) -> list[Tensor]:
    return [p.detach().clone() for layer in own.values() if layer for p in factors(layer)]


def factors(layer: nn.Module) -> list[nn.Parameter]:
    assert isinstance(layer, LoraLayer)
    return list(layer.adapter_parameters().values())


def test_factors_of_several_ranks_are_views_of_one_stack() -> None:
    own = layers(3, 1, 2)
    before = values(own)
    [stack] = stacks_of(own, padded=own)
    for ours, expected in zip(values(own), before, strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=0)
    A, B = stack.factors((0, 1, 2))
    assert (A.shape, B.shape) == ((3, 3, IN), (3, OUT, 3))
    for member, layer in own.items():
        assert isinstance(layer, LoraLayer)
        delta = B[member] @ A[member]
        torch.testing.assert_close(delta, layer.scaling * layer.lora_B @ layer.lora_A)
        assert layer.lora_B.untyped_storage().data_ptr() == B.untyped_storage().data_ptr()


def test_training_leaves_the_padding_zero() -> None:
    """Two steps of AdamW with weight decay, which equal those of the layers alone."""
    own, alone = layers(3, 1), layers(3, 1)
    [stack] = stacks_of(own, padded=own)
    parameters = [[p for layer in group.values() if layer for p in factors(layer)] for group in
                  (own, alone)]  # fmt: skip
    optimizers = [torch.optim.AdamW(each, lr=0.1, weight_decay=0.1) for each in parameters]
    x = torch.randn(2, 4, IN)
    for _ in range(2):
        A, B = stack.factors((0, 1))
        (x @ A.mT @ B.mT).square().sum().backward()
        stack.share_gradients()
        for member, layer in alone.items():
            assert isinstance(layer, LoraLayer)
            (layer.scaling * x[member] @ layer.lora_A.T @ layer.lora_B.T).square().sum().backward()
        for optimizer in optimizers:
            optimizer.step()
        optimizers[1].zero_grad()
        for leaf in stack.leaves.values():
            leaf.grad = None
    for ours, theirs in zip(*parameters, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert not stack.leaves["lora_A"][1, 1:].any()
    assert not stack.leaves["lora_B"][1, 1:].any()


def test_ranks_are_not_mixed_where_that_is_not_allowed() -> None:
    def sizes(own: dict[int, nn.Module | None], padded: object) -> list[tuple[int, ...]]:
        assert isinstance(padded, dict | tuple)
        return [stack.members for stack in stacks_of(own, padded)]

    own = layers(2, 2, 4, 4)
    assert sizes(own, own) == [(0, 1, 2, 3)]
    assert sizes(own, (0, 1)) == [(0, 1), (2, 3)]
    own[1] = None
    assert sizes(own, own) == [(0,), (2, 3)]
    large: dict[int, nn.Module | None] = {
        member: LoraLayer(nn.Linear(4096, 4096, device="meta"), r=r, scaling=1.0)
        for member, r in enumerate((1, 16, 64, 64, 256))
    }
    assert sizes(large, large) == [(0, 1), (2, 3), (4,)]


def test_the_state_of_an_optimizer_is_stored_as_its_parameters_are() -> None:
    own = layers(3, 2)
    parameters = [p for layer in own.values() if layer for p in factors(layer)]
    optimizer = torch.optim.AdamW(parameters)
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    expected = [optimizer.state[p]["exp_avg"].clone() for p in parameters]
    [stack] = stacks_of(own, padded=own)
    assert isinstance(stack, FactorStack)
    match_strides(optimizer)
    for parameter, value in zip(parameters, expected, strict=True):
        found = optimizer.state[parameter]["exp_avg"]
        assert found.stride() == parameter.stride()
        torch.testing.assert_close(found, value, rtol=0, atol=0)


def test_members_with_the_same_batches_share_passes_of_enough_rows() -> None:
    def groups(*batches: int, rows: int | None = LEAST_ROWS // 2) -> list[list[int]]:
        none: Any = None
        parts = {i: Part(none, none, none, own, rows) for i, own in enumerate(batches)}
        return members_of_passes(parts)

    assert groups(0, 0, 1, 1, 1) == [[0, 1], [2, 3, 4]]
    assert groups(0, 0, 1) == [[0, 1, 2]]
    assert groups(0, 1, 2, 3) == [[0, 1], [2, 3]]
    assert groups(0, 0, 1, 1, rows=LEAST_ROWS // 4) == [[0, 1, 2, 3]]
    assert groups(0, 1, rows=None) == [[0, 1]]


def outputs_and_gradients(
    own: dict[int, nn.Module | None], members: tuple[int, ...], staged: bool
) -> list[Tensor]:
    """Of two passes of some ``members``, after a first one of all."""
    stacks = stacks_of(own, padded=own)
    every = (0, 1, 2)
    torch.manual_seed(1)
    found = []
    held: StagedStacks | None = None
    for chosen in (every, members, members):
        x = torch.randn(len(chosen), 4, IN, dtype=torch.bfloat16)
        with held.training(chosen) if held is not None else nullcontext():
            [stack] = [stack for stack in stacks if {*chosen} <= {*stack.members}]
            A, B = (factor.to(x.dtype) for factor in stack.factors(chosen))
            y = x @ A.mT @ B.mT
            y.sum().backward()
        found.append(y.detach())
        if held is None and staged:
            held = StagedStacks(stacks, torch.bfloat16)
    if held is not None:
        held.release()
        assert stacks[0].staged is None
    leaves = stacks[0].leaves.values()
    return [*found, *(leaf.grad for leaf in leaves if leaf.grad is not None)]


@pytest.mark.parametrize("members", [(0, 1, 2), (1, 2)])
@pytest.mark.parametrize("kind", ["lora", "adalora"])
def test_staged_factors_give_the_same_to_the_bit(kind: str, members: tuple[int, ...]) -> None:
    def own() -> dict[int, nn.Module | None]:
        torch.manual_seed(0)
        found: dict[int, nn.Module | None] = {}
        for member, r in enumerate((3, 1, 2)):
            layer_class = AdaLoraLayer if kind == "adalora" else LoraLayer
            found[member] = layer = layer_class(nn.Linear(IN, OUT), r=r, scaling=16 / r)
            for factor in layer.adapter_parameters().values():
                nn.init.normal_(factor)
        return found

    plain, staged = (outputs_and_gradients(own(), members, each) for each in (False, True))
    assert len(plain) == 3 + (3 if kind == "adalora" else 2)
    for one, other in zip(plain, staged, strict=True):
        assert torch.equal(one, other)


def test_the_order_in_memory_does_not_depend_on_other_members() -> None:
    own = layers(3, 3, 2)
    strides = []
    for chosen in ((0, 1), (0, 2), (0,)):
        [stack] = stacks_of({member: own[member] for member in chosen}, padded=own)
        strides.append([parameter.stride() for parameter in factors(own[0] or nn.Identity())])
        assert stack.members[0] == 0
    assert strides[0] == strides[1] == strides[2]
    [stack] = stacks_of({0: own[0], 1: own[1]}, padded=())
    assert factors(own[0] or nn.Identity())[1].is_contiguous()
