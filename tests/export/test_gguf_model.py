"""Models as GGUF: what transformers reads back, and what is refused."""

from __future__ import annotations

import json
import struct
import weakref
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from lorakit.adapters.merge.checkpoint import Checkpoint
from lorakit.api import export_gguf
from lorakit.errors import UserError
from tests.export.bases import TEMPLATE, byte_level, save_tokenizer, write_base

pytestmark = pytest.mark.filterwarnings("ignore")

IDS = torch.arange(6, 42).reshape(2, 18)


def quiet(_note: str) -> None:
    pass


def logits(folder: Path, file: str | None = None, **options: Any) -> torch.Tensor:
    options |= {"gguf_file": file} if file else {}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=IDS).logits
    return found


def field(reader: gguf.GGUFReader, key: str) -> Any:
    return reader.fields[key].contents()


#: Family, and changes of the configuration.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "tied": ("llama", {"tie_word_embeddings": True}),
    "biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "no groups": ("llama", {"num_key_value_heads": 4}),
    "mistral": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 8}),
    "gemma2": ("gemma2", {"query_pre_attn_scalar": 4}),
    "gemma3": ("gemma3", {"num_hidden_layers": 6}),
}  # fmt: skip


#: transformers derives these settings from a GGUF file otherwise: biases and Gemma's scale have
#: no key, and it does not read Qwen3's key_length.
GIVEN_CONFIG = ("biases", "qwen3", "gemma2", "gemma3")


@pytest.mark.parametrize("case", CASES)
def test_transformers_reads_the_same_model(case: str, tmp_path: Path) -> None:
    family, changes = CASES[case]
    base = write_base(tmp_path / "base", family, **changes)
    report = export_gguf(base, tmp_path / "m.gguf", say=quiet)
    assert (report.kind, report.dtype) == ("model", "f32")
    assert report.size_bytes == (tmp_path / "m.gguf").stat().st_size
    assert report.notes == ()
    given = {"config": AutoConfig.from_pretrained(base)} if case in GIVEN_CONFIG else {}
    want, have = logits(base), logits(tmp_path, "m.gguf", **given)
    assert want.std() > 0.01
    torch.testing.assert_close(have, want, atol=1e-5, rtol=0)
    one = AutoModelForCausalLM.from_pretrained(base).state_dict()
    other = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", **given).state_dict()
    assert one.keys() == other.keys()
    for name, value in one.items():
        # (w + 1) - 1 rounds, in the norms of Gemma
        torch.testing.assert_close(other[name], value, atol=2e-7 if "norm" in name else 0, rtol=0)


