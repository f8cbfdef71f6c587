"""Layers compared with their formulas: shapes, initialization, forward, gradients, and invalid
arguments.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import lorakit
from lorakit.errors import UserError
from tests.nn import reference
from tests.nn.cases import CASES, Case, randomized

each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
each_dtype = pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 5e-2)], ids=str
)


def assert_near(got: Tensor, want: Any, tolerance: float) -> None:
    torch.testing.assert_close(
        got.detach().double(), torch.as_tensor(want), rtol=tolerance, atol=tolerance
    )


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype) if x.is_floating_point() else x


def assert_same(layer: nn.Module, plain: nn.Module, x: Tensor) -> None:
    """Assert bit-equality, except for a stored W^T, where torch sums in a different order."""
    if getattr(layer, "fan_in_fan_out", False):
        torch.testing.assert_close(layer(x), plain(x), rtol=1e-6, atol=1e-6)
    else:
        assert torch.equal(layer(x), plain(x))


@each_case
def test_parameters_are_torchs_and_two_factors(case: Case) -> None:
    layer = case.build()
    shapes = {name: tuple(p.shape) for name, p in layer.state_dict().items()}
    plain = {name: tuple(p.shape) for name, p in case.plain().state_dict().items()}
    if getattr(layer, "fan_in_fan_out", False):
        plain["weight"] = plain["weight"][::-1]
    assert shapes == {**plain, "lora_A": case.A, "lora_B": case.B}
    assert all(value.is_contiguous() for value in layer.state_dict().values())
    assert not layer.weight.requires_grad
    assert layer.lora_A.requires_grad and layer.lora_B.requires_grad


@each_case
def test_the_output_is_unchanged_at_the_start(case: Case) -> None:
    layer, plain = case.make(r=2), case.plain()
    state = plain.state_dict()
    if getattr(layer, "fan_in_fan_out", False):
        state["weight"] = state["weight"].t()
    layer.load_state_dict(state, strict=False)
    zero, random = ("lora_A", "lora_B") if isinstance(layer, nn.Embedding) else ("lora_B", "lora_A")
    assert not getattr(layer, zero).any()
    assert getattr(layer, random).all()
    assert_same(layer, plain, case.x())
    assert_same(layer.eval(), plain, case.x())


@each_case
@each_dtype
@pytest.mark.parametrize("mode", ["train", "merged", "unmerged"])
def test_forward_is_the_formula(
    case: Case, dtype: torch.dtype, tolerance: float, mode: str
) -> None:
    layer = case.build(dtype=dtype, merge_weights=mode != "unmerged")
    base = layer.weight.clone()
    x = cast(case.x(), dtype)
    layer.train(mode == "train")
    assert layer.merged == (mode == "merged")
    y = layer(x)
    assert y.dtype == dtype
    W = reference.updated_weight(layer, base)
    assert_near(y, reference.output(layer, W, x), tolerance)
    if mode == "merged":
        assert_near(layer.weight, W, tolerance / 5)


@each_case
@each_dtype
def test_gradients_are_those_of_the_summed_weight(
    case: Case, dtype: torch.dtype, tolerance: float
) -> None:
    """torch's layer with weight W + delta_weight() has the same gradients, by the chain rule."""
    layer = case.build(dtype=dtype)
    x = cast(case.x(), dtype)
    layer(x).float().square().sum().backward()
    assert layer.weight.grad is None
    A, B = (p.detach().double().requires_grad_() for p in (layer.lora_A, layer.lora_B))
    twin = case.build(dtype=torch.float64)
    del twin.lora_A, twin.lora_B
    twin.lora_A, twin.lora_B = A, B
    W = (layer.weight.double() + twin.delta_weight()).requires_grad_()
    W = W.t() if getattr(layer, "fan_in_fan_out", False) else W
    plain = case.plain(dtype=torch.float64)
    values = {"weight": W}
    if getattr(layer, "bias", None) is not None:
        values["bias"] = layer.bias.detach().double()
    torch.func.functional_call(plain, values, cast(x, torch.float64)).square().sum().backward()
    for name, want in (("lora_A", A.grad), ("lora_B", B.grad)):
        got = getattr(layer, name).grad.double()
        assert got.any()
        assert (got - want).norm() <= tolerance * want.norm(), name


