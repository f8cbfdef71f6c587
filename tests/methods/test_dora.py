"""The DoRA layer compared with the paper's formula, with the norm of the full matrix."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from lorakit.base_weight import as_matrix
from lorakit.errors import AdapterError
from lorakit.injection import inject, trainable_state
from lorakit.kernels import low_rank as kernel
from lorakit.layers import AdapterLayer, CompositeLayer
from lorakit.methods.dora import METHOD, DoraConfig
from tests.families import tiny, token_ids

MODULES = {
    "linear": lambda: nn.Linear(6, 10),
    "without bias": lambda: nn.Linear(6, 10, bias=False),
    "conv1d": lambda: Conv1D(10, 6),
    "embedding": lambda: nn.Embedding(6, 10),
}
every_module = pytest.mark.parametrize("kind", MODULES)


def wrapped(kind: str, **config: Any) -> AdapterLayer:
    module = MODULES[kind]().requires_grad_(False)
    if getattr(module, "bias", None) is not None:
        nn.init.normal_(module.bias)
    return METHOD.wrap(module, DoraConfig(**config), "layer")


def filled(kind: str, **config: Any) -> AdapterLayer:
    """Change all parameters, as training would."""
    layer = wrapped(kind, **config)
    with torch.no_grad():
        for parameter in (layer.lora_A, layer.lora_B, layer.lora_magnitude_vector):
            parameter.add_(torch.randn_like(parameter) * 0.5)
    return layer


def inputs(layer: AdapterLayer) -> tuple[torch.Tensor, torch.Tensor]:
    """Return an input of the layer, and the same as rows x of y = W x."""
    if layer.kind == "embedding":
        ids = torch.tensor([[1, 5, 3], [0, 1, 1]])
        return ids, F.one_hot(ids, 6).float()
    x = torch.randn(2, 3, 6)
    return x, x


def reference(layer: AdapterLayer, x: torch.Tensor) -> torch.Tensor:
    """The paper's formula (DoRA, sections 4.1 and 4.3), with a constant norm."""
    adapted = layer.dense_weight() + layer.scaling * layer.lora_B @ layer.lora_A
    norm = torch.linalg.vector_norm(adapted.detach(), dim=1, keepdim=True)
    return F.linear(x, layer.lora_magnitude_vector[:, None] * adapted / norm, layer.bias)


@every_module
def test_the_layer_is_the_formula(kind: str) -> None:
    layer = filled(kind, r=3, lora_alpha=5)
    given, x = inputs(layer)
    W = layer.dense_weight()
    W_, A, B, m, x_ = (
        t.detach().double().numpy()
        for t in (W, layer.lora_A, layer.lora_B, layer.lora_magnitude_vector, x)
    )
    adapted = W_ + 5 / 3 * B @ A
    want = x_ @ (m[:, None] * adapted / np.linalg.norm(adapted, axis=1, keepdims=True)).T
    want += 0 if layer.bias is None else layer.bias.double().numpy()
    np.testing.assert_allclose(layer(given).detach().numpy(), want, atol=1e-5)
    np.testing.assert_allclose(reference(layer, x).detach().numpy(), want, atol=1e-5)


@every_module
def test_the_gradients_equal_autograds_with_a_constant_norm(kind: str) -> None:
    layer = filled(kind, r=3)
    given, x = inputs(layer)
    into = [layer.lora_A, layer.lora_B, layer.lora_magnitude_vector]
    if kind != "embedding":
        into.append(given.requires_grad_())
    weights = torch.randn(2, 3, 10)
    got = torch.autograd.grad((layer(given).square() * weights).sum(), into)
    want = torch.autograd.grad((reference(layer, x).square() * weights).sum(), into)
    for mine, other in zip(got, want, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-4, rtol=1e-4)


def test_a_scaled_embedding_scales_the_complete_output() -> None:
    from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

    base = Gemma3TextScaledWordEmbedding(6, 10, 0, embed_scale=3.0)
    layer = METHOD.wrap(base.requires_grad_(False), DoraConfig(r=2), "layer")
    nn.init.normal_(layer.lora_A)
    ids, x = inputs(layer)
    torch.testing.assert_close(layer(ids), reference(layer, x) * 3, atol=1e-5, rtol=1e-5)


