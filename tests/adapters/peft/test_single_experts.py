"""Adapters of transformers 4, in which experts are linear layers, on models that stack them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn

import lorakit
from lorakit.adapters.peft.place import load_adapter
from lorakit.errors import AdapterError
from lorakit.layers import adapter_layers
from tests.families import logits
from tests.hybrids import hybrid

pytestmark = pytest.mark.filterwarnings("ignore")

NAMES = ("gate_proj", "up_proj", "down_proj")


def write_adapter(
    family: str, folder: Path, experts: tuple[int, ...] = (0, 1, 2, 3), **config: Any
) -> dict[str, torch.Tensor]:
    """Write an adapter of ``experts``, of routers, and of linear layers with the same names, as
    PEFT wrote it with transformers 4. A family with ``-`` has none of these layers, since PEFT 0.21
    takes them for experts."""
    family, only_experts = family.rstrip("-"), family.endswith("-")
    model, generator = hybrid(family), torch.Generator().manual_seed(0)
    names = ("w1", "w3", "w2") if family == "mixtral" else NAMES
    shapes: dict[str, tuple[int, int]] = {}
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in names and isinstance(module, nn.Linear):
            if only_experts:
                continue
            shapes[name] = (module.out_features, module.in_features)
        elif name.endswith(".experts"):
            block = name.removesuffix(".experts")
            if family == "mixtral":
                block = block.replace(".mlp", ".block_sparse_moe")
            hidden, inner = module.down_proj.shape[1:]
            for expert in experts:
                for own in names:
                    shape = (hidden, inner) if own in ("w2", "down_proj") else (inner, hidden)
                    shapes[f"{block}.experts.{expert}.{own}"] = shape
            if family in ("mixtral", "qwen3_moe"):
                shapes[f"{block}.gate"] = (len(module.down_proj), hidden)
    ranks = config.get("rank_pattern", {})
    tensors = {}
    for name, (rows, columns) in shapes.items():
        r = ranks.get(name.rpartition(".")[2], 4)
        for factor, shape in (("A", (r, columns)), ("B", (rows, r))):
            value = torch.randn(shape, generator=generator) * 0.2
            tensors[f"base_model.model.{name}.lora_{factor}.weight"] = value
    settings = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8,
        "target_modules": sorted({n if only_experts else n.rpartition(".")[2] for n in shapes}),
    }  # fmt: skip
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(settings | config))
    return tensors


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "deepseek_v3-"])
def test_the_logits_are_pefts(family: str, tmp_path: Path) -> None:
    write_adapter(family, tmp_path / "a")
    family = family.rstrip("-")
    model = hybrid(family)
    load_adapter(model, tmp_path / "a")
    assert (logits(model) - logits(hybrid(family))).abs().max() > 1e-2
    theirs = PeftModel.from_pretrained(hybrid(family), str(tmp_path / "a")).eval()
    torch.testing.assert_close(logits(model), logits(theirs), atol=1e-5, rtol=0)


@pytest.mark.parametrize("use_rslora", [False, True])
def test_some_experts_of_several_ranks_are_merged(use_rslora: bool, tmp_path: Path) -> None:
    """Merged into the checkpoint, which has single experts: W + scaling B A of each. PEFT does not
    read such an adapter."""
    hybrid("qwen3_next").save_pretrained(tmp_path / "base")
    factors = write_adapter(
        "qwen3_next", tmp_path / "a", (1, 2), use_rslora=use_rslora, rank_pattern={"up_proj": 2}
    )
    lorakit.merge(tmp_path / "base", tmp_path / "a", tmp_path / "out")
    before, merged = (load_file(tmp_path / n / "model.safetensors") for n in ("base", "out"))
    assert set(before) == set(merged)
    for name, weight in before.items():
        key = f"base_model.model.{name.removesuffix('.weight')}.lora_"
        want = weight
        if f"{key}A.weight" in factors:
            A, B = (factors[f"{key}{factor}.weight"] for factor in "AB")
            want = weight + 8 / (len(A) ** 0.5 if use_rslora else len(A)) * B @ A
            assert (want - weight).abs().max() > 1e-3
        torch.testing.assert_close(merged[name], want, atol=1e-6, rtol=0, msg=name)
    model = hybrid("qwen3_next")
    report = load_adapter(model, tmp_path / "a")
    ranks = {m.name.rpartition(".")[2]: m.r for m in report.adapted_modules}
    assert ranks["gate_up_proj"] == 6 and ranks["up_proj"] == 2
    layer = adapter_layers(model)["model.layers.0.mlp.experts.down_proj"]
    assert not layer.lora_B[[0, 3]].any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda key: key.replace("experts.3.", "experts.4."), "do not fit .*_proj of"),
        (lambda key: key.replace("3.up_proj.lora_B", "3.up_proj.lora_X"), r"missing tensors: .*_B"),
        (lambda key: key.replace("3.up_proj.", "3.up."), "no module for .*experts are stacked"),
    ],
)
def test_factors_that_do_not_fit(change: Any, message: str, tmp_path: Path) -> None:
    tensors = write_adapter("qwen3_moe", tmp_path / "a")
    renamed = {change(key): value for key, value in tensors.items()}
    save_file(renamed, tmp_path / "a" / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match=message):
        load_adapter(hybrid("qwen3_moe"), tmp_path / "a")
