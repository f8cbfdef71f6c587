"""The parameters of the members, stacked in memory.

A batched product needs the factors of several members as one tensor. Here they are always stored as
one: each member's parameters, and their gradients, are views of it, so that nothing is copied in a
step, and the members' optimizers do not notice. Factors of several ranks are padded with zeros,
whose gradients are exactly zero.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.kernels.joint_low_rank import Factors
from lorakit.methods.adalora_layer import AdaLoraLayer
from lorakit.methods.lora_layer import LoraLayer

#: Products of lower ranks take as long as those of this one.
_TILE = 16
#: Products of this many elements of factors take hardly longer than their launches.
_PADDED_ELEMENTS = 2**20


def can_stack(layer: nn.Module | None) -> bool:
    """Whether the layer adds scaling * B A dropout(x), or AdaLoRA's with A = Lambda Q, with factors
    that are all trained."""
    if not isinstance(layer, LoraLayer) or type(layer) not in (LoraLayer, AdaLoraLayer):
        return False
    trained = all(factor.requires_grad for factor in layer.adapter_parameters().values())
    return trained and layer.initial_A is None and layer.kind != "embedding"


class Stack:
    """Parameters of one module of ``members``, by name.

    A leaf is (members, n, ...), where parameters that have fewer than the largest n are followed by
    zeros. Those stay zero if the gradient of zeros is: that of a factor's is as long as the other
    factor's are zeros too.
    """

    def __init__(self, own: Mapping[int, Mapping[str, nn.Parameter]]) -> None:
        self.members = tuple(own)
        self._own = list(own.values())
        self._shared: dict[str, Tensor | None] = {}
        self._transposed = self._names_to_transpose()
        self.leaves = {name: self._stacked(name) for name in self._own[0]}

    def _names_to_transpose(self) -> set[str]:
        return set()

    def _stacked(self, name: str) -> Tensor:
        values = [self._oriented(name, own[name].data) for own in self._own]
        leaf = values[0].new_zeros(len(values), max(map(len, values)), *values[0].shape[1:])
        for own, value, place in zip(self._own, values, leaf.unbind(0), strict=True):
            view = place[: len(value)].copy_(value)
            own[name].data, own[name].grad = self._oriented(name, view), None
        return leaf.requires_grad_()

    def _oriented(self, name: str, value: Tensor) -> Tensor:
        return value.mT if name in self._transposed else value

    def parameters(self) -> list[nn.Parameter]:
        """The members' own, which are views of the leaves."""
        return [own[name] for name in self.leaves for own in self._own]

    def of(self, members: Sequence[int], leaf: Tensor) -> Tensor:
        """The part of ``leaf`` of some members, in order."""
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
            for place, own in enumerate(self._own):
                parameter, gradient = own[name], None
                if leaf.grad is not None:
                    count = len(self._oriented(name, parameter))
                    gradient = self._oriented(name, leaf.grad[place, :count])
                parameter.grad = gradient


class FactorStack(Stack):
    """The factors of layers of one class."""

    def __init__(self, layers: Mapping[int, LoraLayer]) -> None:
        self._ranks = {layer.r for layer in layers.values()}
        super().__init__({m: layer.adapter_parameters() for m, layer in layers.items()})
        self._scaling: float | Tensor = _shared_value([x.scaling for x in layers.values()])
        if isinstance(self._scaling, Tensor):
            self._scaling = self._scaling.view(-1, 1, 1).to(self.leaves["lora_A"].device)

    def _names_to_transpose(self) -> set[str]:
        """B (out, r) is stored as (r, out) if ranks differ, so that each member's own is dense."""
        return {"lora_B"} if len(self._ranks) > 1 else set()

    def factors(self, members: Sequence[int]) -> Factors:
        """scaling * A (members, r, in) and B (members, out, r) of some members, in order."""
        A, B = (self.of(members, self.leaves[name]) for name in ("lora_A", "lora_B"))
        if "lora_E" in self.leaves:
            A = A * self.of(members, self.leaves["lora_E"])
        if isinstance(self._scaling, Tensor):
            A = A * self.of(members, self._scaling)
        elif self._scaling != 1:
            A = A * self._scaling
        return A, self._oriented("lora_B", B)


def _shared_value(values: Sequence[float]) -> float | Tensor:
    return torch.tensor(values) if len({*values}) > 1 else float(values[0])


def stacks_of(layers: Mapping[int, nn.Module | None], padded: Collection[int]) -> list[FactorStack]:
    """Stack the factors of one module; ``layers`` are those of all members, in their order. Only
    those of ``padded`` members may be stacked with others of a higher rank."""
    groups: list[dict[int, LoraLayer]] = []
    before: int | None = None
    for member, layer in layers.items():
        if not isinstance(layer, LoraLayer) or not can_stack(layer):
            before = None
            continue
        if before is None or not _fits(groups[-1], layer, {before, member} <= {*padded}):
            groups.append({})
        groups[-1][member] = layer
        before = member
    return [FactorStack(group) for group in groups]


def _fits(group: Mapping[int, LoraLayer], layer: LoraLayer, padded: bool) -> bool:
    """Whether the factors of ``layer`` can follow those of ``group`` in a stack."""
    ranks = {layer.r, *(other.r for other in group.values())}
    if any(type(other) is not type(layer) for other in group.values()):
        return False
    elements = (len(group) + 1) * max(ranks) * (layer.in_features + layer.out_features)
    return len(ranks) == 1 or (padded and (max(ranks) <= _TILE or elements <= _PADDED_ELEMENTS))


def match_strides(optimizer: Any) -> None:
    """Store the optimizer's state in the order in which its parameters are stored, as fused
    optimizers need it; a checkpoint has it in another."""
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            same = isinstance(value, Tensor) and value.shape == parameter.shape
            if same and value.dtype == parameter.dtype and value.stride() != parameter.stride():
                state[key] = torch.empty_like(parameter.data).copy_(value)


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
