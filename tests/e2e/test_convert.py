from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import lorakit
from lorakit.cli.main import run
from tests.adapters.directories import fresh, logits, write_adapter, write_base


def converted(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[str, str]:
    code = run(["convert", *map(str, arguments)])
    out, err = capsys.readouterr()
    assert code == 0, err
    return out, err


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert run(["convert", *map(str, arguments)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "Traceback" not in err
    return err


def test_round_trip(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = write_base(tmp_path / "base", "gpt2")
    adapter = write_adapter(base, tmp_path / "adapter", r=4, target_modules=["q", "v"])
    capsys.readouterr()
    out, _ = converted(capsys, adapter, tmp_path / "plain", "--to", "lora")
    assert out == f"{tmp_path}/plain: 2 matrices as lora, r = 8, lora_alpha = 32; 0.0 MB\n"
    file = tmp_path / "l.safetensors"
    out, _ = converted(capsys, adapter, file, "--to", "loralib", "--json")
    report = json.loads(out)
    assert (report["path"], report["r"], report["lora_alpha"]) == (str(file), 4, 16)
    assert report["size_bytes"] == file.stat().st_size
    converted(capsys, file, tmp_path / "back", "--to", "peft")
    before, after = (
        load_file(folder / "adapter_model.safetensors")
        for folder in (adapter, tmp_path / "back")
    )  # fmt: skip
    assert before.keys() == after.keys()
    assert all(before[name].equal(after[name]) for name in before)
    want = logits(lorakit.load(base, adapter))
    for out_dir in ("plain", "back"):
        have = logits(lorakit.load(base, tmp_path / out_dir))
        torch.testing.assert_close(have, want, atol=1e-5, rtol=0)


def test_a_loralib_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The file of loralib's documentation: torch.save(lora_state_dict(model)), scaled by hand."""
    torch.manual_seed(0)
    layer = lorakit.MergedLinear(
        16, 48, r=2, lora_alpha=5, enable_lora=[True, False, True], fan_in_fan_out=True
    )
    torch.nn.init.normal_(layer.lora_B)
    state = {
        f"transformer.h.1.attn.c_attn.{k}": v for k, v in lorakit.lora_state_dict(layer).items()
    }
    torch.save(state, tmp_path / "ckpt.pt")
    err = refused(capsys, tmp_path / "ckpt.pt", tmp_path / "out", "--to", "peft")
    assert err.startswith(f"error: {tmp_path}/ckpt.pt: transformer.h.1.attn.c_attn: ")
    assert err.count("\n") == 1
    assert "pass which ones as --enable-lora" in err
    assert not (tmp_path / "out").exists()
    base = write_base(tmp_path / "base", "gpt2")
    capsys.readouterr()
    out, err = converted(
        capsys, tmp_path / "ckpt.pt", tmp_path / "out", "--to", "peft", "--enable-lora", "1,0,1",
        "--lora-alpha", 5, "--base-model", base, "--task-type", "CAUSAL_LM", "--fan-in-fan-out",
    )  # fmt: skip
    assert (out.count("\n"), err) == (1, "")
    model = fresh(base)
    plain = model.transformer.h[1].attn.c_attn
    blocks = zip(layer.lora_B.split(16), layer.lora_A.split(2), strict=True)
    q, v = (5 / 2 * B.detach() @ A.detach() for B, A in blocks)
    plain.weight.data += torch.cat([q, torch.zeros_like(q), v]).t()
    ours = lorakit.load(None, tmp_path / "out")
    torch.testing.assert_close(logits(ours), logits(model), atol=1e-5, rtol=0)


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    out, _ = converted(capsys, "--help")
    text = " ".join(out.split())
    assert "only tensors are loaded (weights_only); no code in it is run" in text
    assert "lorakit convert gpt2_lora.pt out --to peft" in text


def test_invalid_arguments(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no such adapter" in refused(capsys, tmp_path / "x", tmp_path / "o", "--to", "lora")
    assert "--to = gguf: allowed: lora, loralib, peft" in refused(
        capsys, tmp_path, tmp_path / "o", "--to", "gguf"
    )
    assert "not an adapter" in refused(capsys, tmp_path, tmp_path.parent / "o", "--to", "lora")
    assert not (tmp_path / "o").exists()
