"""LoRA+'s learning rates, and AdamW's formula with them."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from lorakit.errors import RecipeError
from lorakit.injection import inject, trainable_state
from lorakit.layers import adapter_layers
from lorakit.methods.base import RunHooks
from lorakit.methods.lora import Lora
from lorakit.methods.lora_plus import METHOD, LoraPlusConfig
from lorakit.recipe.load import load_recipe
from lorakit.recipe.sections import TrainSection
from lorakit.training.build import build_optimizer
from tests.families import tiny, token_ids

RATE = 1e-3


def section(**keys: Any) -> TrainSection:
    return TrainSection(**{"output_dir": "x", "learning_rate": RATE, **keys})


def groups(
    model: nn.Module, config: LoraPlusConfig, **train: Any
) -> tuple[dict[str, dict[str, Any]], list[dict[str, Any]]]:
    """Return each parameter's group, and all groups."""
    parameters: Any = trainable_state(model)
    found = METHOD.param_groups(parameters, adapter_layers(model), config, section(**train))
    names = {id(p): n for n, p in parameters.items()}
    by_name = {names[id(p)]: group for group in found for p in group["params"]}
    assert len(by_name) == sum(len(group["params"]) for group in found) == len(parameters)
    return by_name, found


def adapted(family: str = "llama", **keys: Any) -> tuple[nn.Module, LoraPlusConfig]:
    model, config = tiny(family), LoraPlusConfig(**{"r": 4, **keys})
    torch.manual_seed(0)
    inject(model, config)
    return model, config


@pytest.mark.parametrize("init", ["default", "b_gaussian", "pissa", "orthogonal"])
def test_b_has_the_ratio_whichever_factor_starts_at_zero(init: str) -> None:
    model, config = adapted(init=init, loraplus_lr_ratio=5, target_modules=["all-linear"])
    by_name, found = groups(model, config)
    for name, group in by_name.items():
        is_B = name.endswith("lora_B")
        assert group["lr"] == pytest.approx(RATE * (5 if is_B else 1))
        assert group["is_lora_B"] is is_B
    assert found[0]["lr"] == RATE, "the log's learning_rate is A's"
    assert len(found) == 2


def test_auto_is_of_each_matrix() -> None:
    """(n / m) * sqrt(n / r), n = in_features, m = out_features."""
    model, config = adapted(
        loraplus_lr_ratio="auto",
        target_modules=["q", "v", "down_proj", "up_proj"],
        rank_pattern={"v_proj": 2},
    )
    by_name, found = groups(model, config)
    want = {
        "q_proj": (16, 16, 4), "v_proj": (16, 8, 2), "up_proj": (16, 24, 4), "down_proj": (24, 16, 4),
    }  # fmt: skip
    seen = set()
    for name, group in by_name.items():
        module, factor = name.split(".")[-2:]
        n, m, r = want[module]
        ratio = n / m * math.sqrt(n / r) if factor == "lora_B" else 1
        assert group["lr"] == pytest.approx(RATE * ratio), name
        seen.add(module)
    assert seen == set(want)
    assert len(found) == 5


def test_a_head_has_as_rate_and_its_bias_no_decay() -> None:
    model, config = adapted("bert", bias="lora_only")
    by_name, found = groups(model, config, weight_decay=0.1)
    assert by_name["classifier.weight"]["lr"] == RATE
    assert by_name["classifier.weight"]["weight_decay"] == 0.1
    vectors = [n for n in by_name if n.endswith("bias")]
    assert len(vectors) == 5
    for name in vectors:
        assert by_name[name]["lr"] == RATE
        assert by_name[name]["weight_decay"] == 0.0
    assert all(g["weight_decay"] == 0.1 for n, g in by_name.items() if "lora_" in n)
    assert len(found) == 3


@pytest.mark.parametrize(
    ("rate", "want_A", "want_B"), [(3e-6, 3e-6, 3e-6), (None, RATE, 16 * RATE)]
)
def test_an_embedding_has_a_separate_rate(rate: float | None, want_A: float, want_B: float) -> None:
    model, config = adapted(target_modules=["q", "embed_tokens"], loraplus_lr_embedding=rate)
    by_name, _ = groups(model, config, weight_decay=0.1)
    assert by_name["model.embed_tokens.lora_A"]["lr"] == pytest.approx(want_A)
    assert by_name["model.embed_tokens.lora_B"]["lr"] == pytest.approx(want_B)
    assert by_name["model.layers.0.self_attn.q_proj.lora_B"]["lr"] == pytest.approx(16 * RATE)
    assert {group["weight_decay"] for group in by_name.values()} == {0.1}


