"""The contract of methods, on every kind of module that a method adapts and every base dtype,
except what ``method_check`` covers. A new method in ``lorakit/methods`` is covered automatically.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from lorakit import registry
from lorakit.adapters.peft.place import load_adapter
from lorakit.adapters.peft.write import save_adapter
from lorakit.injection import trainable_state
from lorakit.layers import CompositeLayer, adapted_modules, adapter_layers
from lorakit.models.master_weights import plain_name
from lorakit.recipe.sections import AdapterSection
from tests.contract.cases import (
    IDS,
    KINDS,
    OTHER_ROWS,
    Model,
    adapted,
    base,
    cases,
    config,
    ids,
    injected,
    kinds_of,
    loss,
    merged_weights,
)

SLICES = tuple(OTHER_ROWS)


def save(folder: Path, model: nn.Module, section: AdapterSection) -> Path:
    return save_adapter(folder, model, section, base_model_name_or_path="b", task_type="CAUSAL_LM")


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_there_are_methods() -> None:
    methods = registry.methods()
    assert "lora" in methods
    assert {kind for method in methods.values() for kind in kinds_of(method)} >= set(KINDS) - {
        "base"
    }


@cases(unchecked=True)
def test_the_output_is_unchanged_at_the_start(name: str, kind: str, dtype: torch.dtype) -> None:
    before = base(kind, dtype)(ids())
    after = injected(name, kind, dtype)(ids())
    tolerance = 1e-5 if dtype is torch.float32 else 2e-2
    assert after.dtype == before.dtype
    torch.testing.assert_close(after, before, atol=tolerance, rtol=tolerance)


@cases(unchecked=True)
def test_only_the_methods_parameters_get_gradients(
    name: str, kind: str, dtype: torch.dtype
) -> None:
    model = adapted(name, kind, dtype)
    own = {
        f"{at}.{n}"
        for at, layer in adapter_layers(model).items()
        for n, _ in layer.named_parameters()
        if not n.startswith("base_layer.")
    }
    if not registry.methods()[name].kinds:
        of_the_base = dict(base(kind, dtype).named_parameters())
        own = {n for n, _ in model.named_parameters() if plain_name(n) in of_the_base}
    loss(model.train()).backward()
    with_gradient = {n for n, p in model.named_parameters() if p.grad is not None}
    assert with_gradient
    assert with_gradient == set(trainable_state(model)) <= own
    for parameter in trainable_state(model).values():
        assert parameter.dtype == torch.float32, "half-precision parameters lose small updates"
        assert parameter.grad is not None and parameter.grad.any()


@cases()
def test_a_step_changes_nothing_else(name: str, kind: str, dtype: torch.dtype) -> None:
    model = injected(name, kind, dtype).train()
    before = {n: value.clone() for n, value in model.state_dict().items()}
    trains = trainable_state(model)
    loss(model).backward()
    torch.optim.SGD(trains.values(), lr=1.0).step()
    changed = {n for n, value in model.state_dict().items() if not torch.equal(value, before[n])}
    assert changed, "the gradient at the start is not zero everywhere"
    assert changed <= set(trains)


@cases(unchecked=True)
def test_a_saved_adapter_loads_bit_equal(
    name: str, kind: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    method = registry.methods()[name]
    model, section = adapted(name, kind, dtype), config(name, kind)
    save(tmp_path / "a", model, section)
    again = base(kind, dtype)
    report = load_adapter(again, tmp_path / "a", trainable=True)
    if report.method != name:  # another format: equal up to rounding once, then bit-equal
        assert method.folds or kind in SLICES, "the method's own format can store everything"
        want = merged_weights(model)
        for at, weight in merged_weights(again).items():
            torch.testing.assert_close(weight, want.pop(at), atol=1e-6, rtol=1e-6)
        assert not want
        reader = registry.methods()[report.method]
        save(tmp_path / "b", again, reader.Config(method=reader.name))
        model, again = again, base(kind, dtype)
        load_adapter(again, tmp_path / "b", trainable=True)
    assert same(trainable_state(model), trainable_state(again))
    with torch.no_grad():
        assert torch.equal(model(ids()), again(ids()))


@cases()
def test_a_loaded_adapter_is_trainable_only_on_request(
    name: str, kind: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    model = adapted(name, kind, dtype)
    save(tmp_path / "a", model, config(name, kind))
    frozen, trainable = base(kind, dtype), base(kind, dtype)
    load_adapter(frozen, tmp_path / "a")
    assert not trainable_state(frozen)
    load_adapter(trainable, tmp_path / "a", trainable=True)
    loss(trainable).backward()
    assert all(p.grad is not None and p.grad.any() for p in trainable_state(trainable).values())
    with torch.no_grad():
        assert torch.equal(frozen(ids()), trainable(ids()))


@cases(wraps=True, unchecked=True)
def test_merged_equals_unmerged(name: str, kind: str, dtype: torch.dtype) -> None:
    """In float32, to compare a half-precision base before it is rounded."""
    model = adapted(name, kind, dtype).float()
    with torch.no_grad():
        unmerged, plain = model(ids()), base(kind, dtype).float()(ids())
        [(place, layer)] = adapted_modules(model).items()
        model.set_submodule(place, layer.merge())
        assert not adapted_modules(model)
        torch.testing.assert_close(model(ids()), unmerged, atol=1e-5, rtol=1e-5)
    assert (unmerged - plain).abs().max() > 1e-2, "the adapter does something"


@cases(wraps=True, unchecked=True)
def test_a_base_without_values_is_enough_for_the_merge(
    name: str, kind: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    """File-based merging reads W separately; the model is on the ``meta`` device."""
    model = adapted(name, kind, dtype)
    save(tmp_path / "a", model, config(name, kind))
    with torch.device("meta"):
        empty = Model(kind).to(dtype)
    load_adapter(empty, tmp_path / "a")
    ((at, layer),) = adapted_modules(empty).items()
    weight = adapted_modules(model)[at].weight
    got = layer.fold(weight)
    assert (got.dtype, got.shape) == (torch.float32, weight.shape)
    torch.testing.assert_close(got, merged_weights(model)[at])


@cases(*SLICES)
def test_rows_that_are_not_chosen_stay_bit_for_bit(
    name: str, kind: str, dtype: torch.dtype
) -> None:
    layer = adapted(name, kind, dtype).layer_in_place
    assert isinstance(layer, CompositeLayer)
    x = torch.randn(3, 5, layer.in_features, dtype=dtype)
    others = OTHER_ROWS[kind]
    chosen = [row for row in range(layer.out_features) if row not in others]
    merged = layer.merged_weight(layer.dense_weight()).detach()
    weight = layer.dense_weight().float()
    with torch.no_grad():
        output, plain = layer(x), layer.base_layer(x)
    for old, new in ((weight, merged), (plain.flatten(0, 1).t(), output.flatten(0, 1).t())):
        assert torch.equal(new[others], old[others])
        assert (new[chosen] != old[chosen]).any(dim=1).all(), "every chosen row changes"


@cases(*SLICES)
def test_a_part_equals_the_method_on_a_linear_layer(
    name: str, kind: str, dtype: torch.dtype
) -> None:
    """The part's parameters give the same W on a linear layer that has only the chosen rows."""
    layer = adapted(name, kind, torch.float32).layer_in_place
    assert isinstance(layer, CompositeLayer)
    for role, part in layer.parts.items():
        rows = layer.rows(role)
        alone = nn.Linear(layer.in_features, part.out_features, bias=False)
        whole = layer.dense_weight().detach()
        alone.weight.data.copy_(rows.of(whole))
        method = registry.methods()[name]
        own = method.wrap(alone, config(name, kind), role)
        own.load_state_dict(part.state_dict(), strict=False)
        merged = layer.merged_weight(layer.dense_weight())
        torch.testing.assert_close(rows.of(merged), own.fold(alone.weight))


@cases()
def test_inputs_of_any_shape(name: str, kind: str, dtype: torch.dtype) -> None:
    model = adapted(name, kind, dtype)
    for shape in ((), (1,), (2, 3), (0,)):
        with torch.no_grad():
            got = model(torch.randint(IDS, shape))
        assert (got.shape, got.dtype) == ((*shape, 4), dtype)


@cases()
def test_autocast_to_half_precision(name: str, kind: str, dtype: torch.dtype) -> None:
    """Autocast is used with float16 loss scaling, and callers may use it on a float32 base."""
    model = adapted(name, kind, dtype)
    with torch.no_grad():
        want = model(ids()).float()
    with torch.autocast("cpu", torch.bfloat16):
        got = model(ids())
        got.float().square().sum().backward()
    torch.testing.assert_close(got.float(), want, atol=0.1, rtol=0.1)
    assert all(p.grad is not None and p.grad.any() for p in trainable_state(model).values())
