"""The modules of the shared model in which members differ: adapted and fully trained ones."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorakit.kernels.joint_low_rank import Factors, joint_lora_add_, joint_lora_linear
from lorakit.layers import AdapterLayer, CompositeLayer
from lorakit.methods.lora_layer import LoraLayer
from lorakit.models.master_weights import cast_inputs
from lorakit.training.joint.bank import FactorStack, Stack
from lorakit.training.joint.layout import Layout, NotSplit
from lorakit.training.joint.member_random import MemberDropout


@dataclass
class Current:
    """What the modules need to know of the pass that runs: its ``members``, in the order of their
    rows, and how they draw random numbers; ``dropout`` is None if all draw from one generator."""

    members: tuple[int, ...] = ()
    layout: Layout = field(default_factory=lambda: Layout((), 0, 0))
    dropout: MemberDropout | None = None

    @contextmanager
    def only(self, place: int) -> Iterator[None]:
        """One member's module runs during the block."""
        with nullcontext() if self.dropout is None else self.dropout.only(place):
            yield


class OwnModules(nn.Module):
    """Calls each member's own module on its part of the inputs, for what members do not share."""

    def __init__(self, modules: Mapping[int, nn.Module], current: Current) -> None:
        super().__init__()
        # Not registered: they belong to the members' models.
        self.own = dict(modules)
        self._current = current

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        layout = self._current.layout
        values = [*args, *kwargs.values()]
        dims = [layout.split_dim(v) if isinstance(v, Tensor) else None for v in values]
        if all(dim is None for dim in dims) and len(layout.shapes) > 1:
            raise NotSplit
        parts = [
            [value] * len(layout.shapes) if dim is None else layout.chunks(value, dim)
            for value, dim in zip(values, dims, strict=True)
        ]
        outputs = []
        for place, member in enumerate(self._current.members):
            module = self.own[member]
            own = [each[place] for each in parts]
            with self._current.only(place):
                outputs.append(
                    module(*own[: len(args)], **dict(zip(kwargs, own[len(args) :], strict=True)))
                )
        return _joined(outputs, next((dim for dim in dims if dim is not None), 0))


class JointLinear(nn.Module):
    """The outputs of a linear layer that each member trains whole, as one batched product. The
    numbers of outputs may differ; those that a member lacks are zero."""

    def __init__(self, modules: Mapping[int, nn.Module], current: Current) -> None:
        super().__init__()
        self.own = dict(modules)
        self._current = current
        self._stack: Stack | None = None

    def stack(self) -> Stack:
        """Stack the weights of the members anew."""
        self._stack = Stack({m: dict(module.named_parameters()) for m, module in self.own.items()})
        return self._stack

    def forward(self, x: Tensor) -> Tensor:
        members, stack = self._current.members, self._stack
        assert stack is not None, "a pass follows stack()"
        if len(members) > 1 and self._current.layout.split_dim(x) is None:
            raise NotSplit
        weight = stack.of(members, stack.leaves["weight"])
        rows = x.reshape(len(members), -1, x.shape[-1]).to(weight.dtype)
        y = torch.bmm(rows, weight.mT)
        if "bias" in stack.leaves:
            y = y + stack.of(members, stack.leaves["bias"]).unsqueeze(1)
        return y.view(*x.shape[:-1], -1)


def is_plain_linear(module: nn.Module) -> bool:
    """Whether the module is a linear layer that is trained in float32 and outputs it."""
    hooks = [hook for hook in module._forward_pre_hooks.values() if hook is not cast_inputs]
    return (
        type(module) is nn.Linear
        and all(p.requires_grad and p.dtype == torch.float32 for p in module.parameters())
        and not (hooks or module._forward_hooks)
    )


