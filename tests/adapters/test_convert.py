"""Conversions between forms: equal logits, equal bits on the way back, and every refusal."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lorakit
from lorakit.errors import AdapterError
from tests.adapters.directories import fresh, logits, write_adapter, write_base
from tests.families import token_ids

pytestmark = pytest.mark.filterwarnings("ignore")

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
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


def made(folder: Path, family: str, **keys: Any) -> tuple[Path, Path]:
    """The base's directory and the adapter's; of AdaLoRA with some triplets pruned."""
    base = write_base(folder / "base", family)
    return base, write_adapter(base, folder / "adapter", **keys)


def in_peft(base: Path, adapter: Path) -> Tensor:
    labels = {"num_labels": 3} if "score" in str(list(load_file(adapter / WEIGHTS))) else {}
    return logits(PeftModel.from_pretrained(fresh(base, **labels), str(adapter)).eval())


def edit(adapter: Path, **changes: Any) -> None:
    settings = json.loads((adapter / CONFIG).read_text())
    (adapter / CONFIG).write_text(json.dumps(settings | changes))


@pytest.mark.parametrize("case", FOLDED)
def test_a_plain_lora_has_one_rank_and_the_same_logits(case: str, tmp_path: Path) -> None:
    family, keys, r = FOLDED[case]
    base, adapter = made(tmp_path, family, **keys)
    notes: list[str] = []
    report = lorakit.convert(adapter, tmp_path / "out", "lora", say=notes.append)
    want = logits(lorakit.load(base, adapter))
    assert (want - logits(fresh(base))).abs().max() > 1e-3, "the adapter does something"
    torch.testing.assert_close(in_peft(base, tmp_path / "out"), want, atol=1e-5, rtol=0)
    ours = logits(lorakit.load(base, tmp_path / "out"))
    torch.testing.assert_close(ours, want, atol=1e-5, rtol=0)
    settings = json.loads((tmp_path / "out" / CONFIG).read_text())
    held = {key: settings[key] for key in ("peft_type", "r", "rank_pattern", "alpha_pattern")}
    assert held == {"peft_type": "LORA", "r": r, "rank_pattern": {}, "alpha_pattern": {}}
    assert (settings["use_rslora"], settings["use_dora"], settings["bias"]) == (
        False,
        False,
        "none",
    )
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
    assert any("vLLM refuses" in note for note in notes) == (case == "classifier")
    assert report.notes == tuple(notes)


def test_a_lora_of_vllms_rank_keeps_its_bits(tmp_path: Path) -> None:
    _, adapter = made(tmp_path, "llama", r=8, lora_alpha=20)
    report = lorakit.convert(adapter, tmp_path / "out", "lora")
    before, after = (load_file(folder / WEIGHTS) for folder in (adapter, tmp_path / "out"))
    assert before.keys() == after.keys()
    assert all(before[name].equal(after[name]) for name in before)
    assert (report.r, report.lora_alpha, report.notes) == (8, 20, ())


def test_pruned_triplets_of_peft(tmp_path: Path) -> None:
    """One matrix lost some, one has none left, which PEFT writes as tensors without values."""
    base, adapter = made(
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
    torch.testing.assert_close(in_peft(base, tmp_path / "out"), want, atol=1e-5, rtol=0)


def test_a_forced_rank(tmp_path: Path) -> None:
    base, adapter = made(tmp_path, "llama", r=4, rank_pattern={"q_proj": 6})
    with pytest.raises(AdapterError, match=r"--rank = 5: .*q_proj has r = 6; allowed: from 6"):
        lorakit.convert(adapter, tmp_path / "out", "lora", rank=5)
    assert not (tmp_path / "out").exists()
    assert lorakit.convert(adapter, tmp_path / "out", "lora", rank=6).r == 6
    want = logits(lorakit.load(base, adapter))
    torch.testing.assert_close(in_peft(base, tmp_path / "out"), want, atol=1e-5, rtol=0)


def test_a_rank_beyond_vllms(tmp_path: Path) -> None:
    _, adapter = made(tmp_path, "llama", r=520, target_modules=["q"])
    with pytest.raises(AdapterError, match=r"vLLM takes 512 at most; --rank 520"):
        lorakit.convert(adapter, tmp_path / "out", "lora")
    report = lorakit.convert(adapter, tmp_path / "out", "lora", rank=520)
    assert report.notes == ("r = 520: vLLM takes 512 at most",)


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
    """Bit for bit, without an option: the metadata says what the names and shapes do not."""
    base, adapter = made(tmp_path, family, **keys)
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
    torch.testing.assert_close(in_peft(base, tmp_path / "out"), want, atol=1e-5, rtol=0)


def test_loralib_layers_take_the_file(tmp_path: Path) -> None:
    """r, lora_alpha and enable_lora of the metadata in the constructors, then load_state_dict."""
    base, adapter = made(tmp_path, "gpt2", r=4, lora_alpha=12, target_modules=["q", "v"])
    report = lorakit.convert(adapter, tmp_path / "out", "loralib")
    assert report.path == tmp_path / "out" / "lora.safetensors"
    assert (report.r, report.lora_alpha) == (4, 12)
    with safe_open(report.path, "pt") as opened:
        told = {k: json.loads(v) for k, v in opened.metadata().items() if k != "format"}
    model = fresh(base)
    for name, enable in told["enable_lora"].items():
        rows = lorakit.MergedLinear(
            16, 48, r=told["r"], lora_alpha=told["lora_alpha"], enable_lora=enable,
            fan_in_fan_out=told["fan_in_fan_out"],
        )  # fmt: skip
        rows.load_state_dict(model.get_submodule(name).state_dict(), strict=False)
        model.set_submodule(name, rows)
    missing = model.load_state_dict(load_file(report.path), strict=False)
    assert missing.unexpected_keys == []
    want = logits(lorakit.load(base, adapter))
    torch.testing.assert_close(logits(model.eval()), want, atol=1e-6, rtol=0)


def trained(model: nn.Module, layers: dict[str, nn.Module], bias: Any = "none") -> nn.Module:
    """``model`` with loralib's layers in place of its own, trained for some steps."""
    for name, layer in layers.items():
        plain = model.get_submodule(name)
        layer.load_state_dict(plain.state_dict(), strict=False)
        model.set_submodule(name, layer)
    lorakit.mark_only_lora_as_trainable(model, bias=bias)
    if hasattr(model, "classifier"):
        model.classifier.requires_grad_(True)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
    for step in range(4):
        ids = token_ids(4, seed=step)
        labels = ids[:, 0] % 3 if hasattr(model, "classifier") else ids
        model.train()(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def gpt2_layers(**enable: Any) -> dict[str, nn.Module]:
    torch.manual_seed(0)
    merged = {"r": 2, "lora_alpha": 6, "fan_in_fan_out": True, "enable_lora": [True, False, True]}
    return {
        "transformer.wte": lorakit.Embedding(64, 16, r=3, lora_alpha=6),
        "transformer.h.0.attn.c_attn": lorakit.MergedLinear(16, 48, **(merged | enable)),
        "transformer.h.1.attn.c_proj": lorakit.Linear(
            16, 16, r=2, lora_alpha=6, fan_in_fan_out=True
        ),
    }


GPT2_OPTIONS: dict[str, Any] = {
    "lora_alpha": 6, "enable_lora": ["q,v"], "fan_in_fan_out": True, "say": lambda text: None
}  # fmt: skip


@pytest.mark.parametrize("bias", ["none", "lora_only", "all"])
def test_a_trained_loralib_model(bias: Any, tmp_path: Path) -> None:
    """Linear, MergedLinear and Embedding: in PEFT the logits that the layers gave."""
    base = write_base(tmp_path / "base", "gpt2")
    model = trained(fresh(base), gpt2_layers(), bias)
    assert (logits(model) - logits(fresh(base))).abs().max() > 1e-2
    torch.save({"model_state_dict": lorakit.lora_state_dict(model, bias)}, tmp_path / "l.pt")
    lorakit.convert(
        tmp_path / "l.pt", tmp_path / "out", "peft", base_model=str(base), **GPT2_OPTIONS
    )
    torch.testing.assert_close(in_peft(base, tmp_path / "out"), logits(model), atol=1e-5, rtol=0)
    ours = lorakit.load(None, tmp_path / "out")
    torch.testing.assert_close(logits(ours), logits(model), atol=1e-5, rtol=0)
    assert json.loads((tmp_path / "out" / CONFIG).read_text())["bias"] == bias
    if bias == "none":
        lorakit.convert(tmp_path / "l.pt", tmp_path / "plain", "lora", **GPT2_OPTIONS)
        torch.testing.assert_close(
            in_peft(base, tmp_path / "plain"), logits(model), atol=1e-5, rtol=0
        )


def test_a_trained_loralib_classifier(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", "roberta")
    torch.manual_seed(0)
    names = [
        f"roberta.encoder.layer.{i}.attention.self.{q}" for i in (0, 1) for q in ("query", "value")
    ]
    model = trained(fresh(base), {n: lorakit.Linear(16, 16, r=2, lora_alpha=3) for n in names})
    head = {f"classifier.{k}": v for k, v in model.classifier.state_dict().items()}
    stored = {f"module.{k}": v for k, v in {**lorakit.lora_state_dict(model), **head}.items()}
    save_file(stored, tmp_path / "l.safetensors")
    notes: list[str] = []
    lorakit.convert(
        tmp_path / "l.safetensors", tmp_path / "out", "peft", lora_alpha=3, base_model=str(base),
        say=notes.append,
    )  # fmt: skip
    settings = json.loads((tmp_path / "out" / CONFIG).read_text())
    assert (settings["task_type"], settings["modules_to_save"]) == ("SEQ_CLS", ["classifier"])
    assert [note.split(",")[0] for note in notes] == ["module.", "task_type = SEQ_CLS"]
    torch.testing.assert_close(in_peft(base, tmp_path / "out"), logits(model), atol=1e-5, rtol=0)
    ours = lorakit.load(base, tmp_path / "out")
    torch.testing.assert_close(logits(ours), logits(model), atol=1e-5, rtol=0)


def test_one_enabled_projection_is_named(tmp_path: Path) -> None:
    """Its shapes are a Linear's: only the option tells it from one."""
    base = write_base(tmp_path / "base", "gpt2")
    layers = gpt2_layers(enable_lora=[False, False, True])
    model = trained(fresh(base), layers)
    torch.save(lorakit.lora_state_dict(model), tmp_path / "l.bin")
    options = GPT2_OPTIONS | {"enable_lora": ["c_attn=0,0,1"]}
    lorakit.convert(tmp_path / "l.bin", tmp_path / "out", "peft", **options)
    torch.testing.assert_close(in_peft(base, tmp_path / "out"), logits(model), atol=1e-5, rtol=0)


def test_a_directory_of_pefts_form_is_copied(tmp_path: Path) -> None:
    _, adapter = made(tmp_path, "llama", method="adalora")
    (adapter / "optimizer.pt").write_bytes(b"not the adapter's")
    report = lorakit.convert(adapter, tmp_path / "out", "peft")
    assert "copied as it is" in report.notes[0]
    for file in (tmp_path / "out").iterdir():
        assert file.read_bytes() == (adapter / file.name).read_bytes()
    assert {f.name for f in adapter.iterdir()} - {f.name for f in (tmp_path / "out").iterdir()} == {
        "optimizer.pt"
    }


@pytest.mark.parametrize(
    ("keys", "to", "message"),
    [
        ({"method": "dora"}, "lora", "dora is no product of two factors; lorakit merge "),
        ({"method": "dora"}, "loralib", "dora is no product of two factors"),
        ({"method": "bitfit", "target_modules": None}, "lora", "bitfit is no product of two factors"),
        ({"method": "full", "target_modules": ["c_attn"]}, "peft", "PEFT has no place for full; lorakit merge"),
        ({"method": "intrinsic", "d": 50}, "peft", "PEFT has no place for intrinsic"),
        ({"target_modules": ["c_attn"], "bias": "lora_only"}, "lora", r"c_attn\.base_layer\.bias: a plain LoRA has no place"),
        ({"target_modules": ["c_attn"], "bias": "all"}, "lora", "lorakit merge .* makes a plain model of all"),
        ({}, "onnx", "--to = onnx: allowed: lora, loralib, peft"),
    ],
)  # fmt: skip
def test_what_has_no_such_form(keys: dict[str, Any], to: str, message: str, tmp_path: Path) -> None:
    _, adapter = made(tmp_path, "gpt2", **keys)
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
        (lambda t, n: t[n].fill_(float("nan")), "holds NaN or infinite"),
        (lambda t, n: t.update({n.replace("lora_A", "lora_Z"): t[n].clone()}), "unknown tensor: .*lora_Z"),
    ],
)  # fmt: skip
def test_wrong_tensors(change: Any, message: str, tmp_path: Path) -> None:
    _, adapter = made(tmp_path, "llama", r=4)
    with_tensor(adapter, change)
    with pytest.raises(AdapterError, match=message):
        lorakit.convert(adapter, tmp_path / "out", "lora")
    assert not (tmp_path / "out").exists()


