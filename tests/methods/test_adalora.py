"""AdaLoRA's layer, schedule and hooks compared with the paper's formulas."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lorakit.adapters.peft.place import load_adapter
from lorakit.adapters.peft.write import save_adapter
from lorakit.errors import RecipeError, UserError
from lorakit.injection import inject, trainable_state
from lorakit.layers import AdapterLayer, adapted_modules, adapter_layers
from lorakit.methods.adalora import METHOD, AdaLoraConfig, resolve_steps
from lorakit.methods.adalora_layer import Allocation, Budget
from lorakit.recipe.load import load_recipe
from tests.families import tiny, token_ids

SHAPES = [(6, 10), (6, 10), (8, 5)]


def config(**keys: Any) -> AdaLoraConfig:
    keys = {"init_r": 4, "target_r": 2, "tinit": 2, "tfinal": 3, "deltaT": 2, **keys}
    return AdaLoraConfig(**keys)


def filled(module: nn.Module, **keys: Any) -> AdapterLayer:
    layer = METHOD.wrap(module, config(**keys), "layer")
    for factor in (layer.lora_A, layer.lora_B, layer.lora_E):
        nn.init.normal_(factor)
    return layer


def several(**keys: Any) -> dict[str, AdapterLayer]:
    torch.manual_seed(0)
    return {f"m.{i}.x": filled(nn.Linear(*shape), **keys) for i, shape in enumerate(SHAPES)}


def allocation(layers: dict[str, AdapterLayer], total_steps: int = 12, **keys: Any) -> Allocation:
    hooks = METHOD.hooks(layers, config(**keys), total_steps)
    assert isinstance(hooks, Allocation)
    return hooks


def random_gradients(layers: dict[str, AdapterLayer], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for layer in layers.values():
        for factor in (layer.lora_A, layer.lora_B, layer.lora_E):
            factor.grad = torch.randn(factor.shape, generator=generator)


def same(gradient: Tensor) -> Tensor:
    return gradient


def _numpy(*tensors: Tensor) -> list[Any]:
    return [tensor.detach().double().numpy() for tensor in tensors]


# The layer


@pytest.mark.parametrize("conv", [False, True])
def test_the_layer_is_the_formula(conv: bool) -> None:
    """y = W x + lora_alpha / init_r P Lambda Q x."""
    torch.manual_seed(0)
    layer = filled(Conv1D(10, 6) if conv else nn.Linear(6, 10), lora_alpha=6)
    x = torch.randn(2, 4, 6)
    W, b, Q, P, E, x_ = _numpy(
        layer.weight, layer.bias, layer.lora_A, layer.lora_B, layer.lora_E, x
    )
    delta = 6 / 4 * P @ np.diag(E[:, 0]) @ Q
    W = W.T if conv else W
    np.testing.assert_allclose(layer(x).detach().numpy(), x_ @ (W + delta).T + b, atol=1e-4)
    added = layer.delta_weight().detach().numpy()
    np.testing.assert_allclose(added, delta, atol=1e-4)


def test_the_start_is_the_base_and_the_singular_vectors_are_gaussian() -> None:
    torch.manual_seed(0)
    layer = METHOD.wrap(nn.Linear(400, 300), config(init_r=8), "layer")
    assert not layer.lora_E.any()
    for factor in (layer.lora_A, layer.lora_B):
        assert factor.std().item() == pytest.approx(0.02, rel=0.05)
        assert abs(factor.mean().item()) < 2e-3
    x = torch.randn(3, 400)
    assert torch.equal(layer(x), layer.base_layer(x))
    assert layer.kept.all()


# The recipe


def test_the_initial_rank_is_half_above_the_target_if_it_is_not_given() -> None:
    assert AdaLoraConfig().init_r == 12
    assert AdaLoraConfig(target_r=16).init_r == 24
    assert AdaLoraConfig(target_r=1).init_r == 2
    assert AdaLoraConfig(target_r=16, init_r=16).init_r == 16


RECIPE = """\
model: {{name_or_path: m}}
adapter: {{method: adalora, {keys}}}
task: {{name: text, path: x}}
train: {{output_dir: run}}
"""


@pytest.mark.parametrize(
    ("keys", "names"),
    [
        ("init_r: 4", ("adapter.init_r = 4", "target_r = 8", "allowed: 8 or more")),
        ("init_r: 4, target_r: 6", ("adapter.init_r = 4", "target_r = 6", "allowed: 6 or more")),
        ("target_r: 0", ("adapter.target_r = 0", "> 0")),
        ("tinit: 1.0", ("adapter.tinit = 1.0", "an integer >= 0 or a number > 0 and < 1")),
        ("tfinal: -1", ("adapter.tfinal = -1", "an integer >= 0")),
        ("deltaT: 0", ("adapter.deltaT = 0", "> 0")),
        ("beta1: 1.0", ("adapter.beta1 = 1.0", "< 1")),
        ("r: 8", ("adapter.r", "unknown key")),
        ("orth_reg_form: sum", ("adapter.orth_reg_form", "squared, mean_norm")),
    ],
)
def test_a_wrong_recipe_names_key_value_and_what_is_allowed(
    keys: str, names: tuple[str, ...], tmp_path: Path
) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(RECIPE.format(keys=keys))
    with pytest.raises(RecipeError) as caught:
        load_recipe(file)
    text = str(caught.value)
    assert str(file) in text
    assert all(name in text for name in names), text


# The budget


def test_the_budget_is_cubic_between_its_ends() -> None:
    budget = Budget(start=48, end=16, tinit=10, tfinal=30, total_steps=100, deltaT=7)
    steps = np.arange(101)
    left = 1 - (steps - 10) / (100 - 30 - 10)
    want = np.where(steps <= 10, 48, np.where(steps >= 70, 16, (48 - 16) * left**3 + 16))
    got = [budget.at(int(step)) for step in steps]
    assert got == [int(w) for w in want]
    assert budget.at(10) == 48
    assert budget.at(70) == budget.at(100) == 16
    assert got == sorted(got, reverse=True)
    assert [s for s in range(1, 101) if budget.allocates(s)] == [*range(14, 70, 7), 70]


def test_steps_and_fractions_of_the_run() -> None:
    assert resolve_steps(7, 100) == 7
    assert resolve_steps(0.25, 100) == 25
    assert resolve_steps(0.001, 100) == 0
    by_steps = allocation(several(), 40, tinit=4, tfinal=20)
    by_parts = allocation(several(), 40, tinit=0.1, tfinal=0.5)
    assert by_steps.budget == by_parts.budget == Budget(12, 6, 4, 20, 40, 2)


@pytest.mark.parametrize(
    ("tinit", "tfinal", "fits"),
    [
        (10, 9, True),
        (10, 10, False),
        (0, 20, False),
        (0.5, 0.5, False),
        (0.5, 9, True),
        (30, 0, False),
    ],
)
def test_warm_and_final_phase_leave_steps_to_choose_in(
    tinit: float, tfinal: float, fits: bool
) -> None:
    keys = config(tinit=tinit, tfinal=tfinal)
    if fits:
        METHOD.check_steps(keys, 20)
        return
    with pytest.raises(UserError) as caught:
        METHOD.check_steps(keys, 20)
    text = str(caught.value)
    assert text.startswith(f"adapter.tinit = {tinit}, adapter.tfinal = {tfinal}: ")
    assert "the run's 20 steps" in text
    assert "allowed: less than 20 in total" in text


def test_the_phase_that_the_recipe_sets_is_named_first() -> None:
    with pytest.raises(UserError, match=r"^adapter\.tfinal = 19, adapter\.tinit = 0\.1: "):
        METHOD.check_steps(AdaLoraConfig(tfinal=19), 20)


@pytest.mark.parametrize("total_steps", range(1, 30))
def test_the_default_phases_fit_every_run(total_steps: int) -> None:
    METHOD.check_steps(AdaLoraConfig(), total_steps)


# The penalty


@pytest.mark.parametrize("form", ["squared", "mean_norm"])
def test_the_penalty_goes_into_the_gradients(form: str) -> None:
    """Compared with autograd: gamma times the sum of squares, or the mean of norms of the public
    implementations."""
    layers = several()
    hooks = allocation(layers, orth_reg_weight=0.3, orth_reg_form=form)
    random_gradients(layers, 1)
    before = {n: [f.grad.clone() for f in _factors(layer)] for n, layer in layers.items()}
    leaves = {
        n: [f.detach().double().requires_grad_() for f in _factors(layer)]
        for n, layer in layers.items()
    }
    grams = [gram for A, B, _ in leaves.values() for gram in (A @ A.T, B.T @ B)]
    distances = [gram - torch.eye(4, dtype=torch.float64) for gram in grams]
    if form == "squared":
        want = 0.3 * torch.stack([d.square().sum() for d in distances]).sum()
    else:
        want = 0.3 * torch.stack([d.norm() for d in distances]).mean()
    want.backward()
    (value,) = hooks.before_step(same)
    torch.testing.assert_close(value.double(), want.detach(), rtol=1e-5, atol=0)
    for name, layer in layers.items():
        for factor, own, leaf in zip(_factors(layer), before[name], leaves[name], strict=True):
            added = torch.zeros_like(own) if leaf.grad is None else leaf.grad.float()
            torch.testing.assert_close(factor.grad, own + added, rtol=1e-5, atol=1e-5)


def _factors(layer: AdapterLayer) -> tuple[Tensor, Tensor, Tensor]:
    return layer.lora_A, layer.lora_B, layer.lora_E


def test_parameters_without_a_gradient_get_only_the_penalty() -> None:
    layers = several()
    hooks = allocation(layers)
    random_gradients(layers, 1)
    unused = layers["m.1.x"]
    unused.zero_grad(set_to_none=True)
    hooks.before_step(same)
    assert unused.lora_E.grad is None
    assert unused.lora_A.grad.any()
    for step in range(1, 13):
        hooks.after_step(step)
    assert sum(hooks.ranks().values()) == 6
    state = hooks.state()
    assert not state["m.1.x.lora_E.average"].any()
    assert state["m.0.x.lora_E.average"].any()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_gradient_scaler_scales_the_penalty_like_the_loss(device: str) -> None:
    """A step with float16 loss scaling equals a step without it."""
    weights = []
    for scaled in (False, True):
        layers = several()
        for layer in layers.values():
            layer.to(device)
        hooks = allocation(layers)
        scaler = torch.amp.GradScaler(device, enabled=scaled, init_scale=1024.0)
        optimizer = torch.optim.SGD([f for x in layers.values() for f in _factors(x)], lr=0.01)
        x = torch.ones(3, 10, device=device)
        loss = sum(layer(x[:, : layer.in_features]).square().sum() for layer in layers.values())
        assert isinstance(loss, Tensor)
        scaler.scale(loss).backward()
        (value,) = hooks.before_step(scaler.scale if scaled else same)
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        weights.append([value, *(f.detach() for x in layers.values() for f in _factors(x))])
    for plain, other in zip(*weights, strict=True):
        torch.testing.assert_close(other, plain, rtol=1e-5, atol=1e-6)


# Importance and ranks


def test_the_score_of_a_triplet() -> None:
    """S = s(lambda) + mean s(P column) + mean s(Q row), s = average * uncertainty."""
    layers = several()
    hooks = allocation(layers, beta1=0.8, beta2=0.6)
    shapes = {n: [tuple(f.shape) for f in _factors(layer)] for n, layer in layers.items()}
    average, spread = ({n: [np.zeros(s) for s in shapes[n]] for n in layers} for _ in range(2))
    for step in (1, 2):
        random_gradients(layers, step)
        hooks.after_step(step)
        for name, layer in layers.items():
            for k, factor in enumerate(_factors(layer)):
                (w, g) = _numpy(factor, factor.grad)
                average[name][k] = 0.8 * average[name][k] + 0.2 * np.abs(w * g)
                spread[name][k] = 0.6 * spread[name][k] + 0.4 * np.abs(
                    np.abs(w * g) - average[name][k]
                )
    want = []
    for name in layers:
        A, B, E = (
            average * uncertainty
            for average, uncertainty in zip(average[name], spread[name], strict=True)
        )
        want.append(E[:, 0] + B.mean(axis=0) + A.mean(axis=1))
    np.testing.assert_allclose(hooks.scores().numpy(), np.stack(want), rtol=1e-4)


def run_of(layers: dict[str, AdapterLayer], hooks: Allocation, total_steps: int = 12) -> list[int]:
    """Take SGD steps on random gradients; return the number of triplets kept after each."""
    kept = []
    for step in range(1, total_steps + 1):
        random_gradients(layers, step)
        with torch.no_grad():
            for layer in layers.values():
                for factor in _factors(layer):
                    factor -= 0.1 * factor.grad
        hooks.after_step(step)
        kept.append(sum(int(layer.kept.sum()) for layer in layers.values()))
    return kept


def test_exactly_the_budget_is_kept_at_every_allocation() -> None:
    layers = several()
    hooks = allocation(layers, 30, tinit=2, tfinal=6, deltaT=3)
    kept = run_of(layers, hooks, 30)
    now = 12
    for step, count in enumerate(kept, start=1):
        if hooks.budget.allocates(step):
            now = hooks.budget.at(step)
        assert count == now
    assert kept[-1] == hooks.budget.end == 6
    assert sum(hooks.ranks().values()) == 6
    for layer in layers.values():
        assert torch.equal(layer.lora_E[:, 0] != 0, layer.kept), "a pruned lambda is zero"


def test_equal_scores_are_no_reason_for_another_count() -> None:
    """Before the first gradient all scores are zero."""
    layers = several()
    hooks = allocation(layers)
    for step in range(1, 13):
        hooks.after_step(step)
        if hooks.budget.allocates(step):
            assert sum(hooks.ranks().values()) == hooks.budget.at(step)
    assert sum(hooks.ranks().values()) == 6


def test_a_pruned_triplet_can_come_back() -> None:
    layers = several()
    hooks = allocation(layers, 200, tinit=2, tfinal=3, deltaT=2)
    masks = []
    for step in range(1, 198):
        random_gradients(layers, step)
        grown = list(layers.values())[
            step // 60 % 3
        ]  # the matrix that affects the loss most changes
        for factor in _factors(grown):
            factor.grad *= 100
        with torch.no_grad():
            for layer in layers.values():
                layer.lora_E -= 0.001 * layer.lora_E.grad
        hooks.after_step(step)
        masks.append(torch.stack([layer.kept for layer in layers.values()]))
    lost = [~mask for mask in masks]
    assert any((earlier & masks[-1]).any() for earlier in lost)


def test_the_final_phase_keeps_the_chosen_triplets() -> None:
    layers = several()
    hooks = allocation(layers)
    run_of(layers, hooks, 9)
    final = hooks.state()["kept"].clone()
    assert int(final.sum()) == 6
    assert not hooks.is_final_form(8)
    assert hooks.is_final_form(9)
    for step in (10, 11, 12):
        random_gradients(layers, 100 + step)
        for layer in layers.values():
            nn.init.normal_(layer.lora_E)  # as momentum and weight decay move it
        hooks.after_step(step)
        assert torch.equal(hooks.state()["kept"], final)
        for layer in layers.values():
            assert torch.equal(layer.lora_E[:, 0] != 0, layer.kept)


def test_a_target_that_equals_the_start_prunes_nothing() -> None:
    layers = several(target_r=4)
    hooks = allocation(layers, target_r=4)
    assert set(run_of(layers, hooks)) == {12}
    assert hooks.ranks() == dict.fromkeys(layers, 4)
    assert all(layer.lora_E.all() for layer in layers.values())


@pytest.mark.parametrize("left_out", [4, 9])
def test_a_step_that_float16_leaves_out_still_allocates(left_out: int) -> None:
    """Non-finite gradients are ignored; the budget still applies."""
    layers = several()
    hooks = allocation(layers)
    for step in range(1, 13):
        random_gradients(layers, step)
        if step == left_out:
            layers["m.0.x"].lora_A.grad.fill_(torch.inf)
            layers["m.1.x"].lora_B.grad.fill_(torch.nan)
        hooks.after_step(step, scaled=True)
        if hooks.budget.allocates(step):
            assert sum(hooks.ranks().values()) == hooks.budget.at(step)
    assert all(value.isfinite().all() for value in hooks.state().values())


def test_the_state_goes_on_where_it_was() -> None:
    whole, parts = several(), several()
    hooks, first = allocation(whole, 30), allocation(parts, 30)
    for step in range(1, 31):
        if step == 14:
            second = allocation(parts, 30)
            second.load_state({k: v.clone() for k, v in first.state().items()})
            first = second
        for layers, own in ((whole, hooks), (parts, first)):
            random_gradients(layers, step)
            with torch.no_grad():
                for layer in layers.values():
                    layer.lora_E -= 0.01 * layer.lora_E.grad
            own.after_step(step)
    ours, theirs = hooks.state(), first.state()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert all(torch.equal(whole[n].kept, parts[n].kept) for n in whole)
    assert all(torch.equal(whole[n].lora_E, parts[n].lora_E) for n in whole)
    with pytest.raises(KeyError):
        first.load_state({})


@pytest.mark.gpu
def test_nothing_waits_for_the_device() -> None:
    layers = several()
    for layer in layers.values():
        layer.to("cuda")
    hooks = allocation(layers)
    random = [[torch.randn_like(f) for f in _factors(layer)] for layer in layers.values()]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in range(1, 13):
            for layer, gradients in zip(layers.values(), random, strict=True):
                for factor, gradient in zip(_factors(layer), gradients, strict=True):
                    factor.grad = gradient
            hooks.before_step(same)
            hooks.after_step(step)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert sum(hooks.ranks().values()) == 6


def test_a_frozen_head_is_no_obstacle() -> None:
    """A classifier whose head is frozen."""
    model = tiny("bert")
    inject(model, config(target_modules=["all-linear"]), heads=[])
    layers = adapter_layers(model)
    assert all(
        n.rpartition(".")[2] in ("lora_A", "lora_B", "lora_E") for n in trainable_state(model)
    )
    hooks = allocation(layers)
    optimizer = torch.optim.AdamW(trainable_state(model).values(), lr=1e-3)
    for step in range(1, 13):
        optimizer.zero_grad()
        model.train()(input_ids=token_ids(seed=step)).logits.square().sum().backward()
        hooks.before_step(same)
        optimizer.step()
        hooks.after_step(step)
    assert sum(hooks.ranks().values()) == 2 * len(layers)


# On disk


def pruned(family: str, targets: list[str], rank_of: Callable[[str], int]) -> nn.Module:
    """Keep rank_of(name) of the 4 triplets of each matrix, as after training."""
    model = tiny(family)
    torch.manual_seed(0)
    inject(model, config(target_modules=targets))
    with torch.no_grad():
        for name, layer in adapter_layers(model).items():
            for factor in _factors(layer):
                factor.normal_()
            layer.kept.copy_(torch.randperm(4) < rank_of(name))
            layer.lora_E *= layer.kept[:, None]
    return model


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        out: Tensor = model.eval()(input_ids=token_ids()).logits
    return out


CASES = [
    ("llama", ["all-linear"], "ADALORA"),
    ("gpt2", ["all-linear"], "ADALORA"),  # Conv1D
    ("gpt2", ["q", "v"], "LORA"),
    ("gpt_neox", ["q", "v"], "LORA"),
    ("bert", ["q", "v"], "ADALORA"),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("family", "targets", "form"), CASES, ids=str)
def test_ranks_down_to_0_are_saved_for_peft_and_for_us(
    family: str, targets: list[str], form: str, tmp_path: Path
) -> None:
    ranks = {"0": 0, "1": 3}  # by layer
    model = pruned(
        family, targets, lambda name: ranks[next(p for p in name.split(".") if p.isdigit())]
    )
    task = "SEQ_CLS" if family == "bert" else "CAUSAL_LM"
    save_adapter(
        tmp_path / "a",
        model,
        config(target_modules=targets),
        base_model_name_or_path="b",
        task_type=task,
    )
    want = logits(model)
    assert (want - logits(tiny(family))).abs().max() > 1e-2
    theirs = PeftModel.from_pretrained(tiny(family), str(tmp_path / "a"))
    assert theirs.peft_config["default"].peft_type == form
    torch.testing.assert_close(logits(theirs), want, atol=1e-5, rtol=0)
    ours = tiny(family)
    load_adapter(ours, tmp_path / "a")
    torch.testing.assert_close(logits(ours), want, atol=1e-5, rtol=0)
    for unmerged in (model, ours):
        for place, layer in adapted_modules(unmerged).items():
            unmerged.set_submodule(place, layer.merge())
        assert not adapter_layers(unmerged)
        torch.testing.assert_close(logits(unmerged), want, atol=1e-5, rtol=0)


def test_slices_of_a_fused_projection_have_separate_ranks() -> None:
    model = tiny("gpt2")
    inject(model, config(target_modules=["q", "v"]))
    layers = adapter_layers(model)
    assert set(layers) == {f"transformer.h.{i}.attn.c_attn.{role}" for i in (0, 1) for role in "qv"}
    hooks = allocation(layers)
    for step in range(1, 13):
        model.train()(input_ids=token_ids(seed=step)).logits.square().sum().backward()
        hooks.before_step(same)
        with torch.no_grad():
            for parameter in trainable_state(model).values():
                parameter -= 1e-3 * parameter.grad
        hooks.after_step(step)
        model.zero_grad()
    ranks = hooks.ranks()
    assert set(ranks) == set(layers)
    assert sum(ranks.values()) == 2 * len(layers)