@each_case
def test_without_r_it_is_torchs_layer(case: Case) -> None:
    torch.manual_seed(5)
    plain = case.plain()
    torch.manual_seed(5)
    layer = case.make()
    weight = layer.weight.t() if getattr(layer, "fan_in_fan_out", False) else layer.weight
    assert torch.equal(weight, plain.weight)
    assert set(layer.state_dict()) == set(plain.state_dict())
    assert weight.requires_grad
    assert_same(layer, plain, case.x())
    assert_same(layer.eval(), plain, case.x())
    assert not layer.merged


@pytest.mark.parametrize("name", ["linear", "merged-qv", "conv"])
def test_dropout_acts_on_the_input_of_the_update_only(name: str) -> None:
    case = CASES[name]
    layer, x = case.build(lora_dropout=0.5), case.x()
    torch.manual_seed(7)
    got = layer(x)
    torch.manual_seed(7)
    dropped = F.dropout(x.flatten(0, 1) if name != "conv" else x, 0.5).view(x.shape)
    W, base = reference.updated_weight(layer, layer.weight), reference.array(layer.weight)
    out = reference.output
    want = out(layer, base, x) + out(layer, W, dropped) - out(layer, base, dropped)
    assert_near(got, want, 1e-5)
    assert not torch.equal(got, layer(x))  # another mask
    layer.eval()
    assert torch.equal(layer(x), layer(x))


def test_conv1d_of_gpt2_is_replaced_by_fan_in_fan_out() -> None:
    theirs = Conv1D(12, 4)
    ours = lorakit.MergedLinear(4, 12, r=2, enable_lora=[True, False, True], fan_in_fan_out=True)
    assert ours.load_state_dict(theirs.state_dict(), strict=False).unexpected_keys == []
    x = torch.randn(3, 5, 4)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-6, atol=1e-6)
    randomized(ours)
    q, k, v = (ours(x) - theirs(x)).split(4, -1)
    assert q.abs().max() > 0.01 and v.abs().max() > 0.01
    assert k.abs().max() < 1e-6


def test_only_the_enabled_rows_change_bit_for_bit() -> None:
    for fan_in, dtype in [(False, torch.float32), (True, torch.bfloat16)]:
        layer = randomized(
            lorakit.MergedLinear(
                8, 12, r=4, enable_lora=[True, False, True], fan_in_fan_out=fan_in, dtype=dtype
            )
        )
        with torch.no_grad():
            layer.weight.view(-1)[::3] = -0.0
        x = torch.randn(5, 8, dtype=dtype)
        base = layer.weight.clone()
        plain = F.linear(x, base.t() if fan_in else base, layer.bias)
        assert torch.equal(layer(x)[:, 4:8], plain[:, 4:8])
        layer.eval()
        by_row, was = (layer.weight.t(), base.t()) if fan_in else (layer.weight, base)
        bits = torch.int32 if dtype == torch.float32 else torch.int16
        same = by_row.contiguous().view(bits) == was.contiguous().view(bits)
        assert same[4:8].all()
        # In bfloat16 a small update may round to nothing.
        assert same[:4].float().mean() < 0.2
        assert same[8:].float().mean() < 0.2


def test_inputs_of_one_and_of_no_row() -> None:
    for name in ("linear", "merged-qv"):
        layer = CASES[name].build()
        x = torch.randn(6)
        torch.testing.assert_close(layer(x), layer(x[None])[0])
        assert layer(torch.randn(0, 3, 6)).shape == (0, 3, layer.out_features)
        with pytest.raises(RuntimeError, match="shapes"):
            layer(torch.randn(6, 5))


