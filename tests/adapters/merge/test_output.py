"""The files of a base: which weights are read, which files are copied, which tokenizer is used."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from lorakit.adapters.merge.checkpoint import Checkpoint
from lorakit.adapters.merge.run import merge
from lorakit.errors import AdapterError, ModelError
from tests.adapters.checkpoints import add_tensors, tensors
from tests.adapters.conftest import MakePair
from tests.families import token_ids

INDEX = "model.safetensors.index.json"


def _same_model(one: Path, other: Path) -> None:
    """Assert that both directories load to the same logits."""
    ids = token_ids()
    with torch.no_grad():
        a, b = (AutoModelForCausalLM.from_pretrained(f).eval()(ids).logits for f in (one, other))
    torch.testing.assert_close(a, b, atol=0, rtol=0)


_KEPT = (
    "LICENSE", "README.md", "preprocessor_config.json", "processor_config.json",
    "video_preprocessor_config.json", "spm.model", "tekken.json", "chat_template.json",
    "generation_config.json", "modeling_own.py", "params.json", "figures/a.png", ".gitattributes",
    "assets/deeper/x.txt", "trainer_state.json", "1_Pooling/config.json",
    "2_Dense/model.safetensors", "2_Dense/pytorch_model.bin",
)  # fmt: skip
_LEFT = (
    "pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json",
    "consolidated.safetensors", "consolidated.00.pth", "model-q4.gguf", "onnx/", "original/",
    "tf_model.h5", "flax_model.msgpack", "optimizer.pt", "training_args.bin", "rng_state_0.pth",
    "extra/model.safetensors", "gone.json", "adapter_config.json", "adapter_model.safetensors",
    INDEX,
)  # fmt: skip


def test_every_file_but_other_weights(make_pair: MakePair, tmp_path: Path) -> None:
    base, adapter, _ = make_pair()
    for name in (*_KEPT, *_LEFT, ".git/config", ".cache/huggingface/x", "__pycache__/a.pyc"):
        if name in ("gone.json", INDEX):
            continue
        path = base / (f"{name}model.file" if name.endswith("/") else name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{{}} {name}" if name != "generation_config.json" else "{}")
    (base / "modules.json").write_text('[{"path": ""}, {"path": "2_Dense"}]')
    (base / "gone.json").symlink_to(base / "nowhere")
    (base / "loop").symlink_to(base)
    (base / INDEX).write_text('{"weight_map": {"a": "model-00001-of-00009.safetensors"}}')
    report = merge(base, adapter, tmp_path / "out")
    found = {p.relative_to(tmp_path / "out").as_posix()
             for p in (tmp_path / "out").rglob("*") if p.is_file()}  # fmt: skip
    assert found == {*_KEPT, "config.json", "model.safetensors", "modules.json"}
    for name in _KEPT:
        assert (tmp_path / "out" / name).read_bytes() == (base / name).read_bytes()
    assert {item.name for item in report.left_out} == set(_LEFT)
    reasons = {item.name: item.reason for item in report.left_out}
    assert reasons["gone.json"] == "a broken symlink"
    assert reasons["optimizer.pt"] == "training state"
    assert reasons["consolidated.safetensors"] == "weights next to the model, without the adapter"
    assert reasons["extra/model.safetensors"] == "weights in a subfolder, without the adapter"
    assert reasons[INDEX] == "index of files that are not written"
    for name in ("model-q4.gguf", "onnx/", "pytorch_model.bin"):
        assert reasons[name] == "weights in another format, without the adapter"


def test_the_report_and_the_command_list_omitted_files(
    make_pair: MakePair, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from lorakit.cli.main import run

    base, adapter, _ = make_pair()
    (base / "pytorch_model.bin").write_bytes(b"x")
    add_tensors(base, {"mtp.weight": torch.ones(2)})
    arguments = ["merge", str(base), str(adapter), str(tmp_path / "out")]
    assert run([*arguments, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert [item["name"] for item in result["left_out"]] == ["pytorch_model.bin"]
    assert result["kept"] == ["mtp.weight"]
    assert run([*arguments, "--overwrite"]) == 0
    out = capsys.readouterr().out
    assert "skipped: pytorch_model.bin: weights in another format, without the adapter" in out
    assert "copied from the base: mtp.weight (not part of" in out


def test_a_snapshot_of_the_hubs_cache(make_pair: MakePair, tmp_path: Path) -> None:
    """The files of a snapshot are symlinks to blobs without an extension."""
    base, adapter, _ = make_pair(max_shard_size="6KB")
    (base / "assets").mkdir()
    (base / "assets" / "x.txt").write_text("x")
    repository = tmp_path / "models--a--b"
    snapshot = repository / "snapshots" / "0123"
    (repository / "blobs").mkdir(parents=True)
    for number, file in enumerate(sorted(p for p in base.rglob("*") if p.is_file())):
        shutil.copyfile(file, repository / "blobs" / str(number))
        link = snapshot / file.relative_to(base)
        link.parent.mkdir(parents=True, exist_ok=True)
        blob = os.path.relpath(repository / "blobs" / str(number), link.parent)
        link.symlink_to(blob)
    merge(snapshot, adapter, tmp_path / "out")
    merge(base, adapter, tmp_path / "same")
    for file in (tmp_path / "same").rglob("*"):
        twin = tmp_path / "out" / file.relative_to(tmp_path / "same")
        assert not twin.is_symlink()
        assert file.is_dir() or twin.read_bytes() == file.read_bytes()


def test_the_bases_file_layout_is_kept_unless_files_are_too_large(
    make_pair: MakePair, tmp_path: Path
) -> None:
    base, adapter, _ = make_pair(max_shard_size="6KB")
    renamed = {f.name: f.name.replace("model-", "weights-") for f in base.glob("model-*")}
    index = json.loads((base / INDEX).read_text())
    for old, new in renamed.items():
        (base / old).rename(base / new)
    index["weight_map"] = {name: renamed[file] for name, file in index["weight_map"].items()}
    (base / INDEX).write_text(json.dumps(index))
    report = merge(base, adapter, tmp_path / "out")
    assert list(report.files) == sorted(renamed.values())
    written = json.loads((tmp_path / "out" / INDEX).read_text())
    assert written["weight_map"] == index["weight_map"]
    merge(base, adapter, tmp_path / "one", max_shard_size="3KB")
    assert not set(renamed.values()) & {p.name for p in (tmp_path / "one").iterdir()}
    assert all(p.stat().st_size < 5000 for p in (tmp_path / "one").glob("*.safetensors"))
    assert json.loads((tmp_path / "one" / INDEX).read_text())["metadata"] == written["metadata"]
    _same_model(tmp_path / "out", tmp_path / "one")
    # Twice as large: the files exceed the limit and are divided again.
    largest = max(f.stat().st_size for f in base.glob("*.safetensors"))
    wide = merge(base, adapter, tmp_path / "wide", dtype="bfloat16", max_shard_size=largest)
    assert list(wide.files) == sorted(renamed.values())


def test_shards_that_no_index_names_and_a_single_file_beside_them(
    make_pair: MakePair, tmp_path: Path
) -> None:
    """As in transformers, model.safetensors takes precedence; the extra shard is ignored."""
    base, adapter, _ = make_pair()
    merge(base, adapter, tmp_path / "plain")
    other = {name: value + 1 for name, value in load_file(base / "model.safetensors").items()}
    save_file(other, base / "model-00001-of-00001.safetensors", metadata={"format": "pt"})
    index = {"weight_map": dict.fromkeys(other, "model-00001-of-00001.safetensors")}
    (base / INDEX).write_text(json.dumps(index))
    report = merge(base, adapter, tmp_path / "out")
    assert {item.name for item in report.left_out} == {*index["weight_map"].values(), INDEX}
    _same_model(tmp_path / "out", tmp_path / "plain")
    (base / "model.safetensors").unlink()
    assert merge(base, adapter, tmp_path / "sharded").files == ("model-00001-of-00001.safetensors",)
    assert (tmp_path / "sharded" / INDEX).is_file()


def test_a_tensor_in_two_shards(make_pair: MakePair, tmp_path: Path) -> None:
    """transformers uses the later file; the output contains the tensor once."""
    base, adapter, _ = make_pair(max_shard_size="6KB")
    first, *_, last = sorted(base.glob("model-*.safetensors"))
    name = next(iter(load_file(last)))
    twice = load_file(first) | {name: torch.zeros_like(load_file(last)[name])}
    save_file(twice, first, metadata={"format": "pt"})
    merge(base, adapter, tmp_path / "out")
    found = [f.name for f in (tmp_path / "out").glob("*.safetensors") if name in load_file(f)]
    assert found == [last.name]
    assert set(tensors(tmp_path / "out")) == set(tensors(base))
    _same_model(tmp_path / "out", tmp_path / "out")


def test_weights_that_cannot_be_read(make_pair: MakePair, tmp_path: Path) -> None:
    base, adapter, _ = make_pair(max_shard_size="6KB")
    shards = sorted(base.glob("model-*.safetensors"))
    index = json.loads((base / INDEX).read_text())

    def refused(message: str, **changes: Any) -> None:
        (base / INDEX).write_text(json.dumps(index | changes))
        with pytest.raises(ModelError, match=message):
            merge(base, adapter, tmp_path / "out")
        assert not (tmp_path / "out").exists()

    refused(r"no model-9\.safetensors \(model\.safetensors\.index\.json names it\)",
            weight_map=index["weight_map"] | {"x": "model-9.safetensors"})  # fmt: skip
    refused(f"x is not in {shards[0].name}", weight_map=index["weight_map"] | {"x": shards[0].name})
    content = shards[0].read_bytes()
    shards[0].write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    refused("a Git LFS pointer")
    for broken in (content[:5], content[:-1], content + b"x", b"\xff" * 64, b""):
        shards[0].write_bytes(broken)
        refused(f"{shards[0].name}: corrupt")
    for file in (*shards, base / INDEX):
        file.unlink()
    (base / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(
        ModelError, match="only safetensors can be merged; hint: save the pickled weights as"
    ):
        merge(base, adapter, tmp_path / "out")


@pytest.mark.parametrize(("base", "message"), [
    ("/moved/base", "/moved/base: no such directory"),
    ("./moved/base", "no such directory"),
    ("moved/to/base", "no such directory"),
    ("owner/name", "not in the local cache, and the Hub cannot be reached"),
])  # fmt: skip
def test_a_base_that_is_not_there(
    base: str, message: str, make_pair: MakePair, tmp_path: Path
) -> None:
    own, adapter, _ = make_pair()
    with pytest.raises(ModelError, match=message):
        merge(base, adapter, tmp_path / "out")
    with pytest.raises(
        ModelError, match="a weights file, not a directory; allowed: a model directory"
    ):
        merge(own / "model.safetensors", adapter, tmp_path / "out")


def test_headers_are_read_as_the_library_reads_them(tmp_path: Path) -> None:
    from safetensors import safe_open

    values = {
        "a": torch.arange(6, dtype=torch.int16).view(2, 3), "b": torch.tensor(1.5),
        "c": torch.zeros(0, 4), "d": torch.randn(3, dtype=torch.float64),
        "e": torch.ones(5, dtype=torch.float8_e4m3fn), "f": torch.tensor([True]),
    }  # fmt: skip
    save_file(values, tmp_path / "model.safetensors", metadata={"x": "y"})
    with Checkpoint(tmp_path) as checkpoint, safe_open(checkpoint.files[0], "pt") as stored:
        assert set(checkpoint.tensors) == set(values)
        assert checkpoint.metadata[checkpoint.files[0]] == stored.metadata()
        for name in set(values) - {"e"}:
            assert torch.equal(checkpoint.read(name), values[name])
        assert checkpoint.tensors["e"].code == "F8_E4M3"


def test_a_dtype_that_is_only_copied(make_pair: MakePair, tmp_path: Path) -> None:
    """An odd number of one-byte values must not misalign the wider values after it."""
    base, adapter, _ = make_pair(dtype=torch.bfloat16)
    own = {"aa.odd": torch.ones(3, dtype=torch.float8_e4m3fn), "zz.count": torch.arange(3)}
    add_tensors(base, own)
    merge(base, adapter, tmp_path / "out", dtype="float32")
    merged = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(merged["aa.odd"].view(torch.uint8), own["aa.odd"].view(torch.uint8))
    assert torch.equal(merged["zz.count"], own["zz.count"])
    assert merged["model.norm.weight"].dtype == torch.float32
    quantized = load_file(base / "model.safetensors")
    name = next(key for key in quantized if key.endswith("q_proj.weight"))
    quantized[name] = quantized[name].to(torch.float8_e4m3fn)
    save_file(quantized, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        AdapterError, match=r"q_proj\.weight is F8_E4M3: cannot merge into a quantized base"
    ):
        merge(base, adapter, tmp_path / "no")


@pytest.fixture
def with_tokenizers(make_pair: MakePair, tiny_llama: Path, tmp_path: Path) -> tuple[Path, Path]:
    """Return a base and an adapter with the same tokenizer; the base has additional tokenizer
    files."""
    base, adapter, _ = make_pair()
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer.save_pretrained(base)
    tokenizer.save_pretrained(adapter)
    settings = json.loads((base / "tokenizer_config.json").read_text())
    (base / "tokenizer_config.json").write_text(
        json.dumps(settings | {"tokenizer_class": "LlamaTokenizerFast"})
    )
    for name in ("special_tokens_map.json", "added_tokens.json"):
        (base / name).write_text("{}")
    for name in ("spm.model", "tekken.json", "vocab.json", "merges.txt"):
        (base / name).write_text(name)
    return base, adapter


def _said(base: Path, adapter: Path, out: Path) -> tuple[list[str], dict[str, str]]:
    said: list[str] = []
    report = merge(base, adapter, out, say=said.append, overwrite=True)
    assert tuple(said) == report.notes
    return said, {item.name: item.reason for item in report.left_out}


def test_the_same_tokenizer_is_the_bases(
    with_tokenizers: tuple[Path, Path], tmp_path: Path
) -> None:
    base, adapter = with_tokenizers
    out = tmp_path / "out"
    # Changes that a run makes: another class, a length, a pad token, older merges.
    settings = json.loads((adapter / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": "TokenizersBackend", "pad_token": "</s>"}
    (adapter / "tokenizer_config.json").write_text(json.dumps(settings))
    fast = json.loads((adapter / "tokenizer.json").read_text())
    fast |= {"truncation": {"max_length": 3, "strategy": "LongestFirst", "stride": 0,
                            "direction": "Right"}}  # fmt: skip
    (adapter / "tokenizer.json").write_text(json.dumps(fast))
    assert _said(base, adapter, out) == ([], {})
    for name in ("tokenizer.json", "tokenizer_config.json", "spm.model", "added_tokens.json"):
        assert (out / name).read_bytes() == (base / name).read_bytes()


def test_a_different_chat_template_replaces_the_whole_tokenizer(
    with_tokenizers: tuple[Path, Path], tmp_path: Path
) -> None:
    base, adapter = with_tokenizers
    out = tmp_path / "out"
    (base / "chat_template.json").write_text('{"chat_template": "old"}')
    (adapter / "chat_template.jinja").write_text("another")
    said, left_out = _said(base, adapter, out)
    assert "using the adapter's tokenizer" in said[0]
    assert set(left_out) == {
        "special_tokens_map.json", "added_tokens.json", "chat_template.json",
    }  # fmt: skip
    assert (out / "chat_template.jinja").read_text() == "another"
    settings = json.loads((out / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "LlamaTokenizerFast"
    # The vocabulary is the same, whichever file contains it.
    assert all((out / n).is_file() for n in ("spm.model", "tekken.json", "vocab.json"))


def test_another_vocabulary_takes_the_bases_files_away(
    with_tokenizers: tuple[Path, Path], tmp_path: Path
) -> None:
    base, adapter = with_tokenizers
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<new>"]})
    tokenizer.save_pretrained(adapter)
    said, left_out = _said(base, adapter, tmp_path / "out")
    assert "using the adapter's tokenizer" in said[0]
    assert {"spm.model", "tekken.json", "vocab.json", "merges.txt"} < set(left_out)
    assert set(left_out.values()) == {"replaced by the adapter's tokenizer"}
    settings = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert settings["additional_special_tokens"] == ["<new>"]
    assert "extra_special_tokens" not in settings  # a list there is an error in transformers 4
    merged = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert "<new>" in merged.all_special_tokens
    assert merged.convert_tokens_to_ids("<new>") == tokenizer.convert_tokens_to_ids("<new>")


@pytest.mark.parametrize("place", ["chat_template.jinja", "chat_template.json", "inline"])
@pytest.mark.parametrize("others", [False, True])
def test_the_bases_chat_template_is_kept_if_the_adapter_has_none(
    with_tokenizers: tuple[Path, Path], others: bool, place: str, tmp_path: Path
) -> None:
    base, adapter = with_tokenizers
    for folder in (base, adapter):
        (folder / "chat_template.jinja").unlink(missing_ok=True)
    template = "{{ messages[0]['content'] }}"
    if place == "inline":
        settings = json.loads((base / "tokenizer_config.json").read_text())
        settings["chat_template"] = template
        (base / "tokenizer_config.json").write_text(json.dumps(settings))
    else:
        text = template if place.endswith("jinja") else json.dumps({"chat_template": template})
        (base / place).write_text(text)
    if others:
        tokenizer = AutoTokenizer.from_pretrained(adapter)
        tokenizer.add_special_tokens({"extra_special_tokens": ["<new>"]})
        tokenizer.save_pretrained(adapter)
    said, left_out = _said(base, adapter, tmp_path / "out")
    assert place not in left_out
    assert [("the chat template is the base's" in line) for line in said][:1] == [True] * others
    merged = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert ("<new>" in merged.all_special_tokens) == others
    if place != "chat_template.json":  # a processor's, which the tokenizer does not read
        assert merged.chat_template == template
    else:
        assert (tmp_path / "out" / place).read_bytes() == (base / place).read_bytes()


def test_more_tokens_than_the_embedding_has_rows(
    with_tokenizers: tuple[Path, Path], tmp_path: Path
) -> None:
    base, adapter = with_tokenizers
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    tokenizer.add_tokens([f"<{i}>" for i in range(300)])
    tokenizer.save_pretrained(adapter)
    said, _ = _said(base, adapter, tmp_path / "out")
    assert f"has {len(tokenizer)} tokens, and the model's embedding 64 rows" in said[1]


@pytest.mark.parametrize("missing", ["tokenizer.json", "tokenizer_config.json"])
def test_half_a_tokenizer_is_none(
    with_tokenizers: tuple[Path, Path], missing: str, tmp_path: Path
) -> None:
    base, adapter = with_tokenizers
    (adapter / missing).unlink()
    (adapter / "chat_template.jinja").write_text("another")
    said, left_out = _said(base, adapter, tmp_path / "out")
    assert "incomplete tokenizer (" in said[0] and "using the base's" in said[0]
    assert not left_out
    for file in base.iterdir():
        if file.name != "model.safetensors":
            assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [("tokenizer.json", None, "invalid JSON"), ("tokenizer.json", b"[]", "expected a JSON"),
     ("tokenizer.json", b"{}", "invalid tokenizer"),
     ("tokenizer.json", b'{"model": {"type": "BPE"}}', "invalid tokenizer"),
     ("tokenizer_config.json", b'{"a', "invalid JSON"),
     ("vocab.json", b"\xff", "invalid JSON")],
)  # fmt: skip
def test_a_corrupt_tokenizer_is_an_error(
    with_tokenizers: tuple[Path, Path], name: str, content: bytes | None, said: str, tmp_path: Path
) -> None:
    base, adapter = with_tokenizers
    file = adapter / name
    file.write_bytes(file.read_bytes()[:500] if content is None else content)
    with pytest.raises(AdapterError, match=f"adapter/{re.escape(name)}: {said}"):
        merge(base, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    if content == b"{}":
        for own in ("tokenizer.json", "tokenizer_config.json"):
            (base / own).unlink()
        with pytest.raises(AdapterError, match=said):
            merge(base, adapter, tmp_path / "out")


def test_a_base_without_a_tokenizer_gets_the_adapters(
    make_pair: MakePair, tiny_llama: Path, tmp_path: Path
) -> None:
    base, adapter, _ = make_pair()
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(adapter)
    merge(base, adapter, tmp_path / "out")
    AutoTokenizer.from_pretrained(tmp_path / "out")
