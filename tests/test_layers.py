"""The base classes of layers: the defaults of a new layer class, and several parts over one base."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from transformers.pytorch_utils import Conv1D

from lorakit.base_weight import RowView
from lorakit.errors import AdapterError
from lorakit.kernels.low_rank import RowSlice
from lorakit.layers import AdapterLayer, CompositeLayer
from lorakit.methods.dora_layer import DoraLayer
from lorakit.methods.lora_layer import LoraLayer, MosLoraLayer


class Offset(AdapterLayer):
    """A layer that defines only the required methods."""

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self.offset = self.new_parameter(*self.base_shape)
        nn.init.normal_(self.offset)

    def delta_weight(self) -> Tensor:
        return self.offset


class Stacked(nn.Module):
    """Several linear layers with the same input as a single one."""

    def __init__(self, *layers: nn.Linear) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    @property
    def weight(self) -> Tensor:
        return torch.cat([layer.weight for layer in self.layers])

    @property
    def bias(self) -> Tensor:
        return torch.cat([layer.bias for layer in self.layers])

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([layer(x) for layer in self.layers], dim=-1)


def lora(base: nn.Module, r: int = 2, layer_class: type[LoraLayer] = LoraLayer) -> LoraLayer:
    layer = layer_class(base, r=r, scaling=0.5)
    nn.init.normal_(layer.lora_A)
    nn.init.normal_(layer.lora_B)
    if isinstance(layer, DoraLayer):
        nn.init.uniform_(layer.lora_magnitude_vector, 1, 2)
    if isinstance(layer, MosLoraLayer):
        nn.init.eye_(layer.lora_mixer)
    return layer


@pytest.mark.parametrize("base", [nn.Linear(4, 6), Conv1D(6, 4), nn.Embedding(4, 6)], ids=type)
def test_delta_weight_alone_makes_a_layer(base: nn.Module) -> None:
    layer = Offset(base)
    assert layer.base_shape == (6, 4)
    assert list(layer.adapter_parameters()) == ["offset"]
    ids = torch.tensor([[3, 0], [1, 1]])
    one_hot = F.one_hot(ids, 4).float()
    out = layer(ids if isinstance(base, nn.Embedding) else one_hot)
    with torch.no_grad():
        merged = layer.merged_weight(layer.dense_weight())
        bias = 0 if layer.bias is None else layer.bias
        torch.testing.assert_close(out, one_hot @ merged.t() + bias)
        assert torch.equal(
            layer.fold(layer.weight),
            (layer.dense_weight() + layer.offset).t()
            if layer.kind != "linear"
            else layer.weight + layer.offset,
        )
    out.sum().backward()
    assert layer.offset.grad is not None


@pytest.mark.parametrize("layer_class", [LoraLayer, DoraLayer])
def test_parts_that_overlap_are_several_adapters_of_one_module(
    layer_class: type[LoraLayer],
) -> None:
    """The updates of all parts are added, whatever their rows and periods."""
    base = nn.Linear(4, 12).requires_grad_(False)
    slices = {"all": RowSlice(0, 12, 12), "first": RowSlice(0, 6, 12), "heads": RowSlice(1, 2, 3)}
    parts = {n: lora(RowView(base, rows), 2, layer_class) for n, rows in slices.items()}
    layer = CompositeLayer(base, parts)
    x = torch.randn(3, 5, 4)
    want, W = base(x).clone(), base.weight.clone()
    for name, part in parts.items():
        own = slices[name].of(torch.arange(12))
        delta = part.delta_weight().detach()
        want[..., own] += x @ delta.t()
        W[own] += delta
    torch.testing.assert_close(layer(x), want, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(layer.merged_weight(base.weight), W, atol=1e-5, rtol=1e-5)


def test_one_layer_spans_several_modules() -> None:
    """Separate q, k and v, stacked and adapted together, equal the ones adapted individually."""
    torch.manual_seed(0)
    q, k, v = (nn.Linear(4, size).requires_grad_(False) for size in (8, 4, 4))
    base, x = Stacked(q, k, v), torch.randn(3, 4)
    together = lora(base)
    assert together.base_shape == (16, 4)
    torch.testing.assert_close(
        together(x), base(x) + x @ together.delta_weight().t(), atol=1e-5, rtol=1e-5
    )
    rows = {"q": RowSlice(0, 8, 16), "v": RowSlice(12, 16, 16)}
    apart = CompositeLayer(base, {name: lora(RowView(base, own)) for name, own in rows.items()})
    out = apart(x)
    assert torch.equal(out[:, 8:12], k(x))
    for name, module in (("q", q), ("v", v)):
        delta = apart.parts[name].delta_weight()
        torch.testing.assert_close(
            rows[name].of(out, dim=1), module(x) + x @ delta.t(), atol=1e-5, rtol=1e-5
        )
    merged = apart.merged_weight(apart.dense_weight())
    torch.testing.assert_close(F.linear(x, merged, base.bias), out, atol=1e-5, rtol=1e-5)


class _ScaledRows(AdapterLayer):
    """Multiplies the rows of W by 1 + scales."""

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self.scales = nn.Parameter(torch.full((self.out_features, 1), 0.5))

    def delta_weight(self) -> torch.Tensor:
        return self.scales * self.dense_weight().float()


def test_a_delta_that_reads_the_dense_weight_merges_on_a_meta_base() -> None:
    layer = _ScaledRows(nn.Linear(3, 2, device="meta"))
    weight = torch.arange(6.0).reshape(2, 3)
    assert torch.equal(layer.fold(weight), 1.5 * weight)
    assert layer.dense_weight().device.type == "meta"


@pytest.mark.parametrize(
    ("base", "rows", "problem"),
    [
        (nn.Embedding(4, 6), RowSlice(0, 3, 6), "rows of an embedding cannot be adapted; allowed"),
        (nn.Linear(4, 6), RowSlice(0, 2, 4), r"RowSlice\(.*\) does not fit a module of 6 rows"),
        (nn.Linear(4, 6), RowSlice(2, 5, 3), r"RowSlice\(.*\) does not fit a module of 6 rows"),
    ],
    ids=str,
)
def test_rows_that_a_module_does_not_have(base: nn.Module, rows: RowSlice, problem: str) -> None:
    with pytest.raises(AdapterError, match=problem):
        RowView(base, rows)


def test_parts_that_are_refused() -> None:
    base = nn.Linear(4, 6)
    part, other = (lora(RowView(module, RowSlice(0, 3, 6))) for module in (base, nn.Linear(4, 6)))
    for parts, problem in (
        ({}, "a layer without parts; allowed: one or more"),
        ({"base_layer": part}, "the part 'base_layer': allowed: an unused name"),
        ({"bias": part}, "the part 'bias': allowed: an unused name"),
        ({"a.b": part}, r"the part 'a\.b': allowed: an unused name"),
        ({"q": lora(base)}, "the part 'q': allowed: a layer on a RowView of the base"),
        ({"q": other}, "the part 'q': allowed: a layer on a RowView of the base"),
    ):
        with pytest.raises(AdapterError, match=problem):
            CompositeLayer(base, parts)


def _overlapping(*classes: type[LoraLayer]) -> CompositeLayer:
    base = nn.Linear(4, 6)
    rows = RowSlice(0, 6, 6)
    parts = {f"part{i}": lora(RowView(base, rows), 2, c) for i, c in enumerate(classes)}
    return CompositeLayer(base, parts)


def test_overlapping_parts_of_lora_form_one_layer() -> None:
    layer = _overlapping(LoraLayer, LoraLayer)
    W = layer.dense_weight()
    torch.testing.assert_close(layer.joined().merged_weight(W), layer.merged_weight(W))


@pytest.mark.parametrize(
    ("classes", "problem"),
    [
        ((LoraLayer, DoraLayer), "parts of DoraLayer, LoraLayer do not form one layer"),
        ((LoraLayer, MosLoraLayer), "parts of LoraLayer, MosLoraLayer do not form one layer"),
        ((DoraLayer, DoraLayer), "parts that overlap do not form one DoRA layer"),
    ],
    ids=str,
)
def test_parts_that_form_no_single_layer(
    classes: tuple[type[LoraLayer], ...], problem: str
) -> None:
    layer = _overlapping(*classes)
    assert layer.low_rank() is None
    layer.merged_weight(layer.dense_weight())
    with pytest.raises(AdapterError, match=problem):
        layer.joined()


def test_a_weight_that_is_computed_cannot_be_merged_into() -> None:
    parametrized = weight_norm(nn.Linear(4, 6))
    stacked = Stacked(nn.Linear(4, 2), nn.Linear(4, 4))
    for base in (parametrized, stacked):
        weight = base.weight.clone()
        layer = lora(base)
        with pytest.raises(AdapterError, match=r"computes its weight on each access.*; allowed: "):
            layer.merge()
        assert torch.equal(base.weight, weight)