@every_module
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("init", ["default", "b_gaussian", "pissa", "orthogonal"])
def test_the_start_is_the_base(kind: str, dtype: torch.dtype, init: str) -> None:
    """The output is bit-equal if one factor is zero; m is ||W|| for every init."""
    module = MODULES[kind]().to(dtype)
    layer = METHOD.wrap(module, DoraConfig(r=4, init=init), "layer")
    given, _ = inputs(layer)
    given = given if kind == "embedding" else given.to(dtype)
    before, after = module(given), layer(given)
    assert after.dtype == dtype
    if init in ("default", "b_gaussian"):
        assert torch.equal(before, after)
    torch.testing.assert_close(after, before, atol=0.05 if dtype != torch.float32 else 1e-5, rtol=0)
    norms = as_matrix(module, module.weight).float().norm(dim=1)
    torch.testing.assert_close(layer.lora_magnitude_vector.detach(), norms, atol=1e-5, rtol=1e-5)
    assert layer.lora_magnitude_vector.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_norm_of_each_row(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "CHUNK_ELEMENTS", 64 * 7)  # more than one chunk, the last shorter
    W, A, B = torch.randn(48, 64).to(dtype), torch.randn(5, 64), torch.randn(48, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = kernel.row_norms(W, kernel.row_squares(W), A, B, 0.3)
    want = (W.double() + 0.3 * B.double() @ A.double()).norm(dim=1)
    torch.testing.assert_close(got.double(), want, atol=0, rtol=2e-6)


def test_rows_without_a_norm_divide_nothing_by_zero() -> None:
    """One row of W is zero, and the update cancels another."""
    layer = wrapped("without bias", r=2)
    with torch.no_grad():
        layer.weight[0] = 0
        layer.lora_B[1, 0] = -1 / layer.scaling
        layer.lora_A[0] = layer.weight[1]
    out = layer(torch.randn(4, 6))
    out.square().sum().backward()
    assert out.isfinite().all()
    assert all(p.grad.isfinite().all() for p in layer.parameters() if p.requires_grad)
    assert layer.fold(layer.weight).isfinite().all()
    assert not out[:, 0].any()


def test_the_norms_of_w_are_taken_once_and_again_when_w_changes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layer = filled("linear", r=2)
    x, _ = inputs(layer)
    layer(x)
    with monkeypatch.context() as patch:
        patch.setattr(torch.linalg, "vector_norm", lambda *_: pytest.fail("taken again"))
        layer(x)
    with torch.no_grad():
        layer.weight.mul_(3)
    torch.testing.assert_close(layer(x), reference(layer, x), atol=1e-5, rtol=1e-5)
    layer.double()
    torch.testing.assert_close(
        layer(x.double()), reference(layer, x.double()), atol=1e-5, rtol=1e-5
    )
    layer.float().base_layer.weight = nn.Parameter(torch.randn(10, 6), requires_grad=False)
    torch.testing.assert_close(layer(x), reference(layer, x), atol=1e-5, rtol=1e-5)
    assert not any("squares" in name for name in layer.state_dict())
    assert layer.to("meta").norms().is_meta


def test_a_change_of_m_below_bfloat16_resolution_is_not_lost() -> None:
    """1.003 is not representable in bfloat16; its neighbours are 1 and 1.0078."""
    module = nn.Linear(64, 512, bias=False, dtype=torch.bfloat16)
    layer = METHOD.wrap(module, DoraConfig(r=2), "layer")
    x = torch.randn(64, 64, dtype=torch.bfloat16)
    before = layer(x).float()
    with torch.no_grad():
        layer.lora_magnitude_vector.mul_(1.003)
    # Each value is rounded, but their projection on the old ones is correct on average.
    ratio = (layer(x).float() * before).sum() / before.square().sum()
    assert ratio.item() == pytest.approx(1.003, abs=5e-4)


def test_it_compiles_into_one_graph() -> None:
    layer = filled("linear", r=2)
    x, _ = inputs(layer)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x), atol=1e-5, rtol=1e-5)


def _fused(family: str) -> tuple[nn.Module, dict[str, CompositeLayer]]:
    model = tiny(family)
    inject(model, DoraConfig(r=2, target_modules=["q", "v"]))
    with torch.no_grad():
        for parameter in trainable_state(model).values():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model, {n: m for n, m in model.named_modules() if isinstance(m, CompositeLayer)}


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "phi3"])
def test_parts_of_a_fused_projection_are_one_layer_on_all_of_it_and_back(family: str) -> None:
    """The rows of k keep their norms; q and v are restored bit for bit."""
    _, layers = _fused(family)
    assert layers
    for fused in layers.values():
        whole = fused.joined()
        x = torch.randn(3, fused.in_features)
        torch.testing.assert_close(whole(x), fused(x), atol=1e-5, rtol=1e-5)
        parts = {role: (fused.rows(role), part.r) for role, part in fused.parts.items()}
        again = whole.split(parts)
        for role, part in again.parts.items():
            for name in ("lora_A", "lora_B", "lora_magnitude_vector"):
                assert torch.equal(getattr(part, name), getattr(fused.parts[role], name))
        merged = fused.fold(fused.weight)
        torch.testing.assert_close(whole.fold(whole.weight), merged, atol=1e-6, rtol=0)


def test_a_magnitude_outside_of_the_parts_is_refused() -> None:
    _, layers = _fused("gpt2")
    fused = next(iter(layers.values()))
    whole = fused.joined()
    parts = {role: (fused.rows(role), part.r) for role, part in fused.parts.items()}
    with torch.no_grad():
        whole.lora_magnitude_vector[16] *= 1.1  # the first row of k
    with pytest.raises(
        AdapterError, match="q, v do not cover all changes by lora_magnitude_vector"
    ):
        whole.split(parts)


def test_rank_pattern_bias_and_a_bfloat16_base() -> None:
    model = tiny("bert").to(torch.bfloat16)
    config = DoraConfig(r=4, rank_pattern={"0.attention.self.query": 2}, bias="lora_only")
    before = model(input_ids=token_ids()).logits.float()
    inject(model, config)
    after = model(input_ids=token_ids()).logits  # the head is trained, in float32
    torch.testing.assert_close(after, before, atol=1e-2, rtol=1e-2)
    model.train()(input_ids=token_ids()).logits.float().square().sum().backward()
    trained = trainable_state(model)
    query = "bert.encoder.layer.0.attention.self.query"
    assert trained[f"{query}.lora_A"].shape == (2, 16)
    assert any("bias" in name and "query" in name for name in trained)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained.values())