@pytest.mark.parametrize("name", ["linear", "merged-qv", "embedding", "conv"])
def test_factors_may_be_float32_over_a_bfloat16_base(name: str) -> None:
    layer = CASES[name].build(dtype=torch.bfloat16)
    layer.lora_A.data, layer.lora_B.data = layer.lora_A.data.float(), layer.lora_B.data.float()
    x = cast(CASES[name].x(), torch.bfloat16)
    y = layer(x)
    y.float().sum().backward()
    assert layer.lora_B.grad.dtype == torch.float32
    merged = layer.eval()(x)
    assert y.dtype == merged.dtype == torch.bfloat16
    torch.testing.assert_close(merged, y, rtol=5e-2, atol=5e-2)


def test_embedding_padding_row_gets_no_update() -> None:
    layer = lorakit.Embedding(10, 6, r=2, padding_idx=3)
    optimizer = torch.optim.SGD([layer.lora_A, layer.lora_B], lr=1.0)
    for _ in range(2):
        optimizer.zero_grad()
        (layer(torch.tensor([3, 3, 4])) + 1).square().sum().backward()
        optimizer.step()
    delta = layer.delta_weight()
    assert not delta[3].any()
    assert delta[4].all()
    assert not delta[5].any()


def test_embedding_scales_gradients_by_frequency_if_asked() -> None:
    plain, scaled = (CASES["embedding"].build(scale_grad_by_freq=on) for on in (False, True))
    ids = torch.tensor([1, 1, 1, 2])
    for layer in (plain, scaled):
        layer(ids).square().sum().backward()
    times = torch.ones(10)
    times[1] = 3
    torch.testing.assert_close(scaled.lora_A.grad * times, plain.lora_A.grad)


def test_embedding_from_pretrained() -> None:
    rows = torch.randn(10, 6)
    layer = lorakit.Embedding.from_pretrained(rows, sparse=True)
    assert layer.r == 0
    assert torch.equal(layer.weight, rows)


def test_reset_parameters_draws_new_values() -> None:
    layer = CASES["linear"].build().eval()
    before = layer.state_dict()["weight"].clone()
    layer.reset_parameters()
    assert layer.merged
    assert not layer.lora_B.any()
    assert not torch.equal(layer.state_dict()["weight"], before)
    assert torch.equal(layer.weight, layer.state_dict()["weight"])  # merged with B = 0


WRONG = {
    "Linear: r = -1": lambda: lorakit.Linear(4, 4, r=-1),
    "Linear: r = 1.5": lambda: lorakit.Linear(4, 4, r=1.5),  # type: ignore[arg-type]
    "Conv2d: r = true": lambda: lorakit.Conv2d(4, 4, 3, r=True),
    "Linear: lora_dropout = 1.0": lambda: lorakit.Linear(4, 4, r=1, lora_dropout=1.0),
    "Embedding: r = -2": lambda: lorakit.Embedding(4, 4, r=-2),
    "Embedding: sparse": lambda: lorakit.Embedding(4, 4, r=2, sparse=True),
    "Embedding: max_norm": lambda: lorakit.Embedding(4, 4, r=2, max_norm=1.0),
    "out_features = 10 is not a multiple of its length, 3": lambda: lorakit.MergedLinear(
        4, 10, enable_lora=[True] * 3
    ),
    "enable_lora = [false]: r = 2 needs": lambda: lorakit.MergedLinear(4, 12, r=2),
    "enable_lora = []": lambda: lorakit.MergedLinear(4, 12, enable_lora=[]),
    "enable_lora = [1, 0]": lambda: lorakit.MergedLinear(4, 12, enable_lora=[1, 0]),  # type: ignore[list-item]
    "kernel_size = (3, 5)": lambda: lorakit.Conv2d(4, 4, (3, 5), r=1),
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_arguments_are_named(message: str) -> None:
    with pytest.raises(UserError) as caught:
        WRONG[message]()
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
