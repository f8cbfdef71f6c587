from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from lorakit.cli.main import run
from tests.adapters.directories import write_adapter, write_base, write_pair

MODULE_KEYS = [
    "module", "layer", "role", "shape", "r", "effective_rank", "norm_A", "norm_B", "norm_delta",
    "amplification",
]  # fmt: skip


def printed(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    capsys.readouterr()
    code = run(["inspect", *map(str, arguments)])
    out, err = capsys.readouterr()
    assert code == 0, err
    return out


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    capsys.readouterr()
    assert run(["inspect", *map(str, arguments)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ") and err.count("\n") == 1, err
    return err


def numbers(value: Any) -> list[float]:
    if isinstance(value, dict):
        return [n for item in value.values() for n in numbers(item)]
    if isinstance(value, list):
        return [n for item in value for n in numbers(item)]
    return [value] if isinstance(value, float) else []


def test_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, one = write_pair(tmp_path, "llama", r=4, target_modules=["q", "v"])
    two = write_adapter(base, tmp_path / "two", seed=1, r=2, target_modules=["q", "v"])
    report = json.loads(printed(capsys, one, "--json"))
    assert list(report) == ["adapter", "method", "base", "modules", "similarity"]
    assert (report["adapter"], report["method"], report["base"]) == (str(one), "lora", str(base))
    assert report["similarity"] is None
    assert all(list(m) == MODULE_KEYS and m["amplification"] is None for m in report["modules"])
    report = json.loads(printed(capsys, one, two, "--base", base, "--json"))
    assert all(m["amplification"] > 0 for m in report["modules"])
    assert report["modules"][1]["shape"] == [8, 16]
    similarity = report["similarity"]
    assert list(similarity) == ["other", "side", "modules"]
    assert (similarity["other"], similarity["side"]) == (str(two), "right")
    for m in similarity["modules"]:
        assert list(m) == ["module", "phi", "projection_metric", "control_phi"]
        assert [len(m["phi"]), len(m["phi"][0])] == [4, 2]
    assert all(map(math.isfinite, numbers(report)))


def test_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, one = write_pair(tmp_path, "llama", r=4, target_modules=["q", "v"])
    lines = printed(capsys, one, one, "--base", base, "--side", "left").splitlines()
    assert lines[0] == f"{one}: lora, 4 matrices, base {base}"
    assert lines[1].split() == [
        "matrix", "r", "eff.", "rank", "|A|", "|B|", "|dW|", "amplification"
    ]  # fmt: skip
    assert [line.split()[:2] for line in lines[2:6]] == [
        [f"model.layers.{i}.self_attn.{role}_proj", "4"] for i in (0, 1) for role in "qv"
    ]
    assert "left-singular vectors of B" in lines[6]
    assert lines[8].split()[1] == "1.000"


def test_many_matrices_are_grouped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = write_base(tmp_path / "base", "llama", num_hidden_layers=21)
    keys = {"method": "adalora", "init_r": 4, "target_r": 2, "target_modules": ["q", "up_proj"]}
    adapter = write_adapter(base, tmp_path / "adapter", **keys)
    lines = printed(capsys, adapter, adapter).splitlines()
    assert [line.split()[:2] for line in lines[3:5]] == [["up_proj", "(21)"], ["q", "(21)"]]
    assert lines[5] == "ranks (· 0, █ 4):"
    assert lines[6].split() == ["role", "layers", "0", "to", "20", "mean"]
    assert lines[7].split() == ["up_proj", "█" * 21, "4.0"]
    assert [line.split()[0] for line in lines[-2:]] == ["up_proj", "q"]


def test_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, adapter = write_pair(tmp_path, "llama", r=4, target_modules=["q"])
    assert "no such adapter directory" in refused(capsys, tmp_path / "nothing")
    assert "a model, not an adapter" in refused(capsys, base)
    assert "no such adapter directory" in refused(capsys, adapter, tmp_path / "nothing")
    gpt2 = write_base(tmp_path / "gpt2", "gpt2")
    other = write_adapter(gpt2, tmp_path / "other", r=4)
    assert "has no matrix in common with" in refused(capsys, adapter, other)
    assert "does not fit the model" in refused(capsys, adapter, "--base", gpt2)
    assert "no such directory" in refused(capsys, adapter, "--base", tmp_path / "nothing")
    assert "side = up: allowed: right, left" in refused(capsys, adapter, "--side", "up")
    (adapter / "adapter_model.safetensors").write_bytes(b"\x08")
    assert "corrupt or truncated" in refused(capsys, adapter)


@pytest.mark.parametrize("method", ["bitfit", "full", "intrinsic"])
def test_methods_without_factors(
    method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = write_base(tmp_path / "base", "bert")
    keys = {} if method == "intrinsic" else {"target_modules": None}
    adapter = write_adapter(base, tmp_path / "adapter", method=method, **keys)
    assert f"{method} has no low-rank factors; allowed: adapters of LoRA" in refused(
        capsys, adapter
    )
