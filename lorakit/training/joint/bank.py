"""The factors of the members' low-rank updates, stacked in memory.

A batched product needs the factors of several members as one tensor. Here they are always stored as
one: each member's parameters, and their gradients, are views of it, so that nothing is copied in a
step, and the members' optimizers do not notice.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.methods.adalora_layer import AdaLoraLayer
from lorakit.methods.lora_layer import LoraLayer


def can_stack(layer: nn.Module | None) -> bool:
    """Whether the layer adds scaling * B A dropout(x), or AdaLoRA's with A = Lambda Q, with factors
    that are all trained."""
    if not isinstance(layer, LoraLayer) or type(layer) not in (LoraLayer, AdaLoraLayer):
        return False
    trained = all(factor.requires_grad for factor in layer.adapter_parameters().values())
    return trained and layer.initial_A is None and layer.kind != "embedding"


class Stack:
    """The factors of one module of neighboring ``members`` with layers of one class and rank."""

    def __init__(self, layers: Mapping[int, LoraLayer]) -> None:
        self.members = tuple(layers)
        self._layers = list(layers.values())
        self.rank = self._layers[0].r
        self.leaves = {name: self._stacked(name) for name in self._layers[0].adapter_parameters()}
        self._shared: dict[str, Tensor | None] = {}
        values = [layer.scaling for layer in self._layers]
        self._scaling: float | Tensor = float(values[0])
        if len({*values}) > 1:
            self._scaling = torch.tensor(values, device=self._layers[0].device).view(-1, 1, 1)

    def _stacked(self, name: str) -> Tensor:
        own = [getattr(layer, name) for layer in self._layers]
        leaf = torch.stack([parameter.data for parameter in own])
        for parameter, value in zip(own, leaf.unbind(0), strict=True):
            parameter.data, parameter.grad = value, None
        return leaf.requires_grad_()

    def parameters(self) -> list[nn.Parameter]:
        """The members' own, which are views of the leaves."""
        return [getattr(layer, name) for name in self.leaves for layer in self._layers]

    def factors(self, members: Sequence[int]) -> tuple[Tensor, Tensor, float | Tensor]:
        """A (members, r, in), B (members, out, r) and the scaling of some members, in order."""
        A, B = (self._of(members, self.leaves[name]) for name in ("lora_A", "lora_B"))
        if "lora_E" in self.leaves:
            A = A * self._of(members, self.leaves["lora_E"])
        scaling = self._scaling
        return A, B, self._of(members, scaling) if isinstance(scaling, Tensor) else scaling

    def _of(self, members: Sequence[int], leaf: Tensor) -> Tensor:
        if len(members) == len(self.members):
            return leaf
        places = [self.members.index(member) for member in members]
        if places[-1] - places[0] + 1 == len(places):
            return leaf[places[0] : places[-1] + 1]
        return torch.stack([leaf[place] for place in places])

    def share_gradients(self) -> None:
        """Let the gradients of the members' parameters be views of the stacked ones."""
        for name, leaf in self.leaves.items():
            if leaf.grad is not None and leaf.grad is self._shared.get(name):
                continue  # cleared in place: the views are still there
            self._shared[name] = leaf.grad
            none = [None] * len(self._layers)
            gradients = none if leaf.grad is None else leaf.grad.unbind(0)
            for layer, gradient in zip(self._layers, gradients, strict=True):
                getattr(layer, name).grad = gradient


def stacks_of(layers: Mapping[int, nn.Module | None]) -> list[Stack]:
    """Stack the factors of one module; ``layers`` are those of all members, in their order."""

    def key(member: int) -> Any:
        layer = layers[member]
        return (type(layer), layer.r) if isinstance(layer, LoraLayer) and can_stack(layer) else None

    found = []
    for kind, members in groupby(layers, key):
        if kind is not None:
            own: Any = {member: layers[member] for member in members}
            found.append(Stack(own))
    return found


class Gradients:
    """The gradients of all members, which are cleared together: those of ``stacks``, and those of
    other trained ``parameters``."""

    def __init__(self, stacks: Iterable[Stack], parameters: Iterable[nn.Parameter]) -> None:
        self._stacks, self._others = list(stacks), list(parameters)

    def share(self) -> None:
        """After the passes of a step: show the members their gradients."""
        for stack in self._stacks:
            stack.share_gradients()

    def clear(self, in_place: bool) -> None:
        """Forget them; with ``in_place``, by zeros in the same memory."""
        leaves = [leaf for stack in self._stacks for leaf in stack.leaves.values()]
        found = [p.grad for p in (*leaves, *self._others) if p.grad is not None]
        if in_place and found:
            torch._foreach_zero_(found)
            return
        for tensor in (*leaves, *self._others):
            tensor.grad = None