def test_a_rank_that_the_configuration_does_not_say(tmp_path: Path) -> None:
    _, adapter = made(tmp_path, "llama", r=4)
    edit(adapter, r=6)
    with pytest.raises(AdapterError, match=r"has r = 4, and adapter_config\.json says 6"):
        lorakit.convert(adapter, tmp_path / "out", "lora")


def test_a_scaling_beyond_float32(tmp_path: Path) -> None:
    _, adapter = made(tmp_path, "llama", r=8)
    edit(adapter, alpha_pattern={"0.self_attn.q_proj": 1e300})
    for to in ("lora", "loralib"):
        with pytest.raises(AdapterError, match="lora_B is too large for float32 when it is scaled"):
            lorakit.convert(adapter, tmp_path / "out", to)


def stored(**shapes: tuple[int, ...]) -> dict[str, Tensor]:
    return {name.replace("__", "."): torch.ones(shape) for name, shape in shapes.items()}


MERGED = {"a__lora_A": (4, 6), "a__lora_B": (8, 2)}


@pytest.mark.parametrize(
    ("tensors", "options", "message"),
    [
        (stored(**MERGED), {}, "2 projections enabled: --enable-lora must say which"),
        (stored(**MERGED), {"enable_lora": ["1,1,1"]}, "not of the 3 projections of r = 2"),
        (stored(**MERGED), {"enable_lora": ["q,x"]}, "--enable-lora = q,x: allowed: "),
        (stored(**MERGED), {"enable_lora": ["b=q,v"]}, "--enable-lora must say which"),
        (stored(a__lora_A=(2, 6), a__lora_B=(8, 2)), {"enable_lora": ["q,v"]}, "no adapted module is fused"),
        (stored(a__lora_A=(3, 6), a__lora_B=(8, 2)), {"enable_lora": ["a=1,0"]}, "not of the 1 projections"),
        (stored(a__lora_A=(3, 6), a__lora_B=(8, 2)), {}, "the rows of A and the columns of B"),
        (stored(a__lora_A=(2, 6)), {}, r"missing tensor: a\.lora_B"),
        (stored(a__lora_A=(2,), a__lora_B=(2,)), {}, "allowed: a matrix"),
        (stored(a__lora_A__weight=(2, 6)), {}, r"a\.lora_A\.weight: not a name of loralib"),
        (stored(a__bias=(2,)), {}, r"it holds no MODULE\.lora_A"),
        (stored(a__lora_A=(2, 6), a__lora_B=(8, 2), a__weight=(8, 6)), {}, r"a\.weight: a whole model"),
        (stored(a__lora_A=(2, 6), a__lora_B=(8, 2)), {"embedding": ["b"]}, "--embedding = b: no adapted"),
        (stored(a__lora_A=(2, 6), a__lora_B=(8, 2)), {"lora_alpha": 0}, "--lora-alpha = 0: allowed"),
        (stored(a__lora_A=(2, 6), a__lora_B=(8, 2)), {"task_type": "X"}, "--task-type = X: allowed"),
        (stored(a__lora_A=(2, 6), a__lora_B=(8, 2)), {"rank": 8}, "--rank = 8: allowed: with --to lora"),
        ({"a.lora_A": torch.full((2, 6), torch.inf)}, {}, r"a\.lora_A: holds NaN or infinite"),
        ({"a.lora_A": 3}, {}, r"\"a\.lora_A\": not a tensor: int"),
        ([1], {}, "not a state dict: found list"),
    ],
)  # fmt: skip
def test_checkpoints_that_cannot_be_read(
    tensors: Any, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    torch.save(tensors, tmp_path / "l.pth")
    with pytest.raises(AdapterError, match=message) as caught:
        lorakit.convert(tmp_path / "l.pth", tmp_path / "out", "peft", **options)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


class Calls:
    """A pickle that would create a file when it is read."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return Path.touch, (self.file,)


def test_no_code_of_a_pickle_is_run(tmp_path: Path) -> None:
    torch.save({"a.lora_A": Calls(tmp_path / "ran")}, tmp_path / "l.pt")
    with pytest.raises(AdapterError, match="lorakit runs no code of a file") as caught:
        lorakit.convert(tmp_path / "l.pt", tmp_path / "out", "peft")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_a_file_cut_short(suffix: str, tmp_path: Path) -> None:
    file = tmp_path / f"l.{suffix}"
    (torch.save if suffix == "pt" else save_file)(stored(a__lora_A=(64, 64)), file)
    whole = file.read_bytes()
    for length in (0, 5, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:length])
        with pytest.raises(
            AdapterError, match=r"l\.\w+: (corrupt or cut short|holds more)"
        ) as caught:
            lorakit.convert(file, tmp_path / "out", "peft")
        assert "\n" not in str(caught.value)


def test_where_out_may_lie(tmp_path: Path) -> None:
    base, adapter = made(tmp_path, "llama", r=4)
    for out in (adapter, adapter / "sub", tmp_path):
        with pytest.raises(AdapterError, match="must lie outside of ADAPTER"):
            lorakit.convert(adapter, out, "lora", overwrite=True)
    with pytest.raises(AdapterError, match="holds something other than an adapter"):
        lorakit.convert(adapter, base, "lora", overwrite=True)
    with pytest.raises(AdapterError, match="holds something other than an adapter"):
        lorakit.convert(adapter, base / "model.safetensors", "loralib", overwrite=True)
    for to, out in (("lora", "o"), ("loralib", "l"), ("loralib", "l.safetensors")):
        lorakit.convert(adapter, tmp_path / out, to)
        with pytest.raises(AdapterError, match="exists already; give another, or --overwrite"):
            lorakit.convert(adapter, tmp_path / out, to)
        lorakit.convert(adapter, tmp_path / out, to, overwrite=True)
    assert list(tmp_path.glob(".*")) == []
    with pytest.raises(AdapterError, match="is a loralib checkpoint; allowed: --to peft"):
        lorakit.convert(tmp_path / "l", tmp_path / "x", "loralib")
    with pytest.raises(AdapterError, match="--lora-alpha = 3: allowed: for a loralib checkpoint"):
        lorakit.convert(adapter, tmp_path / "x", "lora", lora_alpha=3)
    with pytest.raises(AdapterError, match="no such adapter directory or loralib checkpoint"):
        lorakit.convert(tmp_path / "none.pt", tmp_path / "x", "peft")
