"""Merging: exact sums and names, and complete directories or none."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from lorakit.adapters.load import load
from lorakit.adapters.merge.checkpoint import OutputTensor
from lorakit.adapters.merge.output import plan_shards
from lorakit.adapters.merge.run import merge
from lorakit.errors import AdapterError, ModelError, UserError
from lorakit.io.atomic import atomic_directory
from lorakit.layers import adapter_layers
from tests.adapters.conftest import MakePair
from tests.families import ALL, ENCODERS, tiny, token_ids


def _logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model(input_ids=token_ids()).logits
    return out


def _plain(out: Path, **options: Any) -> nn.Module:
    """Load the directory with plain transformers and assert that all weights match."""
    settings = json.loads((out / "config.json").read_text())
    classifies = "Classification" in settings["architectures"][0]
    auto = AutoModelForSequenceClassification if classifies else AutoModelForCausalLM
    model, info = auto.from_pretrained(out, output_loading_info=True, **options)
    assert not any(info.values()), info
    loaded: nn.Module = model.eval()
    assert type(loaded).__name__ == settings["architectures"][0]
    return loaded


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


@pytest.mark.parametrize("family", [family for family in ALL if family != "t5_encoder"])
def test_merged_equals_unmerged(make_pair: MakePair, family: str, tmp_path: Path) -> None:
    said: list[str] = []
    base, adapter, model = make_pair(family, adapter={"target_modules": ["all-linear"]})
    report = merge(base, adapter, tmp_path / "out", say=said.append)
    torch.testing.assert_close(_logits(_plain(tmp_path / "out")), _logits(model), atol=1e-5, rtol=0)
    assert report.merged_modules == len(adapter_layers(model))
    assert not said
    assert not report.notes
    assert _tensors(tmp_path / "out").keys() >= _tensors(base).keys()


@pytest.mark.parametrize("family", ENCODERS)
def test_a_bare_encoder_becomes_a_classifier(
    make_pair: MakePair, family: str, tmp_path: Path
) -> None:
    names = {0: "no", 1: "maybe", 2: "yes"}
    _, adapter, model = make_pair(family, id2label=names)
    tiny(family).base_model.save_pretrained(tmp_path / "bare")
    merge(tmp_path / "bare", adapter, tmp_path / "out")
    merged = _plain(tmp_path / "out")
    torch.testing.assert_close(_logits(merged), _logits(model), atol=1e-5, rtol=0)
    assert merged.config.id2label == names
    assert merged.config.num_labels == 3


def test_a_head_replaces_that_of_the_base(make_pair: MakePair, tmp_path: Path) -> None:
    _, adapter, model = make_pair("roberta")
    tiny("roberta", num_labels=7).save_pretrained(tmp_path / "other")
    merge(tmp_path / "other", adapter, tmp_path / "out")
    torch.testing.assert_close(_logits(_plain(tmp_path / "out")), _logits(model), atol=1e-5, rtol=0)


TIED: dict[str, tuple[dict[str, Any], bool]] = {
    "neither side": ({}, True),
    "embeddings adapted": ({"target_modules": ["embed_tokens", "q"]}, False),
    "output adapted": ({"target_modules": ["lm_head", "q"]}, False),
    "both adapted": ({"target_modules": ["lm_head", "embed_tokens"]}, False),
    "both trained as one": ({"modules_to_save": ["embed_tokens"]}, True),
}


@pytest.mark.parametrize("case", TIED)
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_tied_embeddings(make_pair: MakePair, family: str, case: str, tmp_path: Path) -> None:
    adapter_settings, still_tied = TIED[case]
    base, adapter, model = make_pair(family, adapter_settings, tie_word_embeddings=True)
    assert "lm_head.weight" not in _tensors(base)
    merge(base, adapter, tmp_path / "out")
    merged = _plain(tmp_path / "out")
    torch.testing.assert_close(_logits(merged), _logits(model), atol=1e-5, rtol=0)
    assert (merged.lm_head.weight is merged.model.embed_tokens.weight) == still_tied
    assert ("lm_head.weight" in _tensors(tmp_path / "out")) == (not still_tied)


@pytest.mark.parametrize("targets", [["embed_in"], ["lm_head"], ["attention"]], ids=str)
def test_tied_embeddings_that_are_stored_under_other_names(
    make_pair: MakePair, targets: list[str], tmp_path: Path
) -> None:
    base, adapter, model = make_pair(
        "gpt_neox", {"target_modules": targets}, tie_word_embeddings=True
    )
    merge(base, adapter, tmp_path / "out")
    torch.testing.assert_close(_logits(_plain(tmp_path / "out")), _logits(model), atol=1e-5, rtol=0)
    names = set(_tensors(tmp_path / "out"))
    parted = targets != ["attention"]
    assert names - set(_tensors(base)) == ({"embed_out.weight"} if parted else set())


def test_old_names_of_weights(make_pair: MakePair, tmp_path: Path) -> None:
    """Old BERT checkpoints use gamma and beta, which transformers renames while loading."""
    base, adapter, _ = make_pair("bert", dtype=torch.bfloat16)
    file = base / "model.safetensors"
    renamed = {
        key.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): value
        for key, value in load_file(file).items()
    }
    save_file(renamed, file, metadata={"format": "pt"})
    report = merge(base, adapter, tmp_path / "out", dtype="float32")
    assert set(_tensors(tmp_path / "out")) == set(renamed)
    assert report.dtype == "float32"
    want = _logits(load(base, adapter, dtype="float32"))
    torch.testing.assert_close(_logits(_plain(tmp_path / "out")), want, atol=1e-5, rtol=0)


def test_one_rounding(make_pair: MakePair, tmp_path: Path) -> None:
    """In bfloat16, W + delta is computed in float32 and rounded once; the rest keeps its bytes."""
    base, adapter, model = make_pair(dtype=torch.bfloat16)
    merge(base, adapter, tmp_path / "out")
    stored, merged = _tensors(base), _tensors(tmp_path / "out")
    assert set(stored) == set(merged)
    layers = adapter_layers(model)
    twice = 0
    for name, weight in stored.items():
        layer = layers.get(name.removesuffix(".weight"))
        if layer is None:
            assert torch.equal(merged[name], weight), name
            continue
        delta = (layer.lora_B.double() @ layer.lora_A.double() * (16 / 4)).detach()
        exact = (weight.double() + delta).float().bfloat16()
        rounded_before = weight + delta.bfloat16()
        assert (merged[name] == exact).double().mean() > 0.999, name
        torch.testing.assert_close(merged[name].double(), weight + delta, rtol=2**-8, atol=1e-6)
        twice += int((rounded_before != exact).sum())
    assert twice, "rounding twice would have differed"
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtype_of_the_output(make_pair: MakePair, dtype: str, tmp_path: Path) -> None:
    base, adapter, model = make_pair("bert", dtype=torch.bfloat16)
    report = merge(base, adapter, tmp_path / "out", dtype=dtype)
    assert report.dtype == dtype
    assert {t.dtype for t in _tensors(tmp_path / "out").values()} == {getattr(torch, dtype)}
    assert _plain(tmp_path / "out").dtype == getattr(torch, dtype)
    if dtype == "float32":
        unmerged = load(base, adapter, dtype="float32")
        torch.testing.assert_close(
            _logits(_plain(tmp_path / "out")), _logits(unmerged), atol=1e-5, rtol=0
        )
    assert next(model.parameters()).dtype == torch.bfloat16


def test_shards(make_pair: MakePair, tmp_path: Path) -> None:
    base, adapter, model = make_pair(max_shard_size="6KB")
    assert len(list(base.glob("model-*.safetensors"))) > 2
    report = merge(base, adapter, tmp_path / "out", max_shard_size="8KB")
    count = len(report.files)
    assert count > 2
    assert report.files[0] == f"model-00001-of-{count:05d}.safetensors"
    torch.testing.assert_close(_logits(_plain(tmp_path / "out")), _logits(model), atol=1e-5, rtol=0)
    # The names and the index are those of transformers; only its order within files differs.
    _plain(tmp_path / "out").save_pretrained(tmp_path / "again", max_shard_size="8KB")
    index = "model.safetensors.index.json"
    ours, theirs = (json.loads((tmp_path / d / index).read_text()) for d in ("out", "again"))
    assert ours["metadata"] == theirs["metadata"]
    assert set(ours["weight_map"]) == set(theirs["weight_map"])
    assert set(ours["weight_map"].values()) == set(report.files)
    assert list(ours) == list(theirs)


def test_a_single_file_and_its_metadata(make_pair: MakePair, tmp_path: Path) -> None:
    base, adapter, _ = make_pair()
    report = merge(base, adapter, tmp_path / "out")
    assert report.files == ("model.safetensors",)
    assert not (tmp_path / "out" / "model.safetensors.index.json").exists()
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as stored:
        assert stored.metadata() == {"format": "pt"}


def test_tensors_are_distributed_to_shards() -> None:
    outputs = {
        name: OutputTensor.of((size,), torch.uint8)
        for name, size in zip("abcd", (4, 4, 9, 1), strict=True)
    }
    assert plan_shards(outputs, 8) == [["a", "b"], ["c"], ["d"]]


def test_tokenizer_and_generation_defaults(
    make_pair: MakePair, tiny_llama: Path, tmp_path: Path
) -> None:
    base, adapter, _ = make_pair()
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer.save_pretrained(base)
    (base / "generation_config.json").write_text('{"temperature": 0.3, "do_sample": true}')
    merge(base, adapter, tmp_path / "out")
    again = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert again.get_vocab() == tokenizer.get_vocab()
    assert again.chat_template == tokenizer.chat_template
    assert _plain(tmp_path / "out").generation_config.temperature == 0.3
    tokenizer.chat_template = "the adapter's own"
    tokenizer.save_pretrained(adapter)
    merge(base, adapter, tmp_path / "out", overwrite=True)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == "the adapter's own"
    assert {p.name for p in tmp_path.iterdir()} == {"base", "adapter", "out"}
    assert not list((tmp_path / "out").glob("adapter_*"))


def test_places_that_out_may_not_be(make_pair: MakePair, tmp_path: Path) -> None:
    base, adapter, _ = make_pair()
    (tmp_path / "file").write_text("x")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "1.jpg").write_text("x")
    cases = {
        base: "outside the base's directory",
        base / "merged": "outside the base's directory",
        adapter: "outside the adapter's directory",
        adapter / "merged": "outside the adapter's directory",
        tmp_path: "contains the base's directory",
        tmp_path / "file": "not a directory",
        tmp_path / "photos": "not empty and not a model",
        tmp_path / "two\nlines": "contains a control character",
    }
    before = sorted(tmp_path.rglob("*"))
    for out, message in cases.items():
        with pytest.raises(UserError, match=message):
            merge(base, adapter, out, overwrite=True)
    (tmp_path / "there").mkdir()
    with pytest.raises(AdapterError, match="already exists"):
        merge(base, adapter, tmp_path / "there")
    assert sorted(tmp_path.rglob("*")) == sorted([*before, tmp_path / "there"])


def test_out_may_not_be_in_the_hubs_cache_of_the_base(
    make_pair: MakePair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapter, _ = make_pair()
    repository = tmp_path / "cache" / "models--some--base"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("abc")
    snapshot = repository / "snapshots" / "abc"
    shutil.copytree(base, snapshot)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    before = sorted(tmp_path.rglob("*"))
    for out in (snapshot, snapshot / "merged", snapshot / "deeper" / "merged"):
        with pytest.raises(AdapterError, match="outside the base's directory"):
            merge("some/base", adapter, out, overwrite=True)
    assert sorted(tmp_path.rglob("*")) == before
    merge("some/base", adapter, tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_bases_that_cannot_be_merged_into(make_pair: MakePair, tmp_path: Path) -> None:
    base, adapter, _ = make_pair()
    tiny("llama", hidden_size=32).save_pretrained(tmp_path / "wider")
    with pytest.raises(AdapterError, match="belongs to another base model"):
        merge(tmp_path / "wider", adapter, tmp_path / "out")
    tiny("bert").save_pretrained(tmp_path / "encoder")
    with pytest.raises(ModelError, match=r"encoder: bert is not a causal language model"):
        merge(tmp_path / "encoder", adapter, tmp_path / "out")
    settings = json.loads((base / "config.json").read_text())
    quantized = {"quant_method": "hqq"}
    (base / "config.json").write_text(json.dumps(settings | {"quantization_config": quantized}))
    with pytest.raises(ModelError, match='quant_method = "hqq": its weights cannot be read'):
        merge(base, adapter, tmp_path / "out")
    (base / "config.json").write_text(json.dumps(settings))
    weights = base / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:100])
    with pytest.raises(ModelError, match="corrupt or truncated"):
        merge(base, adapter, tmp_path / "out")
    weights.rename(base / "pytorch_model.bin")
    with pytest.raises(ModelError, match="only safetensors"):
        merge(base, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["Qwen2VL", "Qwen3VL", "Llava", "Bert"])
def test_bases_without_a_class_for_text(name: str, make_pair: MakePair, tmp_path: Path) -> None:
    base, adapter, _ = make_pair()
    config = getattr(transformers, f"{name}Config")()
    config.architectures = [f"{name}ForConditionalGeneration"]
    config.save_pretrained(base)
    reason = "not a causal language model" if name == "Bert" else "multimodal, and transformers has"
    for read in (load, lambda *given: merge(*given, tmp_path / "out")):
        with pytest.raises(ModelError, match=f"{config.model_type} is {reason}"):
            read(base, adapter)
    assert not (tmp_path / "out").exists()


def test_a_full_disk_is_said_before_anything_is_written(
    make_pair: MakePair, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    base, adapter, _ = make_pair()
    usage = type("usage", (), {"free": 10})
    monkeypatch.setattr("lorakit.adapters.merge.run.shutil.disk_usage", lambda _path: usage)
    with pytest.raises(AdapterError, match=r"MB needed, \S+ MB free"):
        merge(base, adapter, tmp_path / "out")
    assert {p.name for p in tmp_path.iterdir()} == {"base", "adapter"}


_SLOW = """
import sys, time
from lorakit.adapters.merge import output
from lorakit.adapters.merge.run import merge
write = output.write_at
def slow(*args):
    write(*args)
    print("written", file=sys.__stdout__, flush=True)
    time.sleep(0.5)
