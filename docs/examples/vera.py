"""VeRA: random matrices shared by all layers, scaled by two trained vectors in each.

Kopiczko et al. 2024 (arXiv 2310.11454, section 3.1):

    y = W x + b + diag(b) B diag(d) A x

W (out, in) is frozen. A (r, in) and B (out, r) are random, frozen and shared: the first columns
of one A and the first rows of one B, which are as large as the largest layer. d (r,) and b (out,)
are trained. Keys and parameters have PEFT's names, so that PEFT loads the adapter as ``VERA``; A
and B are saved with it (``save_projection``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorakit.layers import AdapterLayer
from lorakit.methods.base import Method
from lorakit.recipe.sections import AdapterSection, PositiveFloat, Rank, Seed


class VeraConfig(AdapterSection):
    """``projection_prng_key`` is the seed of A and B, ``d_initial`` the initial value of d."""

    r: Rank = 256
    projection_prng_key: Seed = 0
    d_initial: PositiveFloat = 0.1
    save_projection: Literal[True] = True


class VeraLayer(AdapterLayer):
    """b starts at zero, which leaves the output unchanged."""

    def __init__(self, base_layer: nn.Module, config: VeraConfig, name: str) -> None:
        super().__init__(base_layer, r=config.r)
        self.seed = config.projection_prng_key
        self.vera_lambda_d = self.new_parameter(config.r)
        self.vera_lambda_b = self.new_parameter(self.out_features)
        nn.init.constant_(self.vera_lambda_d, config.d_initial)
        nn.init.zeros_(self.vera_lambda_b)
        self.vera_A: nn.Parameter | None = None
        self.vera_B: nn.Parameter | None = None

    def factors(self) -> tuple[Tensor, Tensor]:
        """diag(d) A (r, in) and diag(b) B (out, r)."""
        assert self.vera_A is not None and self.vera_B is not None
        A, B = self.vera_A[:, : self.in_features], self.vera_B[: self.out_features]
        return self.vera_lambda_d[:, None] * A, self.vera_lambda_b[:, None] * B

    def update(self, x: Tensor, y: Tensor) -> Tensor:
        A, B = (factor.to(y.dtype) for factor in self.factors())
        return y + F.linear(F.linear(x.to(y.dtype), A), B)

    def delta_weight(self) -> Tensor:
        A, B = self.factors()
        return B @ A


class Vera(Method):
    summary = "W + diag(b) B diag(d) A, A and B random and shared (Kopiczko et al. 2024)"
    Config = VeraConfig
    Layer = VeraLayer
    peft_type = "VERA"
    peft_loads = True
    shared = ("vera_A", "vera_B")

    def link(self, layers: Mapping[str, VeraLayer]) -> None:
        """One A and B for all layers: those of a file, or new ones."""
        first = next(iter(layers.values()))
        if first.vera_A is None or first.vera_B is None:
            generator = torch.Generator().manual_seed(first.seed)
            shapes = [layer.base_shape for layer in layers.values()]
            out_features, in_features = (max(sizes) for sizes in zip(*shapes, strict=True))
            first.vera_A = _frozen((first.r, in_features), generator, first.device)
            first.vera_B = _frozen((out_features, first.r), generator, first.device)
        for layer in layers.values():
            layer.vera_A, layer.vera_B = first.vera_A, first.vera_B


def _frozen(
    shape: tuple[int, int], generator: torch.Generator, device: torch.device
) -> nn.Parameter:
    bound = math.sqrt(6 / shape[1])  # Kaiming-uniform, as in PEFT
    value = torch.empty(shape).uniform_(-bound, bound, generator=generator)
    return nn.Parameter(value.to(device), requires_grad=False)
