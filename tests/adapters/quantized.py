"""Tiny quantized checkpoints, written with formulas of their own or by the quantizer itself."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from tests.families import tiny

#: Large enough for groups and blocks of several sizes.
SIZES = {"hidden_size": 128, "intermediate_size": 192, "head_dim": 32}
BITSANDBYTES: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4, nested": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "nf4 in bfloat16": {
        "load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_quant_storage": torch.bfloat16,
    },
    "int8": {"load_in_8bit": True},
}  # fmt: skip


def write_plain(folder: Path) -> Path:
    model = tiny("qwen2", **SIZES)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.1, generator=generator)
    model.save_pretrained(folder)
    return folder


def write_bitsandbytes(plain: Path, folder: Path, kind: str) -> Path:
    config = BitsAndBytesConfig(**BITSANDBYTES[kind])
    model = AutoModelForCausalLM.from_pretrained(
        plain, quantization_config=config, dtype=torch.float32
    )
    model.save_pretrained(folder)
    return folder


def quantized(
    plain: Path, folder: Path, kind: str, ends: tuple[str, ...] = ("_proj.weight",)
) -> dict[str, Tensor]:
    """Write ``plain`` with the matrices ``ends`` in the format ``kind``; return all tensors as they
    are when they are dequantized."""
    shutil.copytree(plain, folder)
    file = folder / "model.safetensors"
    stored, dense = {}, {}
    settings, split = _KINDS[kind]
    for name, value in load_file(file).items():
        if not name.endswith(ends):
            stored[name] = dense[name] = value
            continue
        parts, dense[name] = split(value)
        own = name.removesuffix("weight")
        stored |= {own + part: own_value.contiguous() for part, own_value in parts.items()}
    save_file(stored, file, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    return dense


_Split = tuple[dict[str, Tensor], Tensor]


def _fp8(W: Tensor, rows: int, columns: int, end: str) -> _Split:
    """e4m3 with a scale for each block of ``rows`` x ``columns``; the last ones may be smaller."""
    scale = torch.empty(-(-W.shape[0] // rows), -(-W.shape[1] // columns))
    values, dense = torch.empty_like(W, dtype=torch.float8_e4m3fn), torch.empty_like(W)
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            at = slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns)
            scale[i, j] = W[at].abs().max() / 448
            values[at] = (W[at] / scale[i, j]).to(torch.float8_e4m3fn)
            dense[at] = values[at].float() * scale[i, j]
    return {"weight": values, f"weight_{end}": scale}, dense


def _blocks(W: Tensor) -> _Split:
    parts, dense = _fp8(W, 80, 80, "scale_inv")
    return parts | {"activation_scale": torch.ones(1)}, dense


def _int8_rows(W: Tensor) -> _Split:
    scale = (W.abs().amax(1, keepdim=True) / 127).to(torch.bfloat16)
    q = (W / scale.float()).round().clamp(-128, 127).to(torch.int8)
    return {"weight": q, "weight_scale": scale}, q.float() * scale.float()


def _words(values: Tensor, order: tuple[int, ...] = tuple(range(8))) -> Tensor:
    """Pack 4-bit integers (n, m) into int32 (n, m / 8): nibble i holds column ``order[i]``."""
    words = torch.zeros(values.shape[0], values.shape[1] // 8, dtype=torch.int64)
    for nibble, column in enumerate(order):
        words |= values[:, column::8].long() << (4 * nibble)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def _grouped(W: Tensor, group: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """4-bit integers (out, in), scales and zeros (out, groups), and what they stand for."""
    blocks = W.view(len(W), -1, group)
    low, high = blocks.amin(-1), blocks.amax(-1)
    scale = ((high - low) / 15).to(torch.float16).float()
    zero = (-low / scale).round().clamp(1, 15)
    q = (blocks / scale[..., None] + zero[..., None]).round().clamp(0, 15)
    dense = ((q - zero[..., None]) * scale[..., None]).view_as(W)
    return q.view_as(W).to(torch.int32), scale, zero.to(torch.int32), dense


def _packed(W: Tensor) -> _Split:
    """compressed-tensors: signed integers are stored with 8 added, zeros packed along the rows."""
    q, scale, zero, dense = _grouped(W, 32)
    shape = torch.tensor(W.shape)
    parts = {
        "weight_packed": _words(q),
        "weight_scale": scale.to(torch.float16),
        "weight_shape": shape,
    }
    return parts | {"weight_zero_point": _words(zero.t()).t()}, dense


def _gptq(W: Tensor) -> _Split:
    """With the inputs in another order (``desc_act``), and zeros stored less one."""
    order = torch.randperm(W.shape[1], generator=torch.Generator().manual_seed(1))
    q, scale, zero, dense = _grouped(W[:, order], 32)
    back = order.argsort()
    parts = {
        "qweight": _words(q[:, back]).t(), "qzeros": _words((zero - 1).t()),
        "scales": scale.t().to(torch.float16), "g_idx": (back // 32).to(torch.int32),
    }  # fmt: skip
    return parts, dense[:, back]


def _awq(W: Tensor) -> _Split:
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    q, scale, zero, dense = _grouped(W, 32)
    parts = {"qweight": _words(q.t(), order), "qzeros": _words(zero.t(), order)}
    return parts | {"scales": scale.t().to(torch.float16)}, dense


def _groups(**weights: Any) -> dict[str, Any]:
    return {"quant_method": "compressed-tensors",
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}}  # fmt: skip


_KINDS: dict[str, tuple[dict[str, Any], Any]] = {
    "fp8, blocks": ({"quant_method": "fp8", "weight_block_size": [80, 80]}, _blocks),
    "fp8, matrix": ({"quant_method": "fp8"}, lambda W: _fp8(W, 1000, 1000, "scale_inv")),
    "compressed fp8": (
        _groups(type="float", num_bits=8, strategy="channel"), lambda W: _fp8(W, 1, 1000, "scale"),
    ),
    "compressed int8": (_groups(type="int", num_bits=8, strategy="channel"), _int8_rows),
    "compressed int4": (_groups(type="int", num_bits=4, strategy="group", group_size=32), _packed),
    "gptq": ({"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": True}, _gptq),
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}, _awq),
}  # fmt: skip
KINDS = tuple(_KINDS)