class JointLayer(nn.Module):
    """The outputs of the members' adapter layers, whose base runs once on the rows of all.

    ``own`` has a layer for each member that adapts the module, or else None. Members whose factors
    are in ``stacks`` are computed as batched products; others by their own ``update``.
    """

    def __init__(
        self, base_layer: nn.Module, own: Mapping[int, nn.Module | None], current: Current
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.own = dict(own)
        self.stacks: list[FactorStack] = []
        self._current = current

    @property
    def stacked(self) -> set[int]:
        """The members whose factors are stacked."""
        return {member for stack in self.stacks for member in stack.members}

    @property
    def weight(self) -> Any:
        return self.base_layer.weight

    @property
    def bias(self) -> Any:
        return self.base_layer.bias

    def forward(self, x: Tensor) -> Tensor:
        count = len(self._current.members)
        if count > 1 and self._current.layout.split_dim(x) is None:
            raise NotSplit
        y = self._adapted(x.reshape(count, -1, x.shape[-1]))
        return y.view(*x.shape[:-1], y.shape[-1])

    def _adapted(self, x: Tensor) -> Tensor:
        """The outputs for ``x`` (members, n, in)."""
        members = self._current.members
        stacked: set[int] = set()
        runs, factors = [], []
        for stack in self.stacks:
            if chosen := [member for member in stack.members if member in members]:
                start = members.index(chosen[0])
                runs.append(slice(start, start + len(chosen)))
                factors.append(stack.factors(chosen))
                stacked |= {*chosen}
        y = self._stacked_outputs(x, stacked, runs, factors)
        rest: dict[int, Any] = {m: self.own[m] for m in members if m not in stacked}
        if all(layer is None for layer in rest.values()):
            return y
        parts = list(y.view(len(members), -1, y.shape[-1]).unbind(0))
        for place, member in enumerate(members):
            if (layer := rest.get(member)) is not None:
                with self._current.only(place):
                    parts[place] = layer.update(x[place], parts[place].clone())
        return torch.stack(parts)

    def _stacked_outputs(
        self, x: Tensor, stacked: set[int], runs: list[slice], factors: list[Factors]
    ) -> Tensor:
        """The base's outputs and the updates of the members that are ``stacked``."""
        dropped = self._dropped(stacked, x)
        base: Any = self.base_layer
        if runs and dropped is x and _is_frozen_linear(base, x):
            return joint_lora_linear(x, base.weight, base.bias, runs, factors)
        y: Tensor = base(x.flatten(0, 1))
        if not runs:
            return y
        return joint_lora_add_(y.clone() if y._is_view() else y, dropped, runs, factors)

    def _dropped(self, stacked: set[int], x: Tensor) -> Tensor:
        """``x`` with the dropout of the layers of ``stacked``."""
        layers: list[Any] = [self.own[m] if m in stacked else None for m in self._current.members]
        rates = [0.0 if layer is None else layer.lora_dropout.p for layer in layers]
        if not self.training or not any(rates):
            return x
        if self._current.dropout is None and len({*rates}) == 1:
            return F.dropout(x, rates[0])
        parts = list(x.unbind(0))
        for place, rate in enumerate(rates):
            if rate:
                with self._current.only(place):
                    parts[place] = F.dropout(parts[place], rate)
        return torch.stack(parts)


def _is_frozen_linear(layer: Any, x: Tensor) -> bool:
    """Whether the layer computes W x + b of a frozen W in the dtype of ``x``, and nothing else."""
    return (
        type(layer) is nn.Linear
        and not any(p.requires_grad or p.dtype != x.dtype for p in layer.parameters())
        and not (layer._forward_pre_hooks or layer._forward_hooks)
        and not torch.is_autocast_enabled(x.device.type)
    )


def shares_base(layer: nn.Module | None) -> bool:
    """Whether the layer's output follows from its input and from the output of its base."""
    if layer is None or type(layer) is CompositeLayer:
        return True
    if not isinstance(layer, AdapterLayer) or layer.kind == "embedding":
        return False
    return type(layer).forward in (AdapterLayer.forward, LoraLayer.forward)


def _joined(outputs: Sequence[Any], dim: int) -> Any:
    first = outputs[0]
    if isinstance(first, tuple):
        return tuple(_joined(each, dim) for each in zip(*outputs, strict=True))
    if not isinstance(first, Tensor):
        return first
    width = max(output.shape[-1] for output in outputs)  # heads may have several numbers of outputs
    return torch.cat([F.pad(each, (0, width - each.shape[-1])) for each in outputs], dim)
