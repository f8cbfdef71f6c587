"""A base in 4-bit NormalFloat on a GPU: numbers, memory, and what a pass keeps."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import lorakit
from lorakit.injection import inject, trainable_state
from lorakit.kernels.lora_linear import lora_linear
from lorakit.kernels.nf4 import dense, nf4_linear, quantize_weight, stacked
from lorakit.methods.lora import LoraConfig
from lorakit.models.nf4 import Nf4Linear
from lorakit.training.base_precision import quantize_nf4
from lorakit.training.fast_layers import compile_layers, fuse_layers
from tests.gpu.products import Factors, assert_close_to_formula, draw, draw_factors, relative

pytestmark = pytest.mark.gpu
pytest.importorskip("bitsandbytes")

SIZES = {
    "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 4,
    "num_attention_heads": 16, "num_key_value_heads": 4, "vocab_size": 512,
}  # fmt: skip
#: The bytes of the linear layers in bfloat16.
DENSE_BYTES = 2 * 4 * (1024 * (1024 + 256 + 256 + 1024) + 3 * 1024 * 2816)


def test_the_weight_is_that_of_bitsandbytes() -> None:
    import bitsandbytes

    W = draw(1000, 320)
    weight = bitsandbytes.nn.Params4bit(
        W.cpu(), requires_grad=False, compress_statistics=True, quant_type="nf4"
    ).to("cuda")
    wanted = bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)
    assert torch.equal(quantize_weight(W).dense(torch.bfloat16), wanted)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("outs", [(), (160,), (200, 72, 72)])
def test_products(outs: tuple[int, ...], with_bias: bool) -> None:
    """Without factors, of one layer, and of stacked ones, whose absmax blocks are not aligned."""
    torch.manual_seed(0)
    weights = [quantize_weight(draw(out, 128)) for out in outs or (160,)]
    W = torch.cat([weight.dense(torch.bfloat16) for weight in weights])
    assert torch.equal(dense(stacked(weights), torch.bfloat16), W)
    bias = draw(len(W)) if with_bias else None

    def product(x: Tensor, factors: Factors, scaling: list[float]) -> Tensor:
        if not factors:
            return nf4_linear(x, weights[0], bias)
        return torch.cat(lora_linear(x, stacked(weights), bias, factors, scaling), dim=1)

    assert_close_to_formula(product, W, bias, draw_factors(outs, 128, [8] * len(outs)), 1e-2)


def start_measuring() -> int:
    """Reset the peak; return the bytes that are allocated."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def adapted() -> LlamaForCausalLM:
    """On the CPU, in bfloat16."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES)).to(torch.bfloat16)
    inject(model, LoraConfig(r=8, target_modules=["all-linear"]))
    with torch.no_grad():
        for parameter in trainable_state(model).values():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model.train()


def quantized(mode: str) -> LlamaForCausalLM:
    """On the GPU, ``eager`` or ``compiled``, as a run prepares it."""
    model = adapted()
    quantize_nf4(model, torch.device("cuda"))
    model.to("cuda")
    if mode == "compiled":
        torch._dynamo.reset()
        fuse_layers(model)
        compile_layers(model)
    return model


def dequantized() -> nn.Module:
    model: nn.Module = quantized("eager")
    for name, module in list(model.named_modules()):
        if isinstance(module, Nf4Linear):
            plain = nn.Linear(module.in_features, module.out_features, False, device="meta")
            plain.weight = nn.Parameter(module.weight, requires_grad=False)
            model.set_submodule(name, plain)
    return model


def loss_and_gradients(model: Any, rows: int = 2) -> list[Tensor]:
    ids = torch.arange(rows * 64, device="cuda").view(rows, 64) % SIZES["vocab_size"]
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("mode", ["eager", "compiled"])
def test_a_model_computes_with_its_dequantized_weights(mode: str) -> None:
    found, wanted = loss_and_gradients(quantized(mode)), loss_and_gradients(dequantized())
    assert len(found) == len(wanted)
    assert float(found[0]) == pytest.approx(float(wanted[0]), rel=1e-2)
    for mine, reference in zip(found[1:], wanted[1:], strict=True):
        assert relative(mine, reference) < 5e-2


@pytest.mark.parametrize("mode", ["eager", "compiled"])
def test_no_dense_weight_is_kept(mode: str) -> None:
    """Between the passes, the memory holds no dense weight: neither one that autograd saved nor
    the model before it was quantized."""
    before = start_measuring()
    model = quantized(mode)
    assert torch.cuda.memory_allocated() - before < 0.5 * DENSE_BYTES
    if mode == "eager":
        assert torch.cuda.max_memory_allocated() - before < 0.5 * DENSE_BYTES
    loss_and_gradients(model)  # compiles, and allocates the gradients and what libraries need
    packed = {m.packed.data_ptr() for m in model.modules() if isinstance(m, Nf4Linear)}
    saved: list[Tensor] = []
    ids = torch.arange(16, device="cuda").view(2, 8)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        model(input_ids=ids, labels=ids).loss.backward()
    own = {p.data_ptr() for p in model.parameters()}
    smallest = 1024 * 256  # of k and v
    large = [x for x in saved if x.is_floating_point() and x.numel() >= smallest]
    assert all(x.data_ptr() in own for x in large)
    assert packed & {x.data_ptr() for x in saved}


@pytest.mark.parametrize("mode", ["eager", "compiled"])
def test_the_peak_is_lower_than_with_dense_weights(mode: str) -> None:
    peaks = []
    for build in (dequantized, lambda: quantized(mode)):
        before = start_measuring()
        model: Any = build()
        loss_and_gradients(model, rows=1)  # compiles, and sets up libraries
        torch.cuda.reset_peak_memory_stats()
        loss_and_gradients(model, rows=1)
        peaks.append(torch.cuda.max_memory_allocated() - before)
        del model
    assert peaks[1] < peaks[0] - 0.5 * DENSE_BYTES


@pytest.mark.parametrize("compiled", ["true", "false", "auto"])
def test_a_run(compiled: str, tiny_llama: Path, tmp_path: Path) -> None:
    """Learns, in each mode (auto chooses CUDA graphs), to about the same losses."""
    base = copy_of(tiny_llama, tmp_path / "base")
    rows = [{"prompt": f"{i} and", "completion": f" {i + 1} and"} for i in range(64)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    file = tmp_path / "recipe.yaml"
    file.write_text(f"""
model: {{name_or_path: {base}, dtype: bfloat16, base_precision: nf4}}
adapter: {{r: 4, target_modules: [all-linear]}}
task: {{name: completion, path: {{train: {tmp_path / "train.jsonl"}}}, max_length: 64}}
train:
  output_dir: {tmp_path / "run"}
  epochs: 2
  per_device_batch_size: 8
  learning_rate: 1.0e-2
  log_every_steps: 4
  compile: {compiled}
""")
    said: list[str] = []
    run = lorakit.train(lorakit.load_recipe(file), say=said.append)
    assert any("linear layers are kept in nf4" in line for line in said)
    assert not any("could not be captured" in line for line in said)
    lines = (run.output_dir / "metrics.jsonl").read_text().splitlines()
    losses = [line["loss"] for line in map(json.loads, lines) if "loss" in line]
    assert losses[-1] < 0.9 * losses[0]


def copy_of(tiny_llama: Path, folder: Path) -> Path:
    """The tiny Llama with matrices that nf4 supports."""
    from transformers import AutoTokenizer

    config = LlamaConfig.from_pretrained(tiny_llama)
    config.hidden_size, config.intermediate_size, config.head_dim = 256, 512, 64
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(folder)
    return folder
