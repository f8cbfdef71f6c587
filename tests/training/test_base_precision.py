"""A quantized base: which of its layers are quantized, and the numbers of the model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lorakit import registry
from lorakit.anatomy import adaptable_modules, transformer_layers
from lorakit.base_weight import RowView
from lorakit.errors import UserError
from lorakit.injection import inject, trainable_state
from lorakit.layers import adapter_layers
from lorakit.methods.lora_layer import LoraLayer
from lorakit.models.nf4 import Nf4Linear
from lorakit.training.base_precision import quantize_fp8, quantize_nf4
from lorakit.training.fast_layers import fuse_layers
from tests.families import tiny, token_ids

CPU = torch.device("cpu")
SIZES = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}
BERT_SIZES = {"hidden_size": 128, "intermediate_size": 256}
SIZES_OF = {
    "llama": SIZES,
    "qwen2": SIZES | {"num_key_value_heads": 4},
    "roberta": BERT_SIZES | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
}


@pytest.fixture(autouse=True)
def installed() -> None:
    pytest.importorskip("bitsandbytes")


def adapted(family: str, method: str = "lora", **changes: Any) -> PreTrainedModel:
    model = tiny(family, **SIZES_OF.get(family, BERT_SIZES))
    config = registry.method(method).Config(
        method=method, target_modules=changes.pop("target_modules", ["all-linear"]), **changes
    )
    torch.manual_seed(1)
    inject(model, config)
    with torch.no_grad():
        for parameter in trainable_state(model).values():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def dequantized(model: nn.Module) -> nn.Module:
    """The same model with dense linear layers of the same values."""
    for name, module in list(model.named_modules()):
        if isinstance(module, Nf4Linear):
            dense = nn.Linear(module.in_features, module.out_features, device="meta")
            dense.weight = nn.Parameter(module.weight, requires_grad=False)
            dense.bias = None if module.bias is None else nn.Parameter(module.bias, False)
            model.set_submodule(name, dense)
            for view in model.modules():
                if isinstance(view, RowView) and view.module is module:
                    view.replace_module(dense)
    return model


def loss_and_gradients(model: Any) -> list[Tensor]:
    model.train()
    ids = token_ids()
    if "Classification" in type(model).__name__:
        loss = model(input_ids=ids, labels=torch.tensor([0, 2])).loss
    else:
        loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("lora", {}),
        ("lora", {"init": "pissa"}),
        ("lora_plus", {}),
        ("adalora", {}),
        ("dora", {}),
        ("moslora", {}),
        ("intrinsic", {}),
    ],
)
@pytest.mark.parametrize("family", ["llama", "roberta", "phi3"])
def test_a_model_computes_with_its_dequantized_weights(
    family: str, method: str, changes: dict[str, Any]
) -> None:
    model, reference = adapted(family, method, **changes), adapted(family, method, **changes)
    quantize_nf4(model, CPU)
    quantize_nf4(reference, CPU)
    found, wanted = loss_and_gradients(model), loss_and_gradients(dequantized(reference))
    assert len(found) == len(wanted) > 1
    for mine, dense in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, dense, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "family", ["llama", "qwen2", pytest.param("gpt_neox", marks=pytest.mark.slow)]
)
def test_compiled_layers_compute_with_the_dequantized_weights(family: str) -> None:
    """In qwen2, q, k and v have biases. In llama, k and v are not quantized, and q is alone."""
    model, reference = adapted(family).to(torch.bfloat16), adapted(family).to(torch.bfloat16)
    quantize_nf4(model, CPU)
    quantize_nf4(reference, CPU)
    fuse_layers(model)
    for layer in transformer_layers(model):
        layer.compile(backend="aot_eager")
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        found = loss_and_gradients(model)
    wanted = loss_and_gradients(dequantized(reference))
    assert float(found[0]) == pytest.approx(float(wanted[0]), rel=2e-2)
    for mine, dense in zip(found[1:], wanted[1:], strict=True):
        apart = (mine.float() - dense.float()).norm() / dense.float().norm()
        assert float(apart) < 5e-2
    quantized = [m for m in model.modules() if isinstance(m, Nf4Linear)]
    kept = {p.data_ptr() for p in model.parameters()}
    large = [x for x in saved if x.is_floating_point() and x.numel() >= 128 * 128]
    assert all(x.data_ptr() in kept for x in large), "no dequantized weight is saved"
    assert {x.data_ptr() for x in saved} >= {m.offset.data_ptr() for m in quantized}


@pytest.mark.slow
def test_compiled_dora_layers_compute_with_the_dequantized_weights() -> None:
    model, reference = adapted("qwen2", "dora"), adapted("qwen2", "dora")
    quantize_nf4(model, CPU)
    quantize_nf4(reference, CPU)
    for layer in transformer_layers(model):
        layer.compile(backend="aot_eager")
    found, wanted = loss_and_gradients(model), loss_and_gradients(dequantized(reference))
    for mine, dense in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, dense, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["lora", "adalora", "dora", "moslora"])
def test_no_dequantized_weight_is_saved_with_dropout(method: str) -> None:
    model, reference = (adapted("qwen2", method, lora_dropout=0.5) for _ in range(2))
    quantize_nf4(model, CPU)
    quantize_nf4(reference, CPU)
    saved: list[Tensor] = []
    torch.manual_seed(2)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        found = loss_and_gradients(model)
    kept = {p.data_ptr() for p in model.parameters()}
    large = [x for x in saved if x.is_floating_point() and x.numel() >= 128 * 128]
    assert all(x.data_ptr() in kept for x in large)
    torch.manual_seed(2)
    wanted = loss_and_gradients(dequantized(reference))
    for mine, dense in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, dense, rtol=1e-4, atol=1e-5)


def test_where_a_quantized_weight_is() -> None:
    """The norms of a DoRA layer are computed once for an unchanged W."""
    model = adapted("llama", "dora", target_modules=["q"])
    quantize_nf4(model, CPU)
    for layer in adapter_layers(model).values():
        assert isinstance(layer.base_layer, Nf4Linear)
        assert layer.base_state == layer.base_state
        assert layer.device == CPU
        assert not layer.is_meta


def test_stacked_layers_stay_usable_alone() -> None:
    model, alone = adapted("qwen2").to(torch.bfloat16), adapted("qwen2").to(torch.bfloat16)
    quantize_nf4(model, CPU)
    quantize_nf4(alone, CPU)
    fuse_layers(model)
    layers = adapter_layers(alone)
    groups: dict[object, list[str]] = {}
    x = torch.randn(3, 128).to(torch.bfloat16)
    for name, layer in adapter_layers(model).items():
        assert torch.equal(layer.dense_weight(), layers[name].dense_weight())
        if layer.in_features == 128:
            assert torch.equal(layer.base_layer(x), layers[name].base_layer(x))
        if isinstance(layer, LoraLayer) and layer.shared_input is not None:
            groups.setdefault(layer.shared_input, []).append(name.rpartition(".")[2])
    assert sorted(map(tuple, groups.values())) == 2 * [("gate_proj", "up_proj")] + 2 * [
        ("q_proj", "k_proj", "v_proj")
    ]


def test_parts_of_a_fused_projection_see_the_quantized_base() -> None:
    model = adapted("phi3", target_modules=["q", "v"])
    quantize_nf4(model, CPU)
    views = [m for m in model.modules() if isinstance(m, RowView)]
    assert len(views) == 4
    assert all(isinstance(view.module, Nf4Linear) for view in views)


def test_what_is_not_quantized() -> None:
    """In Llama's layers: k and v, which are small, and a layer that is fully trained."""
    model = adapted("llama", target_modules=["q", "v"], modules_to_save=["layers.1.mlp.up_proj"])
    assert quantize_nf4(model, CPU) == (
        "the weights of 9 linear layers are kept in nf4; 5 others, small or trained, are not "
        "quantized"
    )
    quantized = {n for n, m in model.named_modules() if isinstance(m, Nf4Linear)}
    assert "model.layers.0.self_attn.q_proj.base_layer" in quantized
    assert "model.layers.1.mlp.down_proj" in quantized
    assert len(quantized) == 9


def test_quantized_modules_remain_adaptable() -> None:
    """Advice about other targets names them too."""
    model = tiny("llama", **SIZES).requires_grad_(False)
    names = list(adaptable_modules(model))
    quantize_nf4(model, CPU)
    assert list(adaptable_modules(model)) == names


@pytest.mark.parametrize(
    ("family", "method", "changes"),
    [
        ("llama", "full", {"target_modules": None}),
        ("roberta", "bitfit", {"target_modules": None}),
        ("roberta", "lora", {"bias": "all"}),
        ("gpt2", "lora", {}),
    ],
)
def test_nothing_to_quantize(family: str, method: str, changes: dict[str, Any]) -> None:
    model = adapted(family, method, **changes)
    name = type(model).__name__
    for quantize, precision in ((quantize_fp8, "fp8"), (lambda m: quantize_nf4(m, CPU), "nf4")):
        with pytest.raises(
            UserError,
            match=f'base_precision = "{precision}": {name} has no frozen linear layer that '
            f"{precision} supports; allowed here: null$",
        ):
            quantize(model)
