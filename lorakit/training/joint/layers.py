"""The modules of the shared model in which members differ: adapted and fully trained ones."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorakit.kernels.joint_low_rank import Run, joint_lora_add_
from lorakit.layers import AdapterLayer
from lorakit.methods.lora_layer import LoraLayer
from lorakit.training.joint.layout import Layout
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


class JointLayer(nn.Module):
    """The outputs of the members' adapter layers, whose base runs once on the rows of all.

    ``own`` has a layer for each member that adapts the module, or else None. Members whose layers
    add scaling * B A x are computed as batched products, one for each group of neighbors with the
    same rank; others by their own ``update``.
    """

    def __init__(
        self, base_layer: nn.Module, own: Mapping[int, nn.Module | None], current: Current
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.own = dict(own)
        self._current = current

    @property
    def weight(self) -> Any:
        return self.base_layer.weight

    @property
    def bias(self) -> Any:
        return self.base_layer.bias

    def forward(self, x: Tensor) -> Tensor:
        count = len(self._current.members)
        flat = x.reshape(-1, x.shape[-1])
        y: Tensor = self.base_layer(flat)
        out = self._adapted(flat.view(count, -1, flat.shape[1]), y.view(count, -1, y.shape[1]))
        return out.view(*x.shape[:-1], y.shape[1])

    def _adapted(self, x: Tensor, y: Tensor) -> Tensor:
        """``x`` (members, n, in) and ``y`` (members, n, out), which is overwritten."""
        layers: list[Any] = [self.own[member] for member in self._current.members]
        if batched := [layer if is_batched(layer) else None for layer in layers]:
            y = self._batched(batched, x, y)
        if all(layer is None or is_batched(layer) for layer in layers):
            return y
        parts = list(y.unbind(0))
        for place, layer in enumerate(layers):
            if layer is not None and not is_batched(layer):
                with self._current.only(place):
                    parts[place] = layer.update(x[place], parts[place].clone())
        return torch.stack(parts)

    def _batched(self, layers: Sequence[LoraLayer | None], x: Tensor, y: Tensor) -> Tensor:
        pairs = [None if layer is None else layer.factors() for layer in layers]
        ranks = [0 if pair is None else len(pair[0]) for pair in pairs]
        runs, factors, start = [], [], 0
        for rank, group in groupby(ranks):
            stop = start + len(list(group))
            if rank:
                chosen: list[Any] = list(pairs[start:stop])
                stacked = tuple(torch.stack([pair[i] for pair in chosen]) for i in (0, 1))
                scaling = [layer.scaling for layer in layers[start:stop] if layer is not None]
                runs.append(Run(start, stop, _scaling(scaling, y)))
                factors.append((stacked[0], stacked[1]))
            start = stop
        return joint_lora_add_(y, self._dropped(layers, x), runs, factors) if runs else y

    def _dropped(self, layers: Sequence[LoraLayer | None], x: Tensor) -> Tensor:
        """``x`` with the dropout of each layer."""
        rates = [0.0 if layer is None else layer.lora_dropout.p for layer in layers]
        if not any(rates):
            return x
        if self._current.dropout is None and len({*rates}) == 1:
            return F.dropout(x, rates[0])
        parts = list(x.unbind(0))
        for place, rate in enumerate(rates):
            if rate:
                with self._current.only(place):
                    parts[place] = F.dropout(parts[place], rate)
        return torch.stack(parts)


def is_batched(layer: nn.Module | None) -> bool:
    """Whether the layer adds scaling * B A dropout(x), with the A and B of ``factors``."""
    return isinstance(layer, LoraLayer) and type(layer).update is LoraLayer.update


def shares_base(layer: nn.Module | None) -> bool:
    """Whether the layer's output follows from its input and from the output of its base."""
    if layer is None:
        return True
    if not isinstance(layer, AdapterLayer) or layer.kind == "embedding":
        return False
    return type(layer).forward in (AdapterLayer.forward, LoraLayer.forward)


def _scaling(values: Sequence[float], like: Tensor) -> float | Tensor:
    if len({*values}) == 1:
        return float(values[0])
    on_host = torch.tensor(values, dtype=like.dtype)
    return on_host.to(like.device, non_blocking=True).view(-1, 1, 1)


def _joined(outputs: Sequence[Any], dim: int) -> Any:
    first = outputs[0]
    if isinstance(first, tuple):
        return tuple(_joined(each, dim) for each in zip(*outputs, strict=True))
    if not isinstance(first, Tensor):
        return first
    width = max(output.shape[-1] for output in outputs)  # heads may have several numbers of outputs
    return torch.cat([F.pad(each, (0, width - each.shape[-1])) for each in outputs], dim)
