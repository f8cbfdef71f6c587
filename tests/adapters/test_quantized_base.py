"""Adapters of bases whose checkpoints are quantized: loaded, merged and trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig as PeftLora
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils.quantization_config import FineGrainedFP8Config

import lorakit
from lorakit.errors import AdapterError, ModelError
from tests.adapters.directories import logits, write_adapter
from tests.adapters.quantized import BITSANDBYTES, KINDS, quantized, write_bitsandbytes, write_plain
from tests.families import randomized

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base that is not quantized, and an adapter for it."""
    folder = tmp_path_factory.mktemp("plain")
    base = write_plain(folder / "base")
    return base, write_adapter(base, folder / "adapter", r=4, target_modules=["q", "up_proj"])


def loaded(folder: Path, **options: Any) -> PreTrainedModel:
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    assert not any(info.values()), info
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    found: PreTrainedModel = model.eval()
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_every_format(kind: str, plain: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = plain
    dense = quantized(base, tmp_path / "base", kind)
    model = lorakit.load(tmp_path / "base", adapter, dtype="float32")
    with torch.no_grad():
        for name, value in dense.items():
            own = name.replace("q_proj.", "q_proj.base_layer.").replace(
                "up_proj.", "up_proj.base_layer."
            )
            torch.testing.assert_close(model.get_parameter(own), value, atol=1e-6, rtol=1e-5)
    said: list[str] = []
    report = lorakit.merge(
        tmp_path / "base", adapter, tmp_path / "out", dtype="float32", say=said.append
    )
    assert "dequantized into float32; the merged model is not quantized" in said[0]
    assert report.dtype == "float32"
    merged = logits(loaded(tmp_path / "out", dtype="auto"))
    torch.testing.assert_close(merged, logits(model), atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", BITSANDBYTES)
def test_bitsandbytes(kind: str, plain: tuple[Path, Path], tmp_path: Path) -> None:
    """The values are those of bitsandbytes, bit for bit in 4 bits."""
    functional = pytest.importorskip("bitsandbytes.functional")
    base = write_bitsandbytes(plain[0], tmp_path / "base", kind)
    theirs = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    ours = lorakit.load(base, plain[1], dtype="float32")
    for name, module in theirs.named_modules():
        if not name.endswith("k_proj"):
            continue
        weight = module.weight
        if kind == "int8":
            want = functional.int8_vectorwise_dequant(weight.data, weight.SCB)
        else:
            want = functional.dequantize_4bit(weight.data, weight.quant_state).float()
        tolerance = 1e-6 if kind == "int8" else 0
        torch.testing.assert_close(ours.get_submodule(name).weight, want, atol=tolerance, rtol=0)
    lorakit.merge(base, plain[1], tmp_path / "out")
    merged = loaded(tmp_path / "out", dtype="auto")
    assert merged.dtype == torch.bfloat16
    want = logits(ours)
    assert (logits(merged).float() - want).abs().max() < 0.05 * want.abs().max()


def test_fp8_is_what_transformers_dequantizes(plain: tuple[Path, Path], tmp_path: Path) -> None:
    base = tmp_path / "base"
    quantized(plain[0], base, "fp8, matrix")
    config = FineGrainedFP8Config(dequantize=True, weight_block_size=None)
    theirs = AutoModelForCausalLM.from_pretrained(
        base, quantization_config=config, dtype=torch.float32
    )
    ours = lorakit.load(base, plain[1], dtype="float32")
    name = "model.layers.0.mlp.down_proj"
    torch.testing.assert_close(ours.get_submodule(name).weight, theirs.get_submodule(name).weight)


def test_rows_of_a_quantized_output_layer(plain: tuple[Path, Path], tmp_path: Path) -> None:
    """Rows of tokens replace those of the base, and a new one is appended."""
    base, adapter, out = (tmp_path / name for name in ("base", "adapter", "out"))
    quantized(plain[0], base, "gptq", ("_proj.weight", "lm_head.weight"))
    model = AutoModelForCausalLM.from_pretrained(plain[0])
    size = model.config.vocab_size
    model.resize_token_embeddings(size + 1)
    rows = {"embed_tokens": [3, size], "lm_head": [3, size]}
    config = PeftLora(
        target_modules=["q_proj"], trainable_token_indices=rows, task_type="CAUSAL_LM"
    )
    randomized(get_peft_model(model, config)).save_pretrained(adapter, save_embedding_layers=False)
    lorakit.merge(base, adapter, out, dtype="float32", say=lambda note: None)
    stored = load_file(adapter / "adapter_model.safetensors")
    [values] = [v for name, v in stored.items() if "lm_head" in name and "trainable_tokens" in name]
    assert torch.equal(load_file(out / "model.safetensors")["lm_head.weight"][[3, size]], values)
    found = loaded(out, dtype="auto")
    want = logits(lorakit.load(base, adapter, dtype="float32"))
    torch.testing.assert_close(logits(found), want, atol=1e-4, rtol=0)


def test_inspect_reads_the_base(plain: tuple[Path, Path], tmp_path: Path) -> None:
    quantized(plain[0], tmp_path / "base", "gptq")
    report = lorakit.inspect(plain[1], base=str(tmp_path / "base"))
    assert all(module.amplification for module in report.modules)


@pytest.mark.parametrize(
    ("quantization", "said"),
    [
        (
            {"quant_method": "hqq"},
            'quant_method = "hqq": its weights cannot be read; allowed: bits',
        ),
        ({"quant_method": "gptq", "bits": 3}, "bits = 3: allowed: 2, 4, 8"),
        ({"quant_method": "awq", "version": "gemv"}, "version = gemv: allowed: 4, gemm"),
        ({"quant_method": "gptq"}, "quantization_config = .*'bits'"),
        ({"quant_method": 7}, "quant_method = "),
        ({"quant_method": "fp8", "weight_block_size": [8]}, r"block size \[8\]: allowed: two int"),
        ({"quant_method": "fp8", "weight_block_size": "x"}, "malformed"),
        (
            {"load_in_4bit": True},
            r"qweight is I32, but not quantized as .* \(bitsandbytes \(4 bits",
        ),
        ({"quant_method": "compressed-tensors", "config_groups": [1]}, "malformed"),
    ],
    ids=str,
)
def test_formats_that_are_not_read(
    quantization: dict[str, Any], said: str, plain: tuple[Path, Path], tmp_path: Path
) -> None:
    base = tmp_path / "base"
    quantized(plain[0], base, "gptq")
    settings = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(settings | {"quantization_config": quantization}))
    for attempt in (lorakit.load, lambda b, a: lorakit.merge(b, a, tmp_path / "out")):
        with pytest.raises((ModelError, AdapterError), match=said) as raised:
            attempt(base, plain[1])
        assert "\n" not in str(raised.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("part", ["scales", "qzeros", "g_idx"])
def test_corrupt_parts(part: str, plain: tuple[Path, Path], tmp_path: Path) -> None:
    base = tmp_path / "base"
    quantized(plain[0], base, "gptq")
    stored = load_file(base / "model.safetensors")
    name = next(name for name in stored if name.endswith(part))
    stored[name] = stored[name][:1].clone() + (1000 if part == "g_idx" else 0)
    save_file(stored, base / "model.safetensors", metadata={"format": "pt"})
    for attempt in (lorakit.load, lambda b, a: lorakit.merge(b, a, tmp_path / "out")):
        with pytest.raises(
            ModelError, match=r"_proj.weight: corrupt gptq \(4 bits\) weights: "
        ) as raised:
            attempt(base, plain[1])
        assert "\n" not in str(raised.value)
