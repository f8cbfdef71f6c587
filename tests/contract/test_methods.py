"""What every method must do, on every kind of module that it adapts, over every base dtype.

A new file in ``lorakit/methods`` is covered by being there; it declares in ``kinds`` what it
adapts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lorakit import registry
from lorakit.adapters.merge_loaded import fold
from lorakit.adapters.peft_format import load_adapter, save_adapter
from lorakit.injection import inject, trainable_state
from lorakit.layers import AdapterLayer, adapter_layers
from lorakit.recipe.sections import AdapterSection

ROWS, COLUMNS = 12, 10
KINDS = ("linear", "conv1d", "embedding")
DTYPES = (torch.float32, torch.bfloat16)
CASES = [
    pytest.param(name, kind, dtype, id=f"{name}-{kind}-{str(dtype).removeprefix('torch.')}")
    for name, method in registry.methods().items()
    for kind in KINDS
    if kind in method.kinds
    for dtype in DTYPES
]
every_case = pytest.mark.parametrize(("name", "kind", "dtype"), CASES)


class Model(nn.Module):
    """An adapted layer between two that are not; inputs are token ids."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.before = nn.Embedding(20, COLUMNS)
        self.after = nn.Linear(ROWS, 4)
        self.layer: nn.Module
        if kind == "linear":
            self.layer = nn.Linear(COLUMNS, ROWS)
        elif kind == "conv1d":
            self.layer = Conv1D(ROWS, COLUMNS)
        else:
            self.before = nn.Identity()  # type: ignore[assignment]
            self.layer = nn.Embedding(20, ROWS)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.after(torch.tanh(self.layer(self.before(ids))))
        return out


def base(kind: str, dtype: torch.dtype) -> Model:
    torch.manual_seed(0)
    return Model(kind).to(dtype).eval()


def config(name: str, **keys: Any) -> AdapterSection:
    section: AdapterSection = registry.methods()[name].Config(
        method=name, target_modules=["layer"], **keys
    )
    return section


def adapted(name: str, kind: str, dtype: torch.dtype) -> Model:
    """As after training: everything that trains has moved."""
    model = base(kind, dtype)
    inject(model, config(name))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in trainable_state(model).values():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def layer_of(model: Model) -> AdapterLayer:
    layer = adapter_layers(model)["layer"]
    assert isinstance(layer, AdapterLayer)
    return layer


def ids() -> torch.Tensor:
    return torch.arange(20).reshape(4, 5)


def test_there_are_methods() -> None:
    assert "lora" in registry.methods()


@every_case
def test_the_output_is_unchanged_at_the_start(name: str, kind: str, dtype: torch.dtype) -> None:
    model = base(kind, dtype)
    before = model(ids())
    inject(model, config(name))
    tolerance = 1e-5 if dtype is torch.float32 else 2e-2
    after = model(ids())
    assert after.dtype == before.dtype
    torch.testing.assert_close(after, before, atol=tolerance, rtol=tolerance)


@every_case
def test_only_its_own_parameters_get_gradients(name: str, kind: str, dtype: torch.dtype) -> None:
    model = adapted(name, kind, dtype)
    own = {n for n, _ in layer_of(model).named_parameters() if not n.startswith("base_layer.")}
    model.train()(ids()).float().square().sum().backward()
    with_gradient = {n for n, p in model.named_parameters() if p.grad is not None}
    assert with_gradient == set(trainable_state(model))
    assert with_gradient <= {f"layer.{n}" for n in own}
    assert with_gradient
    for parameter in trainable_state(model).values():
        assert parameter.dtype == torch.float32, "half-precision parameters lose small updates"
        assert parameter.grad.any()


@every_case
def test_training_can_begin(name: str, kind: str, dtype: torch.dtype) -> None:
    """The gradient at the start is not zero everywhere."""
    model = base(kind, dtype)
    inject(model, config(name))
    model.train()(ids()).float().square().sum().backward()
    assert any(p.grad is not None and p.grad.any() for p in trainable_state(model).values())


@every_case
def test_what_is_saved_is_loaded_bit_equal(
    name: str, kind: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    model = adapted(name, kind, dtype)
    save_adapter(
        tmp_path / "a", model, config(name), base_model_name_or_path="b", task_type="CAUSAL_LM"
    )
    again = base(kind, dtype)
    report = load_adapter(again, tmp_path / "a", trainable=True)
    assert report.method == name
    saved, loaded = trainable_state(model), trainable_state(again)
    assert list(saved) == list(loaded)
    assert all(torch.equal(saved[key], loaded[key]) for key in saved)
    with torch.no_grad():
        assert torch.equal(model(ids()), again(ids()))


@every_case
def test_merged_equals_unmerged(name: str, kind: str, dtype: torch.dtype) -> None:
    """In float32, so that a half-precision base is compared before its one rounding."""
    model = adapted(name, kind, dtype).float()
    with torch.no_grad():
        unmerged, plain = model(ids()), base(kind, dtype).float()(ids())
        assert fold(model) == 1
        assert not adapter_layers(model)
        torch.testing.assert_close(model(ids()), unmerged, atol=1e-5, rtol=1e-5)
    assert (unmerged - plain).abs().max() > 1e-2, "the adapter does something"


@every_case
def test_a_base_without_values_is_enough_for_the_merge(
    name: str, kind: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    """The merge of files reads W elsewhere and has the model on the device ``meta``."""
    model = adapted(name, kind, dtype)
    save_adapter(
        tmp_path / "a", model, config(name), base_model_name_or_path="b", task_type="CAUSAL_LM"
    )
    with torch.device("meta"):
        empty = Model(kind).to(dtype)
    load_adapter(empty, tmp_path / "a")
    weight = layer_of(model).weight
    got = layer_of(empty).method.merged_weight(layer_of(empty), weight)
    assert got.dtype == torch.float32
    assert got.shape == weight.shape
    torch.testing.assert_close(got, layer_of(model).method.merged_weight(layer_of(model), weight))