def test_rows_of_q_and_k_are_in_llamas_order(tmp_path: Path) -> None:
    """Feature 2i of a head is transformers' feature i, and 2i + 1 is i + head_dim / 2."""
    base = write_base(tmp_path / "base", "llama")
    export_gguf(base, tmp_path / "m.gguf", say=quiet)
    tensors = {t.name: t.data for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    layer = AutoModelForCausalLM.from_pretrained(base).model.layers[1].self_attn
    for name, heads in (("q", 4), ("k", 2)):
        weight = getattr(layer, f"{name}_proj").weight.detach().numpy()
        stored = tensors[f"blk.1.attn_{name}.weight"]
        for head in range(heads):
            for i in range(2):
                assert (stored[head * 4 + 2 * i] == weight[head * 4 + i]).all()
                assert (stored[head * 4 + 2 * i + 1] == weight[head * 4 + i + 2]).all()
    assert (tensors["blk.1.attn_v.weight"] == layer.v_proj.weight.detach().numpy()).all()


def test_keys_and_tokenizer(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", "qwen3", steps="qwen2", head_dim=8, rms_norm_eps=1e-5)
    export_gguf(base, tmp_path / "m.gguf", say=quiet)
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    want = {
        "general.architecture": "qwen3", "general.type": "model", "general.name": "base",
        "general.file_type": 0, "qwen3.block_count": 2, "qwen3.context_length": 64,
        "qwen3.embedding_length": 16, "qwen3.feed_forward_length": 24,
        "qwen3.attention.head_count": 4, "qwen3.attention.head_count_kv": 2,
        "qwen3.attention.key_length": 8, "qwen3.attention.value_length": 8,
        "qwen3.vocab_size": 300, "qwen3.rope.freq_base": 10000.0,
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.bos_token_id": 0, "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 289, "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": TEMPLATE,
    }  # fmt: skip
    assert {key: field(reader, key) for key in want} == want
    assert field(reader, "qwen3.attention.layer_norm_rms_epsilon") == pytest.approx(1e-5)
    tokens, types = (field(reader, f"tokenizer.ggml.{name}") for name in ("tokens", "token_type"))
    vocabulary = byte_level("qwen2").get_vocab()
    assert tokens == [
        *sorted(vocabulary, key=vocabulary.__getitem__),
        *(f"[PAD{i}]" for i in range(290, 300)),
    ]
    assert types[:4] == [3, 3, 3, 1]  # control, normal
    assert types[288:] == [4, 3] + [5] * 10  # user-defined, control, unused
    text = "it's  the cat 1234\n\n<|im_start|>é日"
    one = AutoTokenizer.from_pretrained(base)
    other = AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    assert one(text)["input_ids"] == other(text)["input_ids"]


@pytest.mark.parametrize("steps", ["gpt-2", "smollm", "qwen2"])
def test_the_pre_tokenizer_is_named(steps: str, tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", "llama", steps=steps)
    export_gguf(base, tmp_path / "m.gguf", say=quiet)
    assert field(gguf.GGUFReader(tmp_path / "m.gguf"), "tokenizer.ggml.pre") == steps


@pytest.mark.parametrize(
    ("dtype", "kinds", "tolerance"),
    [
        ("f16", {"F16", "F32"}, 2e-3),
        ("bf16", {"BF16", "F32"}, 2e-2),
        ("q8_0", {"Q8_0", "F32"}, 6e-2),
    ],
)
def test_dtypes(dtype: str, kinds: set[str], tolerance: float, tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", "llama", hidden_size=32, intermediate_size=32, head_dim=8)
    report = export_gguf(base, tmp_path / "m.gguf", dtype, say=quiet)
    assert (report.dtype, report.notes) == (dtype, ())
    assert {t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors} == kinds
    torch.testing.assert_close(
        logits(tmp_path, "m.gguf"), logits(base), atol=tolerance, rtol=tolerance
    )


def test_the_default_dtype_is_that_of_the_weights(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", "llama", torch.bfloat16)
    report = export_gguf(base, tmp_path / "m.gguf", say=quiet)
    assert report.dtype == "bf16"
    torch.testing.assert_close(logits(tmp_path, "m.gguf"), logits(base), atol=1e-6, rtol=0)
    notes: list[str] = []
    export_gguf(base, tmp_path / "q.gguf", "q8_0", say=notes.append)
    assert notes == ["16 matrices are float16: their row length is not a multiple of 32"]


def test_scaled_rope(tmp_path: Path) -> None:
    """The divisors of the frequencies are those that transformers computes."""
    rope = {
        "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
    }  # fmt: skip
    base = write_base(tmp_path / "base", "llama", head_dim=16, rope_parameters=rope)
    export_gguf(base, tmp_path / "m.gguf", say=quiet)
    (stored,) = (t.data for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors if "rope" in t.name)
    model = AutoModelForCausalLM.from_pretrained(base)
    plain = 1.0 / 10000.0 ** (torch.arange(0, 16, 2) / 16)
    want = plain / model.model.rotary_emb.inv_freq
    assert want.max() > 7 and want.min() == 1
    torch.testing.assert_close(torch.tensor(stored), want, rtol=1e-6, atol=0)
    linear = write_base(
        tmp_path / "linear",
        "llama",
        rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0},
    )
    export_gguf(linear, tmp_path / "l.gguf", say=quiet)
    reader = gguf.GGUFReader(tmp_path / "l.gguf")
    found = [
        field(reader, f"llama.rope.{key}")
        for key in ("scaling.type", "scaling.factor", "freq_base")
    ]
    assert found == ["linear", 4.0, 500.0]


def refusal(model: Path, out: Path, dtype: str | None = None, **options: Any) -> str:
    with pytest.raises(UserError) as found:
        export_gguf(model, out, dtype, say=quiet, **options)
    assert not out.exists()
    assert list(out.parent.glob(".*")) == []
    return str(found.value)


#: Family, changes, and what the message says.
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "architecture": ("phi3", {}, "model_type = phi3: cannot be written as GGUF; allowed: llama (also SmolLM2), mistral"),
    "activation": ("llama", {"hidden_act": "gelu"}, 'hidden_act = "gelu": llama.cpp does not support it in llama; allowed: silu'),
    "rope": ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, 'rope_type = "dynamic": cannot be written as GGUF; allowed: default, linear, yarn, llama3'),
    "scale": ("gemma2", {"query_pre_attn_scalar": 5}, "query_pre_attn_scalar = 5: llama.cpp does not support it in gemma2 of this size; allowed: 4"),
    "layers": ("gemma3", {"layer_types": ["full_attention"] * 2}, "layer_types: llama.cpp supports full attention in each 6th layer of gemma3 only"),
    "pre-tokenizer": ("llama", {"steps": "unknown"}, "allowed: the pre-tokenizers gpt-2, smollm, llama-bpe, qwen2, tekken of llama.cpp"),
    "vocabulary": ("llama", {"vocab_size": 200}, "the tokenizer has ids up to 289, and the model's embedding 200 rows"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str, tmp_path: Path) -> None:
    family, changes, message = REFUSED[case]
    base = write_base(tmp_path / "base", family, **changes)
    text = refusal(base, tmp_path / "m.gguf")
    assert text.startswith(f"{base}: ")
    assert message in text


def test_refused_files(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", "llama")
    assert "allowed: f32, f16, bf16, q8_0" in refusal(base, tmp_path / "m.gguf", "q4_0")
    assert refusal(base, tmp_path / "m.bin").endswith("allowed: a file whose name ends with .gguf")
    assert "allowed: with an adapter" in refusal(base, tmp_path / "m.gguf", base="other")
    missing = tmp_path / "no" / "m.gguf"
    with pytest.raises(UserError, match="no does not exist"):
        export_gguf(base, missing, say=quiet)
    (tmp_path / "m.gguf").write_text("kept")
    with pytest.raises(
        UserError, match="already exists; hint: choose another, or pass --overwrite"
    ):
        export_gguf(base, tmp_path / "m.gguf", say=quiet)
    assert (tmp_path / "m.gguf").read_text() == "kept"
    export_gguf(base, tmp_path / "m.gguf", say=quiet, overwrite=True)
    assert (tmp_path / "m.gguf").read_bytes()[:4] == b"GGUF"


def test_values_beyond_float16(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", "llama")
    model = AutoModelForCausalLM.from_pretrained(base)
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = 1e5
    model.save_pretrained(base)
    text = refusal(base, tmp_path / "m.gguf", "f16")
    assert (
        text == "blk.0.ffn_up.weight: values exceed the range of float16; hint: --dtype bf16 or f32"
    )


def test_one_tensor_is_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = write_base(tmp_path / "base", "llama", num_hidden_layers=4)
    read, seen, alive = Checkpoint.read, [], []

    def recorded(checkpoint: Checkpoint, name: str) -> torch.Tensor:
        alive.append(sum(tensor() is not None for tensor in seen))
        value = read(checkpoint, name)
        seen.append(weakref.ref(value))
        return value

    monkeypatch.setattr(Checkpoint, "read", recorded)
    export_gguf(base, tmp_path / "m.gguf", say=quiet)
    assert len(seen) == 39
    assert max(alive) <= 1


def test_a_sentencepiece_vocabulary(tmp_path: Path) -> None:
    """Scores from merges rank tokens as those of the SentencePiece model do."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    words = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "\u2581", "a", "b", "c",
             "ab", "\u2581ab", "bc"]  # fmt: skip
    merges = [("a", "b"), ("\u2581", "ab"), ("b", "c")]
    backend = Tokenizer(
        models.BPE(
            {word: i for i, word in enumerate(words)},
            merges,
            unk_token="<unk>",
            byte_fallback=True,
            fuse_unk=True,
        )
    )
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    backend.add_tokens(["\u2581\u2581x"])
    base = write_base(tmp_path / "base", "llama")
    save_tokenizer(base, backend, eos_token="</s>", unk_token="<unk>", pad_token="</s>")
    export_gguf(base, tmp_path / "m.gguf", say=quiet)
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    tokens, scores, types = (
        field(reader, f"tokenizer.ggml.{name}") for name in ("tokens", "scores", "token_type")
    )
    assert field(reader, "tokenizer.ggml.model") == "llama"
    assert field(reader, "tokenizer.ggml.add_space_prefix") is True
    assert [scores[words.index(w)] for w in ("ab", "\u2581ab", "bc", "a")] == [0, -1, -2, -3]
    assert types[:4] == [2, 3, 3, 6]
    assert (types[266], tokens[266], scores[266]) == (4, "  x", -1000)
    pieces = [
        _piece(w, -float(i), {0: 2, 1: 3, 2: 3}.get(i, 6 if i < 259 else 1))
        for i, w in enumerate(words)
    ]
    (base / "tokenizer.model").write_bytes(
        b"".join(pieces) + b"\x12\x02\x18\x03"
    )  # and a trainer spec
    export_gguf(base, tmp_path / "m.gguf", say=quiet, overwrite=True)
    again = gguf.GGUFReader(tmp_path / "m.gguf")
    assert field(again, "tokenizer.ggml.scores")[3:266] == [-float(i) for i in range(3, 266)]
    assert field(again, "tokenizer.ggml.token_type") == types
    (base / "tokenizer.model").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    assert "tokenizer.model: not a SentencePiece model" in refusal(base, tmp_path / "x.gguf")


def _piece(text: str, score: float, kind: int) -> bytes:
    content = text.encode()
    inner = b"\x0a" + bytes([len(content)]) + content + b"\x15" + struct.pack("<f", score)
    inner += b"\x18" + bytes([kind])
    return b"\x0a" + bytes([len(inner)]) + inner


def test_a_checkpoint_of_another_model(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", "llama")
    settings = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(settings | {"vocab_size": 320}))
    assert "vocab_size = 320 in config.json, but the embedding has 300 rows" in refusal(
        base, tmp_path / "m.gguf"
    )
    (base / "config.json").write_text(json.dumps(settings | {"num_hidden_layers": 1}))
    assert "llama.cpp has no such tensors in llama: model.layers.1." in refusal(
        base, tmp_path / "m.gguf"
    )
