"""One layer of each kind with torch's counterpart and an input."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import lorakit


@dataclass(frozen=True)
class Case:
    make: Callable[..., nn.Module]  # lorakit's, given r and the rest
    plain: Callable[..., nn.Module]
    A: tuple[int, int]  # shapes for r = 2
    B: tuple[int, int]
    x: Callable[[], Tensor]

    def build(self, **kwargs: Any) -> nn.Module:
        """Build a layer with r = 2, lora_alpha = 3 and nonzero factors."""
        torch.manual_seed(1)
        layer = randomized(self.make(**{"r": 2, "lora_alpha": 3, **kwargs}))
        if (row := getattr(layer, "padding_idx", None)) is not None:
            layer.lora_A.data[:, row] = 0  # as training leaves it
        return layer


def randomized(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.3)
    return model


def _case(cls: Any, plain: Any, sizes: tuple[int, ...], A: Any, B: Any, x: Any, **own: Any) -> Case:
    shared = {k: v for k, v in own.items() if k not in ("enable_lora", "fan_in_fan_out")}
    return Case(
        make=lambda **kwargs: cls(*sizes, **own, **kwargs),
        plain=lambda **kwargs: plain(*sizes, **shared, **kwargs),
        A=A,
        B=B,
        x=x,
    )


def _rows(n: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(3, 4, n, generator=torch.Generator().manual_seed(0))


def _image() -> Tensor:
    return torch.randn(2, 4, 5, 6, generator=torch.Generator().manual_seed(0))


def _ids() -> Tensor:
    return torch.tensor([[0, 3, 3, 9], [5, 1, 0, 8]])


_QV = {"enable_lora": [True, False, True]}
CASES = {
    "linear": _case(lorakit.Linear, nn.Linear, (6, 10), (2, 6), (10, 2), _rows(6)),
    "linear-no-bias": _case(
        lorakit.Linear, nn.Linear, (6, 10), (2, 6), (10, 2), _rows(6), bias=False
    ),
    "linear-fan-in": _case(
        lorakit.Linear, nn.Linear, (6, 10), (2, 6), (10, 2), _rows(6), fan_in_fan_out=True
    ),
    "merged-qv": _case(lorakit.MergedLinear, nn.Linear, (6, 12), (4, 6), (8, 2), _rows(6), **_QV),
    "merged-fan-in": _case(
        lorakit.MergedLinear,
        nn.Linear,
        (6, 12),
        (4, 6),
        (8, 2),
        _rows(6),
        fan_in_fan_out=True,
        **_QV,
    ),
    "merged-one": _case(
        lorakit.MergedLinear,
        nn.Linear,
        (6, 12),
        (2, 6),
        (6, 2),
        _rows(6),
        enable_lora=[False, True],
    ),
    "embedding": _case(lorakit.Embedding, nn.Embedding, (10, 6), (2, 10), (6, 2), _ids),
    "embedding-padding": _case(
        lorakit.Embedding, nn.Embedding, (10, 6), (2, 10), (6, 2), _ids, padding_idx=3
    ),
    "conv": _case(lorakit.Conv2d, nn.Conv2d, (4, 6, 3), (6, 12), (18, 6), _image, padding=1),
    "conv-groups": _case(lorakit.Conv2d, nn.Conv2d, (4, 6, 3), (6, 12), (9, 6), _image, groups=2),
}