def test_the_defaults_and_ratio_1() -> None:
    assert LoraPlusConfig().loraplus_lr_ratio == 16
    assert LoraPlusConfig().loraplus_lr_embedding == 1e-6
    assert LoraPlusConfig(loraplus_lr_ratio=1).loraplus_lr_embedding is None
    assert LoraPlusConfig(loraplus_lr_ratio=1.0).loraplus_lr_embedding is None
    asked = LoraPlusConfig(loraplus_lr_ratio=1, loraplus_lr_embedding=1e-5)
    assert asked.loraplus_lr_embedding == 1e-5


@pytest.mark.parametrize(
    ("keys", "names"),
    [
        ("loraplus_lr_ratio: 0", ("adapter.loraplus_lr_ratio = 0", "> 0", "auto")),
        ("loraplus_lr_ratio: atuo", ("adapter.loraplus_lr_ratio", "auto")),
        ("loraplus_lr_ratio: true", ("adapter.loraplus_lr_ratio", "auto")),
        ("loraplus_lr_embedding: -1", ("adapter.loraplus_lr_embedding = -1", "> 0")),
        ("loraplus_lr_rate: 4", ("adapter.loraplus_lr_rate", "'loraplus_lr_ratio'")),
    ],
)
def test_a_wrong_recipe_is_named(keys: str, names: tuple[str, ...], tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(
        f"model: {{name_or_path: m}}\nadapter: {{method: lora_plus, {keys}}}\n"
        "task: {name: text, path: x}\ntrain: {output_dir: run}\n"
    )
    with pytest.raises(RecipeError) as caught:
        load_recipe(file)
    assert all(name in str(caught.value) for name in names), caught.value


@pytest.mark.parametrize("ratio", [16, "auto"])
def test_a_step_is_adamw_s_formula_in_every_group(ratio: Any) -> None:
    """w <- w - lr * wd * w - lr * m / (sqrt(v) + eps), with the group's own lr, three times."""
    model, config = adapted(
        target_modules=["q", "down_proj", "embed_tokens"],
        loraplus_lr_ratio=ratio,
        loraplus_lr_embedding=0.1,
    )
    wd, eps, beta1, beta2 = 0.3, 1e-8, 0.9, 0.999
    by_name, found = groups(model, config, weight_decay=wd)
    optimizer = build_optimizer(found, section(weight_decay=wd))
    parameters = trainable_state(model)
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.normal_()
    want = {n: p.detach().double().clone() for n, p in parameters.items()}
    m, v = ({n: torch.zeros_like(w) for n, w in want.items()} for _ in range(2))
    for step in (1, 2, 3):
        optimizer.zero_grad()
        logits = model(input_ids=token_ids(seed=step)).logits
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.arange(14)).backward()
        for name, w in want.items():
            gradient = parameters[name].grad
            assert gradient is not None
            g, lr = gradient.double(), by_name[name]["lr"]
            m[name] = beta1 * m[name] + (1 - beta1) * g
            v[name] = beta2 * v[name] + (1 - beta2) * g**2
            unit = (m[name] / (1 - beta1**step)) / ((v[name] / (1 - beta2**step)).sqrt() + eps)
            w -= lr * wd * w + lr * unit
        optimizer.step()
        for name, w in want.items():
            torch.testing.assert_close(parameters[name].double(), w, atol=1e-5, rtol=1e-4)


def test_the_advice_names_the_ratio() -> None:
    assert (
        METHOD.advice(LoraPlusConfig(loraplus_lr_ratio=80))
        == "adapter.loraplus_lr_ratio (80) too high"
    )
    assert (
        METHOD.advice(LoraPlusConfig(loraplus_lr_ratio="auto"))
        == "adapter.loraplus_lr_ratio (auto) too high"
    )


def test_every_hook_of_the_method_that_it_wraps_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hooks of LoRA are used unchanged, except for the additional log values."""
    calls = []

    class Recorded(RunHooks):
        device_values = ("own",)

    def recorded(name: str) -> Any:
        def call(self: RunHooks, *arguments: Any) -> Any:
            calls.append(name)
            return {"own": 1.0} if name == "logged" else name

        return call

    names = [
        name for name in vars(RunHooks) if callable(getattr(RunHooks, name)) and name[0] != "_"
    ]
    for name in names:
        setattr(Recorded, name, recorded(name))
    monkeypatch.setattr(Lora, "hooks", lambda *_: Recorded())
    hooks = METHOD.hooks({}, LoraPlusConfig(), 10)
    assert hooks.device_values == ("own",)
    optimizer = SimpleNamespace(param_groups=[{"lr": 0.5, "is_lora_B": True}])
    arguments = {
        "before_step": [None], "after_step": [1], "is_final_form": [1], "load_state": [{}],
        "changed_ranks": [1, 2],
    }  # fmt: skip
    for name in names:
        result = getattr(hooks, name)(
            *arguments.get(name, [1, optimizer] if name == "logged" else [])
        )
        if name == "logged":
            assert result == {"own": 1.0, "learning_rate_B": 0.5}
        elif name not in ("after_step", "load_state"):
            assert result == name
    assert calls == names
