"""One adapted layer of every kind, between two that are not adapted."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lorakit import registry
from lorakit.injection import inject, trainable_state
from lorakit.layers import adapted_modules
from lorakit.methods.base import Method
from lorakit.recipe.sections import AdapterSection

ROWS, COLUMNS, IDS = 12, 10, 20
#: Kind -> the layer's name, and what the adapter has for a target. A slice lies in a projection
#: that its name and the model's configuration tell; ``base`` is for methods that wrap nothing.
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "linear": ("layer", {"target_modules": ["layer"]}),
    "conv1d": ("layer", {"target_modules": ["layer"]}),
    "embedding": ("layer", {"target_modules": ["layer"]}),
    "slice of a linear": ("query_key_value", {"target_modules": ["q"]}),
    "slice of a conv1d": ("c_attn", {"target_modules": ["q", "v"]}),
    "base": ("layer", {}),
}
#: The rows of W that a case of slices must leave alone: GPT-NeoX has q, k and v of one head after
#: the other, here 2 heads of dimension 2; GPT-2 has all of q, then of k, then of v.
OTHER_ROWS = {
    "slice of a linear": [2, 3, 4, 5, 8, 9, 10, 11],
    "slice of a conv1d": [4, 5, 6, 7],
}
_CONFIGS = {
    "slice of a linear": {"model_type": "gpt_neox", "hidden_size": 4, "num_attention_heads": 2},
    "slice of a conv1d": {"model_type": "gpt2", "hidden_size": 4},
}
DTYPES = (torch.float32, torch.bfloat16)


def kinds_of(method: Method) -> list[str]:
    """Return the keys of ``KINDS`` that ``method`` trains."""
    if not method.kinds:
        return ["base"]
    return [kind for kind in KINDS if kind.partition(" ")[0] in method.kinds]


def cases(*kinds: str, wraps: bool = False, unchecked: bool = False) -> pytest.MarkDecorator:
    """Return every method with each of its ``kinds`` (default: all) and each dtype of the base;
    with ``wraps``, without the methods that train the base's own parameters; with ``unchecked``,
    without what ``check_method`` runs: float32 on every kind but a slice of a linear layer."""
    return pytest.mark.parametrize(
        ("name", "kind", "dtype"),
        [
            pytest.param(name, kind, dtype, id=f"{name}-{kind}-{str(dtype).removeprefix('torch.')}")
            for name, method in registry.methods().items()
            for kind in kinds_of(method)
            for dtype in DTYPES
            if (not kinds or kind in kinds) and not (wraps and kind == "base")
            if not (unchecked and dtype is torch.float32 and kind != "slice of a linear")
        ],
    )


class Model(nn.Module):
    """A model that takes token ids."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        name, _ = KINDS[kind]
        self.config = SimpleNamespace(**_CONFIGS.get(kind, {}))
        self.before: nn.Module = nn.Embedding(IDS, COLUMNS)
        self.after = nn.Linear(ROWS, 4)
        if kind == "embedding":
            self.before = nn.Identity()
            layer: nn.Module = nn.Embedding(IDS, ROWS)
        elif kind.endswith("conv1d"):
            layer = Conv1D(ROWS, COLUMNS)
        else:
            layer = nn.Linear(COLUMNS, ROWS)
        self.name = name
        self.add_module(name, layer)

    @property
    def layer_in_place(self) -> nn.Module:
        return self.get_submodule(self.name)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.after(torch.tanh(self.layer_in_place(self.before(ids))))
        return out


def base(kind: str, dtype: torch.dtype) -> Model:
    torch.manual_seed(0)
    return Model(kind).to(dtype).eval()


def config(name: str, kind: str) -> AdapterSection:
    section: AdapterSection = registry.methods()[name].Config(method=name, **KINDS[kind][1])
    return section


def injected(name: str, kind: str, dtype: torch.dtype, seed: int = 1) -> Model:
    model = base(kind, dtype)
    torch.manual_seed(seed)
    inject(model, config(name, kind))
    return model


def adapted(name: str, kind: str, dtype: torch.dtype) -> Model:
    """Return an injected model whose trained parameters have changed, as after training."""
    model = injected(name, kind, dtype)
    with torch.no_grad():
        for parameter in trainable_state(model).values():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def ids() -> torch.Tensor:
    return torch.arange(IDS).reshape(4, 5)


def loss(model: nn.Module) -> torch.Tensor:
    out: torch.Tensor = model(ids()).float().square().sum()
    return out


def merged_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return W with the adapter merged, for every adapted module."""
    with torch.no_grad():
        return {n: x.fold(x.weight) for n, x in adapted_modules(model).items()}