output.write_at = slow
merge(*sys.argv[1:4], max_shard_size=8000, overwrite=True)
"""


@pytest.mark.parametrize("out_exists", [False, True])
def test_a_killed_merge_leaves_out_unchanged(
    make_pair: MakePair, out_exists: bool, tmp_path: Path
) -> None:
    base, adapter, _ = make_pair()
    out = tmp_path / "out"
    if out_exists:
        merge(base, adapter, out)
    before = {p: p.read_bytes() for p in out.rglob("*")}
    process = subprocess.Popen(
        [sys.executable, "-c", _SLOW, base, adapter, out],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[3])},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"written\n"
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert {p: p.read_bytes() for p in out.rglob("*")} == before
    assert list(tmp_path.glob(".out.*.new")), "it was killed in the middle"
    with atomic_directory(out, replace=True):
        assert len(list(tmp_path.glob(".out.*.new"))) == 1, "the dead one's is deleted"
        merge(base, adapter, out, overwrite=True)
        assert len(list(tmp_path.glob(".out.*.new"))) == 1, "the living one's is not"
    merge(base, adapter, out, overwrite=True)
    _plain(out)


def test_out_that_cannot_be_written(tmp_path: Path, make_pair: MakePair) -> None:
    base, adapter, _ = make_pair()
    (tmp_path / "file").touch()
    before = sorted(tmp_path.rglob("*"))
    for out in (tmp_path / "file" / "out", tmp_path / ("x" * 300), tmp_path / ("x" * 250)):
        with pytest.raises(AdapterError, match=r"OUT = .*: not written: "):
            merge(base, adapter, out)
        assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("text", ["{", "{}", "[]", '{"weight_map": {"a": 3}}', "[" * 100_000])
def test_an_index_that_says_nothing(text: str, tmp_path: Path, make_pair: MakePair) -> None:
    base, adapter, _ = make_pair()
    (base / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ModelError, match=r"model\.safetensors\.index\.json: "):
        merge(base, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["../other/model.safetensors", "/model.safetensors", "a/../../b"])
def test_an_index_that_names_files_outside(name: str, tmp_path: Path, make_pair: MakePair) -> None:
    base, adapter, _ = make_pair()
    index = {"weight_map": {"model.norm.weight": name}}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    (base / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="outside of the base"):
        merge(base, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_real_models(minilm: Path, smollm2: Path, tmp_path: Path) -> None:
    """all-MiniLM's checkpoint is a bare BertModel; SmolLM2's is bfloat16 with tied embeddings."""
    from lorakit.adapters.peft.write import save_adapter
    from lorakit.injection import inject
    from lorakit.methods.lora import LoraConfig

    cases: list[tuple[Path, Any, dict[str, Any]]] = [
        (minilm, AutoModelForSequenceClassification, {"num_labels": 2}),
        (smollm2, AutoModelForCausalLM, {"dtype": torch.float32}),
    ]
    for base, auto, options in cases:
        model = auto.from_pretrained(base, **options)
        config = LoraConfig(target_modules=["q", "v"])
        inject(model, config)
        for layer in adapter_layers(model).values():
            nn.init.normal_(layer.lora_B, std=0.02)
        task = "SEQ_CLS" if base is minilm else "CAUSAL_LM"
        adapter, out = tmp_path / f"{base.name}-adapter", tmp_path / f"{base.name}-merged"
        save_adapter(adapter, model, config, base_model_name_or_path=str(base), task_type=task)
        merge(base, adapter, out, dtype="float32")
        got, want = _logits(_plain(out)), _logits(model.eval())
        torch.testing.assert_close(got, want, atol=1e-4, rtol=0)


def test_the_command(
    make_pair: MakePair, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from lorakit.cli.main import run

    base, adapter, _ = make_pair()
    arguments = ["merge", str(base), str(adapter), str(tmp_path / "out")]
    assert run([*arguments, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["directory"] == str(tmp_path / "out")
    assert result["merged_modules"] == 8
    assert run(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "already exists" in captured.err
    assert run([*arguments, "--overwrite", "--dtype", "bfloat16", "--max-shard-size", "8KB"]) == 0
    assert "8 modules merged" in capsys.readouterr().out
    assert run([*arguments, "--overwrite", "--dtype", "int4"]) == 2
    assert "dtype = int4: allowed: float32" in capsys.readouterr().err
    assert run(["merge", "--help"]) == 0
    assert "Example: lorakit merge" in capsys.readouterr().out


def _changed(file: Path, end: str, value: float) -> str:
    """Write ``value`` to the first tensor whose name has this suffix."""
    tensors = load_file(file)
    name = next(key for key in tensors if key.endswith(end))
    tensors[name].view(-1)[3] = value
    save_file(tensors, file, metadata={"format": "pt"})
    return name


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_adapter_that_is_not_finite(make_pair: MakePair, tmp_path: Path, value: float) -> None:
    base, adapter, _ = make_pair()
    name = _changed(adapter / "adapter_model.safetensors", "lora_B.weight", value)
    with pytest.raises(AdapterError, match=f"{name}: contains NaN or infinite"):
        merge(base, adapter, tmp_path / "out")


def test_a_scale_that_is_not_finite(make_pair: MakePair, tmp_path: Path) -> None:
    base, adapter, _ = make_pair()
    settings = json.loads((adapter / "adapter_config.json").read_text())
    changed = json.dumps(settings | {"lora_alpha": float("nan")})
    (adapter / "adapter_config.json").write_text(changed)
    with pytest.raises(AdapterError, match="lora_alpha = "):
        merge(base, adapter, tmp_path / "out")


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
@pytest.mark.parametrize(("value", "dtype"), [(float("nan"), None), (7e4, "float16")])
def test_a_sum_that_is_not_finite(
    make_pair: MakePair, tmp_path: Path, family: str, value: float, dtype: str | None
) -> None:
    base, adapter, _ = make_pair(family)
    _changed(
        base / "model.safetensors",
        "dense.weight" if family == "gpt_neox" else "q_proj.weight",
        value,
    )
    with pytest.raises(AdapterError, match=r"\.weight: NaN or infinite values in"):
        merge(base, adapter, tmp_path / "out", dtype=dtype)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "base"]


def test_a_base_value_that_the_dtype_does_not_hold(make_pair: MakePair, tmp_path: Path) -> None:
    base, adapter, _ = make_pair()
    _changed(base / "model.safetensors", "down_proj.weight", 1e6)
    with pytest.raises(AdapterError, match=r"float16 after the merge: the base's values exceed"):
        merge(base, adapter, tmp_path / "out", dtype="float16")
    merge(base, adapter, tmp_path / "out", dtype="bfloat16")


def test_a_base_with_custom_code(make_pair: MakePair, tmp_path: Path) -> None:
    base, adapter, _ = make_pair()
    settings = json.loads((base / "config.json").read_text())
    settings |= {"model_type": "homemade", "auto_map": {"AutoConfig": "home.Config"}}
    (base / "config.json").write_text(json.dumps(settings))
    (base / "home.py").write_text("raise SystemExit('ran')")
    with pytest.raises(ModelError, match=r"enable trust_remote_code to run it$"):
        merge(base, adapter, tmp_path / "out")


def test_a_base_of_another_name_is_said(make_pair: MakePair, tmp_path: Path) -> None:
    _, adapter, _ = make_pair()
    file = adapter / "adapter_config.json"
    places = ("base", "cache/models--org--base/snapshots/0123", "base-instruct", "other")
    for place in places[1:]:
        shutil.copytree(tmp_path / "base", tmp_path / place)
    (tmp_path / "link").symlink_to(tmp_path / "other")
    cases = [
        ("org/Base", ["base", places[1]]), (str(tmp_path / places[1]), ["base", places[1]]),
        (str(tmp_path / "link"), ["other", "link"]), ("org/base-instruct/", ["base-instruct"]),
        (None, list(places)), ("", list(places)),
    ]  # fmt: skip
    for named, same in cases:
        settings = json.loads(file.read_text()) | {"base_model_name_or_path": named}
        file.write_text(json.dumps(settings))
        for place in places:
            said: list[str] = []
            report = merge(tmp_path / place, adapter, tmp_path / "out", overwrite=True,
                           say=said.append)  # fmt: skip
            assert tuple(said) == report.notes
            assert len(said) == (place not in same), (named, place)
            assert all(f"trained on {named}, but used with" in line for line in said)


_SLOW_COMMAND = f"""
from lorakit.cli.main import run
{_SLOW.rpartition("merge(")[0]}
sys.exit(run(["merge", *sys.argv[1:4], "--max-shard-size", "8KB"]))
"""


@pytest.mark.parametrize(
    ("number", "code", "text"),
    [(signal.SIGTERM, 143, "terminated"), (signal.SIGINT, 130, "interrupted")],
    ids=["TERM", "INT"],
)
def test_a_signal_leaves_nothing(
    make_pair: MakePair, tmp_path: Path, number: signal.Signals, code: int, text: str
) -> None:
    base, adapter, _ = make_pair()
    process = subprocess.Popen(
        [sys.executable, "-c", _SLOW_COMMAND,
         base, adapter, tmp_path / "out"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[3])},
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == b"written\n"
    process.send_signal(number)
    _, err = process.communicate()
    assert (process.returncode, err.decode().strip().splitlines()[-1]) == (code, text)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "base"]
