"""Cast the factors of all LoRA layers to the model's precision in a few kernels per pass.

Otherwise each layer casts its float32 factors, and its gradients back: in a small model, these are
a third of all kernels. The staged factors are leaves with gradients of their own, which are added
to the float32 ones after the pass: the same numbers, bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.layers import AdapterLayer
from lorakit.methods.adalora_layer import AdaLoraLayer
from lorakit.methods.lora_layer import LoraLayer


class StagedFactors:
    """Half-precision factors of those ``layers`` that compute y = W x + scaling * B A x, or
    AdaLoRA's P Lambda Q x with A = Lambda Q. A pass calls each layer once: the gradients of several
    calls would be added in half precision."""

    def __init__(self, layers: Iterable[AdapterLayer], dtype: torch.dtype) -> None:
        self._layers: list[Any] = [layer for layer in layers if _can_stage(layer)]
        self._groups: list[StagedGroup] = []
        staged: dict[tuple[int, str], Tensor] = {}
        for name in ("lora_A", "lora_B"):
            by_shape: dict[tuple[torch.Size, bool], list[int]] = {}
            for index, layer in enumerate(self._layers):
                scaled = name == "lora_A" and isinstance(layer, AdaLoraLayer)
                by_shape.setdefault((getattr(layer, name).shape, scaled), []).append(index)
            for (_, scaled), indices in by_shape.items():
                members = [self._layers[i] for i in indices]
                scales = [layer.lora_E for layer in members] if scaled else None
                group = StagedGroup([getattr(layer, name) for layer in members], scales, dtype)
                self._groups.append(group)
                staged |= {(i, name): leaf for i, leaf in zip(indices, group.leaves, strict=True)}
        self._pairs = [(staged[i, "lora_A"], staged[i, "lora_B"]) for i in range(len(self._layers))]

    @contextmanager
    def training(self) -> Iterator[None]:
        """A pass and its backward pass run during the block. Outside of it, the layers have their
        float32 factors only: the staged ones are those before the last update."""
        with torch.no_grad():
            for group in self._groups:
                group.refresh()
        for layer, pair in zip(self._layers, self._pairs, strict=True):
            layer.staged = pair
        try:
            yield
        finally:
            for layer in self._layers:
                layer.staged = None
        with torch.no_grad():
            for group in self._groups:
                group.collect()


@contextmanager
def counted_calls(layers: Sequence[nn.Module]) -> Iterator[list[int]]:
    """How often the block calls each of ``layers``; more than once in models that share them."""
    calls = [0] * len(layers)

    def hook(place: int, *_: object) -> None:
        calls[place] += 1

    handles = [each.register_forward_hook(partial(hook, i)) for i, each in enumerate(layers)]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _can_stage(layer: AdapterLayer) -> bool:
    """Other subclasses of ``LoraLayer`` need the factors in float32, as does an embedding: its
    gradient is a sum over all occurrences of a token."""
    if not isinstance(layer, LoraLayer) or type(layer) not in (LoraLayer, AdaLoraLayer):
        return False
    if layer.kind == "embedding":
        return False
    factors = layer.adapter_parameters().values()
    return layer.initial_A is None and all(factor.grad is not None for factor in factors)


class StagedGroup:
    """Factors of equal shape, staged as ``scaling`` * factor, or ``scaling`` * scale * factor with
    one of ``scales``, which are trained too, for each. All of these have gradients already.

    A pass uses each of the ``leaves`` once and computes its gradient anew: adding it to zeros would
    take a kernel for each."""

    def __init__(
        self,
        factors: Sequence[Tensor],
        scales: Sequence[Tensor] | None,
        dtype: torch.dtype,
        scaling: float | Tensor = 1.0,
    ) -> None:
        self._factors, self._scales, self._scaling = list(factors), scales, scaling
        shape = (len(factors), *factors[0].shape)
        self._staged = torch.empty(shape, dtype=dtype, device=factors[0].device)
        self.leaves = [part.detach().requires_grad_() for part in self._staged.unbind(0)]

    def refresh(self) -> None:
        values = torch.stack(self._factors)
        if self._scales is not None:
            values = values * torch.stack(list(self._scales))
        self._staged.copy_(self._scaled(values))
        for leaf in self.leaves:
            leaf.grad = None

    def collect(self) -> None:
        found = [torch.zeros_like(x) if x.grad is None else x.grad for x in self.leaves]
        gradients = self._scaled(torch.stack(found).float())
        if self._scales is not None:
            by_scale = (gradients * torch.stack(self._factors)).sum(-1, keepdim=True)
            _add_to_gradients(self._scales, by_scale)
            gradients = gradients * torch.stack(list(self._scales))
        _add_to_gradients(self._factors, gradients)

    def _scaled(self, values: Tensor) -> Tensor:
        is_one = isinstance(self._scaling, float) and self._scaling == 1
        return values if is_one else values * self._scaling


def _add_to_gradients(tensors: Sequence[Tensor], gradients: Tensor) -> None:
    into: list[Any] = [tensor.grad for tensor in tensors]
    torch._foreach_add_(into, list(gradients.unbind(0)))
