"""The intrinsic method compared with theta_0 + P theta_d with an explicit P."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

import lorakit
from lorakit.errors import AdapterError, TargetError
from lorakit.injection import inject, trainable_state
from lorakit.kernels.fastfood import project
from lorakit.layers import AdapterLayer, adapter_layers
from lorakit.methods.intrinsic import METHOD
from tests.families import tiny
from tests.methods.pairs import config, injected, logits, loss, pair, save

INTRINSIC = config("intrinsic", d=24, projection_seed=3)


def written_out(size: int, d: int, seed: int, stream: int) -> torch.Tensor:
    """Return P (size, d), built column by column."""
    return torch.stack([project(column, size, seed, stream) for column in torch.eye(d)], dim=1)


def theta(model: nn.Module) -> nn.Parameter:
    (found,) = [p for name, p in model.named_parameters() if name.endswith(".theta")]
    return found


@pytest.mark.parametrize("module", [nn.Linear(6, 10), Conv1D(10, 6)], ids=["linear", "conv1d"])
def test_a_layer_is_the_formula(module: nn.Module) -> None:
    layer = METHOD.wrap(module, INTRINSIC, "layer")
    METHOD.link({"other": METHOD.wrap(nn.Linear(4, 5), INTRINSIC, "other"), "layer": layer})
    nn.init.normal_(layer.theta)
    P = written_out(60, 24, seed=3, stream=1)
    delta = (P @ layer.theta).view(10, 6)
    x = torch.randn(2, 4, 6, requires_grad=True)
    want = module(x) + x @ delta.t()
    torch.testing.assert_close(layer(x), want, atol=1e-5, rtol=1e-5)
    gradients = [
        torch.autograd.grad(out.square().sum(), [x, layer.theta], retain_graph=True)
        for out in (layer(x), want)
    ]
    for got, reference in zip(*gradients, strict=True):
        torch.testing.assert_close(got, reference, atol=1e-3, rtol=1e-4)
    merged = layer.fold(layer.weight)
    W = layer.weight if layer.kind == "linear" else layer.weight.t()
    own = merged if layer.kind == "linear" else merged.t()
    torch.testing.assert_close(own, W + delta)


def test_only_one_theta_of_zeros_is_trained_and_every_matrix_has_a_separate_stream() -> None:
    model = tiny("llama")
    before = logits(model)
    report = inject(model, INTRINSIC)
    assert report.trainable_parameters == 24
    assert list(trainable_state(model)) == ["model.layers.0.self_attn.q_proj.theta"]
    layers = list(adapter_layers(model).values())
    assert len(layers) == 14
    assert len({id(layer.theta) for layer in layers}) == 1
    assert [layer.stream for layer in layers] == list(range(14))
    assert torch.equal(logits(model), before)
    loss(model).backward()
    assert theta(model).grad is not None
    assert theta(model).grad.any()
    assert [n for n, p in model.named_parameters() if p.grad is not None] == list(
        trainable_state(model)
    )


def test_the_gradient_is_that_of_all_weights_projected() -> None:
    """The gradient is P^T g over all matrices, with g from a model that trains all its weights."""
    model, plain = injected("llama", INTRINSIC), tiny("llama")
    loss(model).backward()
    loss(plain).backward()
    layers = adapter_layers(model)
    want = torch.zeros(24)
    for stream, name in enumerate(layers):
        weight = plain.get_parameter(f"{name}.weight")
        want += written_out(weight.numel(), 24, 3, stream).t() @ weight.grad.flatten()
    torch.testing.assert_close(theta(model).grad, want, atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize("d", [50, 400])
def test_the_weights_of_each_matrix_move_by_the_root_mean_square_of_theta(d: int) -> None:
    """The rows of P have norm 1 for every d and size."""
    model = injected("llama", config("intrinsic", d=d), hidden_size=64, intermediate_size=96)
    nn.init.normal_(theta(model), generator=torch.Generator().manual_seed(0))
    want = theta(model).detach().square().mean().sqrt()
    for layer in adapter_layers(model).values():
        moved = layer.delta_weight().detach().square().mean().sqrt()
        torch.testing.assert_close(moved, want, rtol=0.15, atol=0)


@pytest.mark.parametrize("learning_rate", [1e-3, 1e-2])
def test_the_usual_learning_rates_train(learning_rate: float) -> None:
    model = injected("bert", config("intrinsic", d=100))
    for parameter in model.classifier.parameters():
        parameter.requires_grad_(False)
    optimizer = torch.optim.AdamW([theta(model)], learning_rate)
    losses = []
    for _ in range(10):
        value = (
            model(torch.arange(5, 19).view(2, 7)).logits - torch.tensor([1.0, -1.0, 0])
        ).square()
        value.mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(value.mean().item())
    assert losses[-1] < losses[0] - learning_rate * 5
    assert losses == sorted(losses, reverse=True)


def test_over_bfloat16_the_output_is_bfloat16_and_theta_float32() -> None:
    model = injected("llama", INTRINSIC, torch.bfloat16)
    assert theta(model).dtype == torch.float32
    out = model(torch.arange(5, 12).unsqueeze(0)).logits
    assert out.dtype == torch.bfloat16
    out.float().square().sum().backward()
    assert theta(model).grad.dtype == torch.float32


def layers_in_place() -> tuple[AdapterLayer, AdapterLayer, torch.Tensor]:
    layers = {name: METHOD.wrap(nn.Linear(6, 10), INTRINSIC, name) for name in "ab"}
    METHOD.link(layers)
    nn.init.normal_(layers["a"].theta)
    return layers["a"], layers["b"], torch.randn(3, 6)


def test_the_update_is_projected_once_where_nothing_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, _, x = layers_in_place()
    calls = []
    monkeypatch.setattr(
        "lorakit.methods.intrinsic_layer.project", lambda *args: calls.append(1) or project(*args)
    )
    with torch.no_grad():
        first = layer(x)
        assert torch.equal(layer(x), first)
        assert len(calls) == 1
        layer.eval().eval()
        layer(x)
    assert len(calls) == 2, "once more in evaluations, in all of them"
    trained = layer(x)
    assert torch.equal(trained, first)
    with torch.no_grad():
        layer(x)
    assert len(calls) == 4, "a training step keeps no copy"


@pytest.mark.parametrize("change", ["copy", "optimizer", "load", "replay"])
def test_a_cached_update_is_never_stale(change: str) -> None:
    layer, other, x = layers_in_place()
    with torch.no_grad():
        before = layer(x)
    if change == "copy":  # the best weights, put back before the last evaluation
        with torch.no_grad():
            layer.theta.copy_(layer.theta * 2)
    elif change == "load":
        layer.load_state_dict(layer.state_dict() | {"theta": layer.theta.detach() * 2})
    elif change == "replay":  # a graph calls no layer, and an evaluation follows
        layer.theta.grad = torch.ones_like(layer.theta)
        torch.optim.AdamW([layer.theta], 0.1, fused=True).step()
        layer.train()
        layer.eval()
    else:  # a step without this layer, such as an expert without tokens
        other(x).sum().backward()
        torch.optim.AdamW([layer.theta], 0.1, fused=True).step()
    with torch.no_grad():
        after = layer(x)
        layer.theta.copy_(layer.theta.clone())  # now it must be projected again
        assert torch.equal(after, layer(x))
    assert not torch.equal(after, before)


def test_an_update_cached_in_inference_mode_works_with_autograd() -> None:
    layer, _, x = layers_in_place()
    layer.requires_grad_(False)
    with torch.inference_mode():
        layer(x)
    x.requires_grad_(True)
    layer(x).sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_saved_and_loaded(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = pair(tmp_path, family, INTRINSIC, dtype)
    again = lorakit.load(tmp_path / "base", tmp_path / "adapter", trainable=True)
    saved, loaded = trainable_state(model), trainable_state(again)
    assert list(saved) == list(loaded)
    assert all(torch.equal(saved[key], loaded[key]) for key in saved)
    assert torch.equal(logits(again), logits(model))
    still = lorakit.load(tmp_path / "base", tmp_path / "adapter")
    assert not trainable_state(still)
    assert torch.equal(logits(still), logits(model))
    save(tmp_path / "more", again, INTRINSIC)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        first, second = (
            (f / "adapter" / name).read_text("latin1") for f in (tmp_path, tmp_path / "more")
        )
        assert first.replace(str(tmp_path / "base"), "") == second.replace(
            str(tmp_path / "more" / "base"), ""
        )


def test_the_files_hold_theta_once_and_the_order_of_the_streams(tmp_path: Path) -> None:
    """With twelve layers, sorting by name would put layer 10 before layer 2."""
    model = pair(tmp_path, "llama", INTRINSIC, num_hidden_layers=12)
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {name: tuple(t.shape) for name, t in tensors.items()} == {
        "base_model.model.theta": (24,)
    }
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert set(settings) == {
        "base_model_name_or_path", "d", "matrices", "modules_to_save", "peft_type",
        "projection_seed", "revision", "task_type",
    }  # fmt: skip
    assert (settings["peft_type"], settings["d"], settings["projection_seed"]) == (
        "INTRINSIC", 24, 3,
    )  # fmt: skip
    assert settings["matrices"] == list(adapter_layers(model))
    again = lorakit.load(tmp_path / "base", tmp_path / "adapter")
    streams = {name: layer.stream for name, layer in adapter_layers(again).items()}
    assert streams == {name: i for i, name in enumerate(settings["matrices"])}
    assert torch.equal(logits(again), logits(model))
    assert "PeftModel" not in (tmp_path / "adapter" / "README.md").read_text()


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_merged_equals_unmerged(family: str, tmp_path: Path) -> None:
    section = config("intrinsic", d=24, target_modules=["all-linear"])
    model = pair(tmp_path, family, section)
    lorakit.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(merged), logits(model), atol=1e-5, rtol=0)
    assert (logits(tiny(family)) - logits(model)).abs().max() > 1e-2, "theta does something"


@pytest.mark.parametrize(
    ("family", "targets", "message"),
    [
        ("gpt2", ["q"], r"c_attn\.q; allowed: conv1d, linear modules"),
        ("llama", ["embed_tokens"], "embed_tokens; allowed: conv1d, linear modules"),
    ],
)
def test_slices_and_embeddings_are_refused(family: str, targets: list[str], message: str) -> None:
    with pytest.raises(TargetError, match=message):
        injected(family, config("intrinsic", target_modules=targets))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"d": 23}, r"theta is \(24,\), and d = 23 needs \(23,\)"),
        ({"d": "24"}, 'd = "24": allowed: an integer from 1'),
        ({"projection_seed": -1}, "projection_seed = -1: allowed: an integer from 0"),
        ({"projection_seed": None}, "projection_seed = null"),
        ({"matrices": []}, r"matrices = \[\]: allowed: a list"),
        ({"matrices": ["a", "a"]}, "each once"),
        ({"matrices": ["model.layers.9.self_attn.q_proj"]}, "has no module for model.layers.9"),
        ({"matrices": ["model.embed_tokens"]}, "is an embedding: allowed: conv1d, linear"),
    ],
)
def test_files_that_do_not_fit_are_refused(
    settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    pair(tmp_path, "llama", INTRINSIC)
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    with pytest.raises(AdapterError, match=message):
        lorakit.load(tmp_path / "base", tmp_path / "adapter")


def test_tensors_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    pair(tmp_path, "llama", INTRINSIC)
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    extra = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    save_file(tensors | {extra: torch.zeros(1, 16)}, file)
    with pytest.raises(AdapterError, match=r"unknown tensors: .*q_proj\.lora_A\.weight"):
        lorakit.load(tmp_path / "base", tmp_path / "adapter")
    save_file({extra: torch.zeros(1, 16)}, file)
    with pytest.raises(AdapterError, match="missing tensor: theta"):
        lorakit.load(tmp_path / "base", tmp_path / "adapter")
