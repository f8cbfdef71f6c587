"""Conversion between adapter directories: equal logits, bit-equal round trips, and errors."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import lorakit
from lorakit.adapters.peft.schema import CONFIG, WEIGHTS
from lorakit.errors import AdapterError
from tests.adapters.directories import fresh, logits, peft_logits, write_pair

pytestmark = pytest.mark.filterwarnings("ignore")

#: Family, the recipe's keys, and the rank that the plain LoRA has.
FOLDED: dict[str, tuple[str, dict[str, Any], int]] = {
    "plain": ("llama", {"r": 8}, 8),
    "adalora": ("llama", {"method": "adalora", "init_r": 6, "target_r": 3}, 8),
    "adalora on slices": ("gpt2", {"method": "adalora", "target_modules": ["q", "v"]}, 32),
    "patterns": ("llama", {"r": 4, "rank_pattern": {"q_proj": 9}, "alpha_pattern": {"v_proj": 0.003}}, 16),
    "rslora": ("llama", {"r": 8, "use_rslora": True, "rank_pattern": {"q_proj": 3}}, 8),
    "pissa": ("llama", {"r": 4, "init": "pissa"}, 8),
    "moslora": ("llama", {"r": 4, "method": "moslora"}, 8),
    "q and v of c_attn": ("gpt2", {"r": 8, "target_modules": ["q", "v"]}, 16),
    "interleaved heads": ("gpt_neox", {"r": 4, "target_modules": ["q", "v"]}, 8),
    "embeddings": ("gpt2", {"r": 1, "target_modules": ["wte", "c_attn"]}, 1),
    "classifier": ("roberta", {"r": 8, "rank_pattern": {"query": 2}}, 8),
}  # fmt: skip


def edit(adapter: Path, **changes: Any) -> None:
    settings = json.loads((adapter / CONFIG).read_text())
    (adapter / CONFIG).write_text(json.dumps(settings | changes))


@pytest.mark.parametrize("case", FOLDED)
def test_a_plain_lora_has_one_rank_and_the_same_logits(case: str, tmp_path: Path) -> None:
    family, keys, r = FOLDED[case]
    base, adapter = write_pair(tmp_path, family, **keys)
    notes: list[str] = []
    report = lorakit.convert(adapter, tmp_path / "out", "lora", say=notes.append)
    want = logits(lorakit.load(base, adapter))
    assert (want - logits(fresh(base))).abs().max() > 1e-3, "the adapter does something"
    torch.testing.assert_close(peft_logits(base, tmp_path / "out"), want, atol=1e-5, rtol=0)
    ours = logits(lorakit.load(base, tmp_path / "out"))
    torch.testing.assert_close(ours, want, atol=1e-5, rtol=0)
    settings = json.loads((tmp_path / "out" / CONFIG).read_text())
    held = {key: settings.get(key) for key in ("peft_type", "r", "rank_pattern", "alpha_pattern")}
    assert held == {"peft_type": "LORA", "r": r, "rank_pattern": None, "alpha_pattern": None}
    assert not {"use_rslora", "use_dora", "bias"} & set(settings), "they are at PEFT's defaults"
    assert isinstance(settings["lora_alpha"], int)
    assert (report.r, report.lora_alpha) == (r, settings["lora_alpha"])
    heads = []
    for name, value in load_file(tmp_path / "out" / WEIGHTS).items():
        if match := re.search(r"\.lora_(?:embedding_)?([AB])(\.weight)?$", name):
            assert value.shape["AB".index(match[1])] == r, name
            assert (match[2] is None) == ("embedding" in name), name
        else:
            heads.append(name)
    assert bool(heads) == (case == "classifier")
    assert any("vLLM rejects" in note for note in notes) == (case == "classifier")
    assert report.notes == tuple(notes)


def test_a_lora_of_vllms_rank_keeps_its_bits(tmp_path: Path) -> None:
    _, adapter = write_pair(tmp_path, "llama", r=8, lora_alpha=20)
    report = lorakit.convert(adapter, tmp_path / "out", "lora")
    before, after = (load_file(folder / WEIGHTS) for folder in (adapter, tmp_path / "out"))
    assert before.keys() == after.keys()
    assert all(before[name].equal(after[name]) for name in before)
    assert (report.r, report.lora_alpha, report.notes) == (8, 20, ())


def test_padding_says_why(tmp_path: Path) -> None:
    _, adapter = write_pair(tmp_path, "llama", r=4)
    chosen = lorakit.convert(adapter, tmp_path / "chosen", "lora").notes
    why = "the smallest --max-lora-rank of vLLM that fits all matrices"
    assert chosen == (f"padded with zeros to r = 8, {why}: r was 4",)
    asked = lorakit.convert(adapter, tmp_path / "asked", "lora", rank=6).notes
    assert asked[0] == "padded with zeros to r = 6: r was 4"


def test_pruned_triplets_of_peft(tmp_path: Path) -> None:
    """One matrix lost some triplets and another lost all; PEFT writes the latter as empty tensors."""
    base, adapter = write_pair(
        tmp_path, "llama", method="adalora", target_modules=["q"], init_r=4, target_r=2
    )
    tensors = load_file(adapter / WEIGHTS)
    pattern = {}
    for layer, kept in ((0, [True, False, True, False]), (1, [False] * 4)):
        name = f"model.layers.{layer}.self_attn.q_proj"
        pattern[f"{name}.lora_E"] = kept
        for factor in "AEB":
            key = f"base_model.model.{name}.lora_{factor}"
            tensors[key] = tensors[key][:, kept] if factor == "B" else tensors[key][kept]
            tensors[key] = tensors[key].contiguous()
    save_file(tensors, adapter / WEIGHTS, metadata={"format": "pt"})
    edit(adapter, rank_pattern=pattern)
    want = logits(lorakit.load(base, adapter))
    lorakit.convert(adapter, tmp_path / "out", "lora")
    torch.testing.assert_close(peft_logits(base, tmp_path / "out"), want, atol=1e-5, rtol=0)


def test_a_forced_rank(tmp_path: Path) -> None:
    base, adapter = write_pair(tmp_path, "llama", r=4, rank_pattern={"q_proj": 6})
    with pytest.raises(AdapterError, match=r"--rank = 5: .*q_proj has r = 6; allowed: from 6"):
        lorakit.convert(adapter, tmp_path / "out", "lora", rank=5)
    assert not (tmp_path / "out").exists()
    assert lorakit.convert(adapter, tmp_path / "out", "lora", rank=6).r == 6
    want = logits(lorakit.load(base, adapter))
    torch.testing.assert_close(peft_logits(base, tmp_path / "out"), want, atol=1e-5, rtol=0)


def test_a_rank_beyond_vllms(tmp_path: Path) -> None:
    _, adapter = write_pair(tmp_path, "llama", r=520, target_modules=["q"])
    with pytest.raises(AdapterError, match=r"vLLM supports at most 512; hint: --rank 520"):
        lorakit.convert(adapter, tmp_path / "out", "lora")
    report = lorakit.convert(adapter, tmp_path / "out", "lora", rank=520)
    assert report.notes == ("r = 520: vLLM supports at most 512",)


@pytest.mark.parametrize(
    ("family", "keys", "exact"),
    [
        ("llama", {"r": 4}, True),
        ("llama", {"r": 4, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 8}}, False),
        ("gpt2", {"r": 4, "target_modules": ["q", "v"]}, True),
        ("gpt2", {"r": 4, "target_modules": ["wte", "c_attn"]}, True),
        ("gpt_neox", {"r": 4, "target_modules": ["q", "v"]}, True),
        ("phi3", {"r": 4, "target_modules": ["k", "v"]}, True),
        ("roberta", {"r": 4}, True),
        ("gpt2", {"r": 4, "target_modules": ["c_attn"], "bias": "all"}, True),
        ("gpt2", {"r": 4, "target_modules": ["v"], "bias": "lora_only"}, True),
        ("llama", {"r": 4, "rank_pattern": {"q_proj": 2}}, True),
    ],
)  # fmt: skip
def test_to_loralib_and_back(
    family: str, keys: dict[str, Any], exact: bool, tmp_path: Path
) -> None:
    """The round trip is exact without options, thanks to the metadata."""
    base, adapter = write_pair(tmp_path, family, **keys)
    notes: list[str] = []
    lorakit.convert(adapter, tmp_path / "lora.safetensors", "loralib", say=notes.append)
    lorakit.convert(tmp_path / "lora.safetensors", tmp_path / "out", "peft", say=notes.append)
    before, after = (load_file(folder / WEIGHTS) for folder in (adapter, tmp_path / "out"))
    assert before.keys() == after.keys()
    assert all(before[name].equal(after[name]) for name in before) == exact
    assert any("B is scaled" in note for note in notes) != exact
    want = logits(lorakit.load(base, adapter))
    torch.testing.assert_close(
        logits(lorakit.load(base, tmp_path / "out")), want, atol=1e-6, rtol=0
    )
    torch.testing.assert_close(peft_logits(base, tmp_path / "out"), want, atol=1e-5, rtol=0)


def test_a_directory_of_pefts_form_is_copied(tmp_path: Path) -> None:
    _, adapter = write_pair(tmp_path, "llama", method="adalora")
    (adapter / "optimizer.pt").write_bytes(b"not the adapter's")
    report = lorakit.convert(adapter, tmp_path / "out", "peft")
    assert "copied unchanged" in report.notes[0]
    for file in (tmp_path / "out").iterdir():
        assert file.read_bytes() == (adapter / file.name).read_bytes()
    assert {f.name for f in adapter.iterdir()} - {f.name for f in (tmp_path / "out").iterdir()} == {
        "optimizer.pt"
    }


@pytest.mark.parametrize(
    ("keys", "to", "message"),
    [
        ({"method": "dora"}, "lora", "dora is not a product of two factors; hint: lorakit merge "),
        ({"method": "dora"}, "loralib", "dora is not a product of two factors"),
        ({"method": "bitfit", "target_modules": None}, "lora", "bitfit is not a product of two factors"),
        ({"method": "full", "target_modules": ["c_attn"]}, "peft", "PEFT does not support full; hint: lorakit merge"),
        ({"method": "intrinsic", "d": 50}, "peft", "PEFT does not support intrinsic"),
        ({"target_modules": ["c_attn"], "bias": "lora_only"}, "lora", r"c_attn\.base_layer\.bias: a plain LoRA cannot store trained biases"),
        ({"target_modules": ["c_attn"], "bias": "all"}, "lora", "lorakit merge .* writes a plain model instead"),
        ({}, "onnx", "--to = onnx: allowed: lora, loralib, peft"),
    ],
)  # fmt: skip
def test_methods_that_a_format_cannot_express_are_rejected(
    keys: dict[str, Any], to: str, message: str, tmp_path: Path
) -> None:
    _, adapter = write_pair(tmp_path, "gpt2", **keys)
    with pytest.raises(AdapterError, match=message):
        lorakit.convert(adapter, tmp_path / "out", to)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "base"]


def with_tensor(adapter: Path, change: Any) -> None:
    tensors = load_file(adapter / WEIGHTS)
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    change(tensors, name)
    save_file(tensors, adapter / WEIGHTS, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, n: t.pop(n), r"missing tensor: .*q_proj: lora_A"),
        (lambda t, n: t.update({n: t[n][:3].contiguous()}), "lora_A is .3, 16. and lora_B .16, 4."),
        (lambda t, n: t.update({n: t[n][None]}), "allowed: a matrix of floating-point numbers"),
        (lambda t, n: t.update({n: t[n].int()}), "int32: allowed: a matrix of floating-point"),
        (lambda t, n: t[n].fill_(float("nan")), "contains NaN or infinite"),
        (lambda t, n: t.update({n.replace("lora_A", "lora_Z"): t[n].clone()}), "unknown tensor: .*lora_Z"),
    ],
)  # fmt: skip
def test_wrong_tensors(change: Any, message: str, tmp_path: Path) -> None:
    _, adapter = write_pair(tmp_path, "llama", r=4)
    with_tensor(adapter, change)
    with pytest.raises(AdapterError, match=message):
        lorakit.convert(adapter, tmp_path / "out", "lora")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, n: t.pop(n), r"missing tensor: .*q_proj: lora_A"),
        (lambda t, n: t.update({n: t[n].int()}), "int32: allowed: a matrix of floating-point"),
        (lambda t, n: t.update({n: t[n][:3].contiguous()}), "lora_A is .3, 16. and lora_B .16, 4."),
    ],
)
def test_wrong_tensors_are_not_copied(
    method: str, change: Any, message: str, tmp_path: Path
) -> None:
    _, adapter = write_pair(tmp_path, "llama", r=4, method=method)
    lorakit.convert(adapter, tmp_path / "good", "peft")
    with_tensor(adapter, change)
    with pytest.raises(AdapterError, match=message):
        lorakit.convert(adapter, tmp_path / "out", "peft")
    assert not (tmp_path / "out").exists()


def test_a_rank_that_the_configuration_does_not_say(tmp_path: Path) -> None:
    _, adapter = write_pair(tmp_path, "llama", r=4)
    edit(adapter, r=6)
    with pytest.raises(AdapterError, match=r"has r = 4, but 6 in adapter_config\.json"):
        lorakit.convert(adapter, tmp_path / "out", "lora")


@pytest.mark.parametrize("changes", [{"init_r": "x"}, {"init_r": 0}, {"lora_alpha": float("inf")}])
def test_a_scaling_that_adalora_cannot_have(changes: dict[str, Any], tmp_path: Path) -> None:
    _, adapter = write_pair(tmp_path, "llama", method="adalora")
    edit(adapter, **changes)
    with pytest.raises(AdapterError, match=r"allowed: (an integer above 0|a finite number)"):
        lorakit.convert(adapter, tmp_path / "out", "lora")


def test_a_scaling_beyond_float32(tmp_path: Path) -> None:
    _, adapter = write_pair(tmp_path, "llama", r=8)
    edit(adapter, alpha_pattern={"0.self_attn.q_proj": 1e300})
    for to in ("lora", "loralib"):
        with pytest.raises(AdapterError, match="lora_B exceeds the range of float32 when scaled"):
            lorakit.convert(adapter, tmp_path / "out", to)


def test_where_out_may_lie(tmp_path: Path) -> None:
    base, adapter = write_pair(tmp_path, "llama", r=4)
    for out in (adapter, adapter / "sub", tmp_path):
        with pytest.raises(AdapterError, match="must be outside of ADAPTER"):
            lorakit.convert(adapter, out, "lora", overwrite=True)
    with pytest.raises(AdapterError, match="not empty and not an adapter"):
        lorakit.convert(adapter, base, "lora", overwrite=True)
    with pytest.raises(AdapterError, match="not empty and not an adapter"):
        lorakit.convert(adapter, base / "model.safetensors", "loralib", overwrite=True)
    for to, out in (("lora", "o"), ("loralib", "l"), ("loralib", "l.safetensors")):
        lorakit.convert(adapter, tmp_path / out, to)
        with pytest.raises(
            AdapterError, match="already exists; hint: choose another, or pass --overwrite"
        ):
            lorakit.convert(adapter, tmp_path / out, to)
        lorakit.convert(adapter, tmp_path / out, to, overwrite=True)
    assert list(tmp_path.glob(".*")) == []
    with pytest.raises(AdapterError, match="is a loralib checkpoint; allowed: --to peft"):
        lorakit.convert(tmp_path / "l", tmp_path / "x", "loralib")
    with pytest.raises(AdapterError, match="--lora-alpha = 3: allowed: for a loralib checkpoint"):
        lorakit.convert(adapter, tmp_path / "x", "lora", lora_alpha=3)
    with pytest.raises(AdapterError, match="no such adapter directory or loralib checkpoint"):
        lorakit.convert(tmp_path / "none.pt", tmp_path / "x", "peft")
