"""Adapters that were saved from ``state_dict()``: the adapter's name and the base in the file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, get_peft_model
from peft import LoraConfig as PeftLora
from safetensors.torch import load_file, save_file

import lorakit
from lorakit.errors import AdapterError
from tests.adapters.directories import fresh, logits, peft_logits, write_base
from tests.families import randomized, tiny

pytestmark = pytest.mark.filterwarnings("ignore")

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "fully trained": ("llama", {"target_modules": ["q_proj", "embed_tokens"], "modules_to_save": ["lm_head"]}),
    "biases": ("qwen2", {"target_modules": ["q_proj", "o_proj"], "bias": "all"}),
    "biases of targets": ("qwen2", {"target_modules": ["q_proj", "o_proj"], "bias": "lora_only"}),
    "dora": ("llama", {"target_modules": ["q_proj", "v_proj"], "use_dora": True}),
    "bias of B": ("qwen2", {"target_modules": ["q_proj"], "lora_bias": True}),
    "classifier": ("bert", {"target_modules": ["query"], "task_type": "SEQ_CLS"}),
}  # fmt: skip
#: What becomes of a name in ``state_dict()``.
NAMES: dict[str, Callable[[str], str]] = {
    "of PEFT's class": str,
    "of the base": lambda name: name.removeprefix("base_model.model."),
    "compiled": lambda name: name.replace("base_model.model.", "base_model.model._orig_mod."),
    "another adapter": lambda name: name.replace(".default", ".mine"),
}


def write_raw(folder: Path, family: str, config: Any, rename: Callable[[str], str]) -> torch.Tensor:
    """Write a base and an adapter with the renamed tensors of ``state_dict()``; return the logits
    of the adapted model."""
    write_base(folder / "base", family)
    model = get_peft_model(tiny(family), config)
    randomized(model)
    model.save_pretrained(folder / "adapter")
    stored = {rename(n): t.clone().contiguous() for n, t in model.state_dict().items()}
    save_file(stored, folder / "adapter" / "adapter_model.safetensors")
    return logits(model.eval())


@pytest.mark.parametrize("case", CASES)
def test_raw_names_are_read(case: str, tmp_path: Path) -> None:
    family, keys = CASES[case]
    config = PeftLora(**{"r": 4, "task_type": "CAUSAL_LM", **keys})
    want = write_raw(tmp_path, family, config, str)
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    torch.testing.assert_close(logits(lorakit.load(base, adapter)), want, atol=1e-5, rtol=0)
    lorakit.merge(base, adapter, tmp_path / "out")
    torch.testing.assert_close(logits(fresh(tmp_path / "out")), want, atol=1e-5, rtol=0)
    lorakit.convert(adapter, tmp_path / "peft", "peft")
    torch.testing.assert_close(peft_logits(base, tmp_path / "peft"), want, atol=1e-5, rtol=0)


@pytest.mark.parametrize("names", NAMES)
def test_names_of_other_wrappers(names: str, tmp_path: Path) -> None:
    config = PeftLora(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"])
    want = write_raw(tmp_path, "llama", config, NAMES[names])
    got = logits(lorakit.load(tmp_path / "base", tmp_path / "adapter"))
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)


def test_adalora(tmp_path: Path) -> None:
    config = AdaLoraConfig(
        init_r=4, target_r=2, total_step=10, target_modules=["q_proj"], task_type="CAUSAL_LM"
    )
    want = write_raw(tmp_path, "llama", config, str)
    got = logits(lorakit.load(tmp_path / "base", tmp_path / "adapter"))
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)


def test_several_adapters_in_one_file_are_refused(tmp_path: Path) -> None:
    write_raw(tmp_path, "llama", PeftLora(r=4, target_modules=["q_proj"]), str)
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    stored = load_file(file)
    more = {n.replace(".default.", ".other."): t.clone() for n, t in stored.items() if "lora_" in n}
    save_file(stored | more, file)
    with pytest.raises(AdapterError, match=r"contains several adapters \(default, other\)"):
        lorakit.load(tmp_path / "base", tmp_path / "adapter")
