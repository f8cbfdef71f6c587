"""The layer of training in a random subspace."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lorakit.base_weight import version_of
from lorakit.kernels.fastfood import project
from lorakit.layers import AdapterLayer


@dataclass
class _Count:
    value: int = 0


class IntrinsicLayer(AdapterLayer):
    """y = (W + reshape(P theta)) x + b, with ``theta`` (d,) shared by all layers of the model.

    ``projection_seed`` and ``stream``, the number of the matrix in the model, determine P
    (out * in, d).
    """

    def __init__(
        self, base_layer: nn.Module, theta: Tensor, seed: int, stream: int | None = None
    ) -> None:
        super().__init__(base_layer)
        device = theta.device if self.is_meta else self.device
        with torch.inference_mode(False):  # else writing to it would not change its version
            self.theta = nn.Parameter(theta.to(device, torch.float32, copy=True))
        self.projection_seed = seed
        self.stream = stream
        self._training_passes = _Count()
        self._cached: tuple[Hashable, Tensor] | None = None

    def share(self, first: IntrinsicLayer, stream: int) -> None:
        """Use the theta of ``first``, and ``stream`` as the matrix's number if it has none yet."""
        self.theta, self._training_passes = first.theta, first._training_passes
        self.stream = stream if self.stream is None else self.stream

    def update(self, x: Tensor, y: Tensor) -> Tensor:
        """y + x (P theta)^T in ``y``'s dtype, P theta itself in float32."""
        return y.addmm_(x.to(y.dtype), self._cast_delta(y.dtype).t())

    def train(self, mode: bool = True) -> IntrinsicLayer:
        """Drop the cached update after training: steps that are replayed change theta unseen."""
        if mode != self.training:
            self._cached = None
        return super().train(mode)

    def delta_weight(self) -> Tensor:
        """reshape(P theta), float32 (out, in)."""
        assert self.stream is not None, "layers are linked before they compute"
        size = self.out_features * self.in_features
        flat = project(self.theta, size, self.projection_seed, self.stream)
        delta: Tensor = flat.view(self.base_shape)
        return delta

    def _cast_delta(self, dtype: torch.dtype) -> Tensor:
        """The update in ``dtype``. If theta gets no gradient, it is cached until theta may have
        changed: during generation, computing P theta would take longer than a token."""
        theta = self.theta
        trains = torch.is_grad_enabled() and theta.requires_grad
        if trains or torch.compiler.is_compiling():
            # Fused optimizers change theta without changing its version.
            self._training_passes.value += 1
            self._cached = None
            return self.delta_weight().to(dtype)
        state = version_of(theta), dtype, self._training_passes.value
        if self._cached is None or self._cached[0] != state:
            with torch.inference_mode(False), torch.no_grad():
                self._cached = state, self.delta_weight().to(dtype)
        return self._cached[1]
