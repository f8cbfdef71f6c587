"""An adapter against vLLM's rules."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import lorakit
from lorakit.api import check_vllm
from lorakit.cli.main import run
from tests.adapters.directories import write_adapter, write_base

pytestmark = pytest.mark.filterwarnings("ignore")


def quiet(_note: str) -> None:
    pass


#: Family, the recipe's keys, changes of the base, the rules that fail, and the command that helps.
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any], set[str], str]] = {
    "plain": ("llama", {"r": 8}, {}, set(), ""),
    "small rank": ("qwen2", {"r": 3, "target_modules": ["all-linear"]}, {}, set(), ""),
    "rslora": ("gemma2", {"r": 4, "use_rslora": True}, {"query_pre_attn_scalar": 4}, set(), ""),
    "embeddings": ("llama", {"r": 4, "target_modules": ["embed_tokens", "lm_head"]}, {}, set(), ""),
    "fused": ("phi3", {"r": 4}, {}, set(), ""),
    "ranks": ("llama", {"r": 8, "rank_pattern": {"q_proj": 4}}, {}, {"one_rank", "one_scaling"}, "convert"),
    "alphas": ("llama", {"r": 8, "alpha_pattern": {"q_proj": 4}}, {}, {"one_scaling"}, "convert"),
    "pissa": ("llama", {"r": 4, "init": "pissa"}, {}, {"one_rank"}, "convert"),
    "adalora": ("llama", {"method": "adalora", "init_r": 4, "target_r": 2}, {}, {"method", "one_rank"}, "convert"),
    "dora": ("llama", {"method": "dora", "r": 4}, {}, {"dora"}, "merge"),
    "bias": ("llama", {"r": 4, "bias": "all"}, {"attention_bias": True}, {"bias"}, "merge"),
    "head": ("llama", {"r": 4, "modules_to_save": ["lm_head"]}, {}, {"modules_to_save"}, "merge"),
    "classifier": ("roberta", {"r": 4}, {}, {"modules_to_save"}, "merge"),
    "embeddings of mistral": ("mistral", {"r": 4, "target_modules": ["embed_tokens"]}, {}, {"modules"}, "merge"),
    "no LoRA": ("gpt2", {"r": 4}, {}, {"modules"}, "merge"),
    "other method": ("llama", {"method": "bitfit"}, {"attention_bias": True}, {"method"}, "merge"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_rules(case: str, tmp_path: Path) -> None:
    family, keys, changes, failing, command = CASES[case]
    base = write_base(tmp_path / "base", family, **changes)
    adapter = write_adapter(base, tmp_path / "adapter", **keys)
    report = check_vllm(adapter, say=quiet)
    failed = {rule.rule: rule for rule in report.rules if rule.status == "failed"}
    assert failed.keys() == failing, report.rules
    assert report.ok == (not failing)
    for rule in failed.values():
        assert str(rule.run).startswith(f"lorakit {command} "), rule
    assert (report.serve is None) == bool(failing)


@pytest.mark.parametrize("case", ["ranks", "alphas", "pissa", "adalora"])
def test_convert_makes_it_fit(case: str, tmp_path: Path) -> None:
    family, keys, changes, _, _ = CASES[case]
    base = write_base(tmp_path / "base", family, **changes)
    adapter = write_adapter(base, tmp_path / "adapter", **keys)
    lorakit.convert(adapter, tmp_path / "out", "lora", say=quiet)
    report = check_vllm(tmp_path / "out", say=quiet)
    assert report.ok, report.rules
    assert report.serve == (
        f"vllm serve {base} --enable-lora --max-lora-rank 8 --lora-modules out={tmp_path / 'out'}"
    )


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = write_base(tmp_path / "base", "llama")
    adapter = write_adapter(base, tmp_path / "adapter", r=24)

    def checked(code: int, *more: str) -> tuple[str, str]:
        capsys.readouterr()
        assert run(["export", str(adapter), "--check", "vllm", *more]) == code
        return tuple(capsys.readouterr())

    out, _ = checked(0)
    assert "ok      max_lora_rank: r 24, max_lora_rank 512\n" in out
    assert "--enable-lora --max-lora-rank 32 --lora-modules" in out.splitlines()[-1]
    out, _ = checked(1, "--max-lora-rank", "16")
    assert (
        "failed  max_lora_rank: r 24, max_lora_rank 16; hint: start vLLM with --max-lora-rank 32"
        in out
    )
    assert out.endswith("vLLM cannot serve it as it is\n")
    report = json.loads(checked(1, "--max-lora-rank", "16", "--json")[0])
    assert report["ok"] is False
    assert {rule["status"] for rule in report["rules"]} == {"ok", "failed"}
    assert "--max-lora-rank = 24: allowed: 1, 8, 16" in checked(2, "--max-lora-rank", "24")[1]
    assert "--to hub: not allowed with --check vllm" in checked(2, "--to", "hub")[1]
    assert run(["export", str(adapter), "--check", "sglang"]) == 2
    assert "--check = sglang: allowed: vllm" in capsys.readouterr().err
    assert run(["export", str(base), "--check", "vllm"]) == 2
    assert "a model, not an adapter" in capsys.readouterr().err


def test_without_the_base(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", "llama")
    adapter = write_adapter(base, tmp_path / "adapter", r=8)
    base.rename(tmp_path / "moved")
    modules = {rule.rule: rule for rule in check_vllm(adapter, say=quiet).rules}["modules"]
    assert modules.status == "unknown"
    assert "which does not exist" in modules.found
    found = check_vllm(adapter, base=str(tmp_path / "moved"), say=quiet)
    assert found.ok and all(rule.status == "ok" for rule in found.rules)
    settings = json.loads((adapter / "adapter_config.json").read_text())
    settings["init_lora_weights"] = "pissa_niter_4"
    del settings["base_model_name_or_path"]
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    rules = {rule.rule: rule for rule in check_vllm(adapter, say=quiet).rules}
    assert rules["base_model_name"].status == "failed"
    assert rules["initialization"].status == "failed"
