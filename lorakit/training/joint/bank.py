"""The parameters of the members, stacked in memory.

A batched product needs the factors of several members as one tensor. Here they are always stored as
one: each member's parameters, and their gradients, are views of it, so that nothing is copied in a
step, and the members' optimizers do not notice. Factors of several ranks are padded with zeros,
whose gradients are exactly zero.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.kernels.joint_low_rank import Factors
from lorakit.methods.adalora_layer import AdaLoraLayer
from lorakit.methods.lora_layer import LoraLayer
from lorakit.training.engine.staging import StagedGroup

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
    zeros. The padding stays zero as long as its gradient is zero. For a factor this holds because
    the matching padding of the other factor is zero as well. Matrices with the names ``transposed``
    are stored that way.
    """

    def __init__(
        self, own: Mapping[int, Mapping[str, nn.Parameter]], transposed: Collection[str] = ()
    ) -> None:
        self.members = tuple(own)
        self._own = list(own.values())
        self._shared: dict[str, Tensor | None] = {}
        self._transposed = transposed
        self.leaves = {name: self._stacked(name) for name in self._own[0]}

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
    """The factors of layers of one class. With ``transposed``, B (out, r) is stored as (r, out), so
    that each member's own is dense although ranks differ. ``staged`` are those of ``factors`` for
    the pass that runs, see ``StagedStacks``."""

    staged: Factors | None = None

    def __init__(self, layers: Mapping[int, LoraLayer], transposed: bool) -> None:
        own = {member: layer.adapter_parameters() for member, layer in layers.items()}
        super().__init__(own, ("lora_B",) if transposed else ())
        self.scaling: float | Tensor = _shared_value([x.scaling for x in layers.values()])
        if isinstance(self.scaling, Tensor):
            self.scaling = self.scaling.view(-1, 1, 1).to(self.leaves["lora_A"].device)

    def factors(self, members: Sequence[int]) -> Factors:
        """scaling * A (members, r, in) and B (members, out, r) of some members, in order."""
        if self.staged is not None and torch.is_grad_enabled():
            A, B = (self.of(members, leaf) for leaf in self.staged)
            return A, self._oriented("lora_B", B)
        A, B = (self.of(members, self.leaves[name]) for name in ("lora_A", "lora_B"))
        if "lora_E" in self.leaves:
            A = A * self.of(members, self.leaves["lora_E"])
        if isinstance(self.scaling, Tensor):
            A = A * self.of(members, self.scaling)
        elif self.scaling != 1:
            A = A * self.scaling
        return A, self._oriented("lora_B", B)


class StagedStacks:
    """Casts the factors of ``stacks`` to ``dtype`` in a few kernels per pass, as ``StagedFactors``
    does for a single run. A pass uses each stack once. Those without gradients yet are left out.
    """

    def __init__(self, stacks: Iterable[FactorStack], dtype: torch.dtype) -> None:
        alike: dict[tuple[object, ...], list[FactorStack]] = {}
        for stack in stacks:
            if all(leaf.grad is not None for leaf in stack.leaves.values()):
                scaling = stack.scaling
                values = scaling.flatten().tolist() if isinstance(scaling, Tensor) else [scaling]
                shapes = {name: leaf.shape for name, leaf in stack.leaves.items()}
                key = (stack.members, *values, *shapes.items())
                alike.setdefault(key, []).append(stack)
        self._stacks = [stack for group in alike.values() for stack in group]
        self._groups: list[tuple[set[int], StagedGroup]] = []
        for group in alike.values():
            A, B = ([stack.leaves[name] for stack in group] for name in ("lora_A", "lora_B"))
            has_scales = "lora_E" in group[0].leaves
            scales = [stack.leaves["lora_E"] for stack in group] if has_scales else None
            staged_A = StagedGroup(A, scales, dtype, group[0].scaling)
            staged_B = StagedGroup(B, None, dtype)
            self._groups += [({*group[0].members}, each) for each in (staged_A, staged_B)]
            for stack, *leaves in zip(group, staged_A.leaves, staged_B.leaves, strict=True):
                stack.staged = leaves[0], leaves[1]

    def release(self) -> None:
        """Let the stacks cast their factors themselves."""
        for stack in self._stacks:
            stack.staged = None

    @contextmanager
    def training(self, members: Collection[int]) -> Iterator[None]:
        """A pass of ``members`` and its backward pass run during the block."""
        groups = [each for own, each in self._groups if not own.isdisjoint(members)]
        with torch.no_grad():
            for group in groups:
                group.refresh()
        yield
        with torch.no_grad():
            for group in groups:
                group.collect()


def _shared_value(values: Sequence[float]) -> float | Tensor:
    return torch.tensor(values) if len({*values}) > 1 else float(values[0])


def stacks_of(layers: Mapping[int, nn.Module | None], padded: Collection[int]) -> list[FactorStack]:
    """Stack the factors of one module; ``layers`` are those of all members, in their order. Only
    those of ``padded`` members may be stored transposed, and stacked with others of a higher rank.
    """
    groups: list[dict[int, LoraLayer]] = []
    before: int | None = None
    for member, layer in layers.items():
        if not isinstance(layer, LoraLayer) or not can_stack(layer):
            before = None
            continue
        alike = before is not None and (before in padded) == (member in padded)
        if not alike or not _fits(groups[-1], layer, member in padded):
            groups.append({})
        groups[-1][member] = layer
        before = member
    # For any rank: the order in memory of a member's weights, in which norms are summed, must not
    # depend on the other members.
    return [FactorStack(group, transposed=next(iter(group)) in padded) for group in groups]


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
