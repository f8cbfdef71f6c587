"""The modules of the shared model: those of each member by itself."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorakit.methods.lora_layer import LoraLayer
from lorakit.training.joint.bank import stacks_of
from lorakit.training.joint.layers import Current, JointLayer
from lorakit.training.joint.layout import Layout

MEMBERS, ROWS, LENGTH, IN, OUT = 3, 2, 4, 6, 5


class OwnLinear(nn.Linear):
    """What is computed by its own code, such as a quantized layer."""


class ViewLinear(nn.Linear):
    """Outputs a view, as transformers' Conv1D does."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).view(*input.shape[:-1], OUT)


BASES = {"own": OwnLinear, "view": ViewLinear}


def base_of(kind: str) -> nn.Module:
    torch.manual_seed(0)
    base = BASES.get(kind, nn.Linear)(IN, OUT)
    if kind == "hooked":
        base.register_forward_hook(lambda module, args, output: 2 * output)
    return base.requires_grad_(False)


def joint_layer(base: nn.Module, dropout: float) -> JointLayer:
    """Members of two ranks, and one that does not adapt the layer."""
    own: dict[int, nn.Module | None] = {1: None}
    for member, r in ((0, 3), (2, 2)):
        own[member] = layer = LoraLayer(base, r=r, scaling=r / 2, dropout=dropout)
        nn.init.normal_(layer.lora_A)
        nn.init.normal_(layer.lora_B)
    layout = Layout(((ROWS, LENGTH),) * MEMBERS, ROWS, LENGTH)
    joint = JointLayer(base, own, Current((0, 1, 2), layout))
    joint.stacks = stacks_of({member: own[member] for member in range(MEMBERS)}, padded=own)
    return joint


def graph(tensor: Tensor) -> Iterator[str]:
    """The names of the operators that a tensor was computed with."""
    left: list[Any] = [tensor.grad_fn]
    while left:
        node = left.pop()
        if node is not None:
            yield node.name()
            left += [each for each, _ in node.next_functions]


@pytest.mark.parametrize("dropout", [0.0, 1e-9])
@pytest.mark.parametrize("kind", ["plain", "own", "view", "hooked"])
def test_a_layer_computes_what_those_of_the_members_do(kind: str, dropout: float) -> None:
    base = base_of(kind)
    joint = joint_layer(base, dropout)
    x = torch.randn(MEMBERS * ROWS, LENGTH, IN, requires_grad=True)
    y = joint(x)
    upstream = torch.randn_like(y)
    [dx] = torch.autograd.grad((y * upstream).sum(), x)
    for member in range(MEMBERS):
        own = x.detach()[member * ROWS : (member + 1) * ROWS].requires_grad_()
        expected = (joint.own[member] or base)(own)
        part = slice(member * ROWS, (member + 1) * ROWS)
        torch.testing.assert_close(y[part], expected)
        [gradient] = torch.autograd.grad((expected * upstream[part]).sum(), own)
        torch.testing.assert_close(dx[part], gradient)


@pytest.mark.parametrize("kind", ["plain", "own", "view"])
def test_gradients_of_outputs_are_not_copied(kind: str) -> None:
    """Autograd copies that of a view that is written to, several times."""
    x = torch.randn(MEMBERS * ROWS, LENGTH, IN, requires_grad=True)
    names = list(graph(joint_layer(base_of(kind), dropout=0.0)(x)))
    assert any("JointLora" in name for name in names)
    assert not any("CopySlices" in name for name in names)
