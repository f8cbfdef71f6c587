"""PiSSA, OLoRA and ``lora_bias``: equal to PEFT's own reload, loaded and merged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig as PeftLora
from peft import get_peft_model

import lorakit
from lorakit.errors import AdapterError
from tests.adapters.directories import fresh, logits, peft_logits, write_base
from tests.families import randomized, tiny

pytestmark = pytest.mark.filterwarnings("ignore")

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "pissa": ("llama", {"target_modules": ["q_proj", "up_proj"], "init_lora_weights": "pissa"}),
    "pissa, ranks": (
        "llama",
        {
            "target_modules": ["q_proj", "down_proj"], "init_lora_weights": "pissa",
            "use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"down_proj": 3},
        },
    ),
    "pissa, Conv1D": (
        "gpt2",
        {"target_modules": ["c_attn"], "init_lora_weights": "pissa", "fan_in_fan_out": True},
    ),
    "pissa, embedding": (
        "llama", {"target_modules": ["embed_tokens", "v_proj"], "init_lora_weights": "pissa"},
    ),
    "olora": ("llama", {"target_modules": ["k_proj", "down_proj"], "init_lora_weights": "olora"}),
    "bias": ("qwen2", {"target_modules": ["q_proj", "v_proj"], "lora_bias": True}),
    "bias, Conv1D": (
        "gpt2", {"target_modules": ["c_attn"], "lora_bias": True, "fan_in_fan_out": True},
    ),
    "bias, classifier": (
        "bert", {"target_modules": ["query"], "lora_bias": True, "task_type": "SEQ_CLS"},
    ),
}  # fmt: skip


def write_variant(folder: Path, family: str, **keys: Any) -> tuple[Path, Path]:
    """Write a base and an adapter of PEFT with random values; return both directories."""
    base = write_base(folder / "base", family)
    config = PeftLora(**{"r": 4, "lora_alpha": 6, "task_type": "CAUSAL_LM", **keys})
    model = get_peft_model(tiny(family), config)
    randomized(model)
    model.save_pretrained(folder / "adapter")
    return base, folder / "adapter"


@pytest.mark.parametrize("case", CASES)
def test_equal_to_the_reload_of_peft(case: str, tmp_path: Path) -> None:
    family, keys = CASES[case]
    base, adapter = write_variant(tmp_path, family, **keys)
    want = peft_logits(base, adapter)
    torch.testing.assert_close(logits(lorakit.load(base, adapter)), want, atol=1e-5, rtol=0)
    lorakit.merge(base, adapter, tmp_path / "out")
    torch.testing.assert_close(logits(fresh(tmp_path / "out")), want, atol=1e-5, rtol=0)
    assert (want - logits(fresh(base))).abs().max() > 1e-3, "the adapter does something"


@pytest.mark.parametrize("case", ["olora", "bias"])
def test_weights_apply_to_the_whole_update(case: str, tmp_path: Path) -> None:
    family, keys = CASES[case]
    base, adapter = write_variant(tmp_path, family, **keys)
    lorakit.merge(base, adapter, tmp_path / "out", weight=0.25, add=[(adapter, 0.75)])
    got = logits(fresh(tmp_path / "out"))
    torch.testing.assert_close(got, peft_logits(base, adapter), atol=1e-5, rtol=0)


def test_switching_leaves_the_base_as_it_is(tmp_path: Path) -> None:
    base, adapter = write_variant(tmp_path, *CASES["pissa"][:1], **CASES["pissa"][1])
    model = lorakit.load(base, {"one": adapter, "two": adapter})
    torch.testing.assert_close(logits(model), peft_logits(base, adapter), atol=1e-5, rtol=0)
    lorakit.switch(model, None)
    assert torch.equal(logits(model), logits(fresh(base)))
    lorakit.switch(model, "two", merged=True)
    torch.testing.assert_close(logits(model), peft_logits(base, adapter), atol=1e-5, rtol=0)


def test_an_approximation_from_random_values_is_announced(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, adapter = write_variant(
        tmp_path, "llama", target_modules=["q_proj"], init_lora_weights="pissa_niter_16"
    )
    one, two = (logits(lorakit.load(base, adapter)) for _ in range(2))
    assert torch.equal(one, two)
    torch.testing.assert_close(one, peft_logits(base, adapter), atol=1e-2, rtol=0)
    assert "new random values each time" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"init_lora_weights": "loftq"}, 'init_lora_weights = "loftq": not supported; allowed: true'),
        ({"init_lora_weights": "pissa_niter_x"}, "not supported"),
        ({"init_lora_weights": "pissa", "use_dora": True}, "not supported with use_dora = true"),
        ({"lora_bias": True}, r"missing tensors: .*q_proj.lora_B.bias"),
    ],
    ids=str,
)  # fmt: skip
def test_what_cannot_be_read(keys: dict[str, Any], said: str, tmp_path: Path) -> None:
    base, adapter = write_variant(
        tmp_path, "llama", target_modules=["q_proj"], use_dora=bool(keys.get("use_dora"))
    )
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | keys))
    with pytest.raises(AdapterError, match=said):
        lorakit.load(base, adapter)


def test_a_bias_without_one_in_the_base_is_not_merged(tmp_path: Path) -> None:
    base, adapter = write_variant(tmp_path, "llama", target_modules=["q_proj"], lora_bias=True)
    got = logits(lorakit.load(base, adapter))
    torch.testing.assert_close(got, peft_logits(base, adapter), atol=1e-5, rtol=0)
    with pytest.raises(AdapterError, match=r"q_proj has no bias in the base.*without merging it"):
        lorakit.merge(base, adapter, tmp_path / "out")
    model = lorakit.load(base, {"one": adapter})
    with pytest.raises(AdapterError, match=r"not merged in place; allowed: merged=False"):
        lorakit.switch(model, "one", merged=True)


@pytest.mark.parametrize("case", ["pissa, ranks", "olora"])
def test_converted_to_plain_lora_of_twice_the_rank(case: str, tmp_path: Path) -> None:
    family, keys = CASES[case]
    base, adapter = write_variant(tmp_path, family, **keys)
    named = adapter / "adapter_config.json"
    named.write_text(
        json.dumps(json.loads(named.read_text()) | {"base_model_name_or_path": str(base)})
    )
    want = peft_logits(base, adapter)
    report = lorakit.convert(adapter, tmp_path / "plain", "lora")
    assert report.r == 8
    torch.testing.assert_close(peft_logits(base, tmp_path / "plain"), want, atol=1e-5, rtol=0)
    inspected = lorakit.inspect(adapter)
    assert {module.r for module in inspected.modules} <= {4, 8}
    assert all(module.effective_rank > 0 for module in inspected.modules)
    lorakit.merge(base, adapter, tmp_path / "out", add=[(adapter, 0.0)], method="svd", svd_rank=8)
    torch.testing.assert_close(logits(fresh(tmp_path / "out")), want, atol=1e-4, rtol=0)


def test_a_bias_is_not_converted(tmp_path: Path) -> None:
    family, keys = CASES["bias"]
    base, adapter = write_variant(tmp_path, family, **keys)
    with pytest.raises(AdapterError, match=r"lora_bias.*hint: lorakit merge"):
        lorakit.convert(adapter, tmp_path / "out", "lora")
    assert lorakit.convert(adapter, tmp_path / "same", "peft").matrices
    assert torch.equal(peft_logits(base, tmp_path / "same"), peft_logits(base, adapter))
