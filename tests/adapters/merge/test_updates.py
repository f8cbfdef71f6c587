"""The streamed sum is bit-equal to the plain formula, in little memory, with any number of threads."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorakit.adapters.load import load
from lorakit.adapters.merge import by_name
from lorakit.adapters.merge import run as merge_module
from lorakit.adapters.merge import stream as merge_stream
from lorakit.adapters.merge import workers as merge_workers
from lorakit.adapters.merge.run import merge
from lorakit.errors import AdapterError, ModelError
from lorakit.layers import adapted_modules
from tests.adapters.directories import write_adapter, write_base

_CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "linear": ("llama", {"target_modules": ["all-linear"], "r": 5}),
    "parts of a fused matrix": ("phi3", {"target_modules": ["q", "v", "o"]}),
    "parts of each head": ("gpt_neox", {"target_modules": ["q", "v"]}),
    "transposed": ("gpt2", {"target_modules": ["c_fc", "c_proj", "k"]}),
    "embedding": ("llama", {"target_modules": ["embed_tokens", "q"]}),
    "no power of two": ("qwen3", {"target_modules": ["q", "o"], "lora_alpha": 7}),
    "adalora": ("llama", {"method": "adalora", "target_modules": ["q", "v"]}),
    "dora": ("llama", {"method": "dora", "target_modules": ["q", "down_proj"]}),
    "dora, transposed": ("gpt2", {"method": "dora", "target_modules": ["c_fc"]}),
    "intrinsic": ("llama", {"method": "intrinsic", "target_modules": ["q", "v"]}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", _CASES)
def test_the_bits_of_the_formula(
    case: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """W + scaling * B A in float32, rounded once, in many chunks on several threads."""
    family, keys = _CASES[case]
    if keys.get("method") == "intrinsic":
        keys = {key: value for key, value in keys.items() if key != "r"}
    base = write_base(tmp_path / "base", family, dtype)
    adapter = write_adapter(base, tmp_path / "adapter", **keys)
    monkeypatch.setattr(merge_stream, "CHUNK_ELEMENTS", 256)
    monkeypatch.setattr(merge_workers, "SMALL_BYTES", 0)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: {0, 1, 2}, raising=False)
    threads = torch.get_num_threads()
    merge(base, adapter, tmp_path / "out")
    assert torch.get_num_threads() == threads
    stored, merged = (load_file(tmp_path / f / "model.safetensors") for f in ("base", "out"))
    layers = adapted_modules(load(base, adapter, dtype=str(dtype).removeprefix("torch.")))
    exact = 0
    for name, layer in layers.items():
        key = f"{name}.weight"
        key = key if key in stored else key.replace("lm_head", "embed_out")
        want = layer.fold(stored[key]).detach().to(dtype)
        assert not torch.equal(want, stored[key])
        if "dora" in case:  # the norm of a row is summed in another order
            torch.testing.assert_close(merged[key], want)
        else:
            assert torch.equal(merged[key], want), key
        exact += 1
    assert exact == len(layers) > 0
    untouched = set(stored) - {f"{name}.weight" for name in layers}
    assert all(torch.equal(stored[name], merged[name]) for name in untouched if name in merged)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3"])
@pytest.mark.parametrize("tied", [False, True])
def test_resolving_by_name_equals_resolving_by_class(
    family: str, tied: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A merge without a model object writes the same bytes as one with it."""
    base = write_base(tmp_path / "base", family, torch.bfloat16, tie_word_embeddings=tied)
    a = write_adapter(base, tmp_path / "a", target_modules=["all-linear"])
    b = write_adapter(base, tmp_path / "b", seed=1, target_modules=["q"])
    found = []
    monkeypatch.setattr(
        merge_module, "resolve_by_name",
        lambda *args: found.append(by_name.resolve_by_name(*args)) or found[-1],
    )  # fmt: skip
    merge(base, a, tmp_path / "quick", add=[(b, 0.5)])
    assert found[0] is not None
    monkeypatch.setattr(merge_module, "resolve_by_name", lambda *_: None)
    merge(base, a, tmp_path / "class", add=[(b, 0.5)])
    files = {f: sorted((tmp_path / f).iterdir()) for f in ("quick", "class")}
    assert [p.name for p in files["quick"]] == [p.name for p in files["class"]]
    for one, other in zip(*files.values(), strict=True):
        assert one.read_bytes() == other.read_bytes(), one.name


@pytest.mark.parametrize("keys", [
    {"target_modules": ["lm_head"]}, {"target_modules": ["embed_tokens"]}, {"bias": "all"},
    {"modules_to_save": ["norm"]}, {"method": "intrinsic", "r": None},
], ids=str)  # fmt: skip
def test_bases_that_names_cannot_resolve_are_resolved_by_class(
    keys: dict[str, Any], tmp_path: Path
) -> None:
    if keys.get("r", 0) is None:
        keys = {key: value for key, value in keys.items() if key != "r"}
    base = write_base(tmp_path / "base", "qwen2", attention_bias=True)
    adapter = write_adapter(base, tmp_path / "adapter", **keys)
    own = merge_module.read_weighted(adapter, 1, [])
    settings = json.loads((base / "config.json").read_text())
    with merge_module.Checkpoint(base) as checkpoint:
        assert by_name.resolve_by_name(settings, checkpoint, own) is None
        plain = merge_module.read_weighted(write_adapter(base, tmp_path / "plain"), 1, [])
        assert by_name.resolve_by_name(settings, checkpoint, plain) is not None
        changes: list[dict[str, Any]] = [
            {"num_hidden_layers": 3}, {"model_type": "bert"}, {"architectures": None},
            {"architectures": ["Qwen2ForSequenceClassification"]}, {"auto_map": {}},
        ]  # fmt: skip
        for change in changes:
            assert by_name.resolve_by_name(settings | change, checkpoint, plain) is None


@pytest.mark.parametrize("biased", [None, True, False])
@pytest.mark.parametrize("model_type", by_name.PLAIN)
def test_families_whose_configuration_tells_all(model_type: str, biased: bool | None) -> None:
    """transformers converts nothing for these families, all matrices but the embedding are nn.Linear, and
    names and shapes are those of the class."""
    import transformers as tf
    from transformers.conversion_mapping import get_model_conversion_mapping

    small = {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4,
             "num_key_value_heads": 2, "intermediate_size": 96, "vocab_size": 128}  # fmt: skip
    if model_type not in ("olmo", "cohere2", "stablelm", "starcoder2"):  # always hidden / heads
        small["head_dim"] = 32
    keys = ("attention_bias", "mlp_bias", "use_bias", "use_qkv_bias", "attention_out_bias")
    known = tf.CONFIG_MAPPING[model_type]().to_dict()
    biases = {} if biased is None else {key: biased for key in keys if key in known}
    config = tf.CONFIG_MAPPING[model_type](**small, **biases, pad_token_id=0)
    decoder = by_name.PLAIN[model_type]
    with torch.device("meta"):
        model = getattr(tf, decoder.class_name)(config)
    assert config.tie_word_embeddings == decoder.tied
    assert not config.sub_configs
    assert not get_model_conversion_mapping(model, add_legacy=False)
    state = model.state_dict()
    want = {name: tuple(value.shape) for name, value in state.items()}
    assert decoder.shapes({**small, **biases}) == want
    assert decoder.shapes(config.to_dict()) == want
    for key, value in state.items():
        module = key.rpartition(".")[0]
        if value.ndim == 2:
            exact = type(model.get_submodule(module)) is torch.nn.Linear
            assert exact != (module == "model.embed_tokens"), key
    for key in decoder.unless:
        assert decoder.shapes({**small, key: True}) is None


@pytest.mark.parametrize(
    ("lost", "shape", "settings", "said"),
    [
        (r"lm_head\.weight", None, {}, r"in neither the base .*, including lm_head\.weight"),
        (r"model\.norm\.weight", None, {}, r"including model\.norm\.weight"),
        (r".*mlp\.up_proj\.weight", None, {}, r"2 weights .*layers\.0\.mlp\.up_proj\.weight"),
        (r".*input_layernorm\.weight", None, {}, r"layers\.0\.input_layernorm\.weight"),
        (r".*q_proj\.bias", None, {}, r"layers\.0\.self_attn\.q_proj\.bias"),
        (r".*up_proj\.weight", (20, 16), {}, r"has shape \(20, 16\), and \(24, 16\) by the configuration"),
        (r"lm_head\.weight", (70, 16), {}, r"lm_head\.weight has shape \(70, 16\)"),
        (r".*k_proj\.weight", (16, 16), {}, r"k_proj\.weight has shape \(16, 16\)"),
        (None, None, {"vocab_size": 80}, r"has shape \(64, 16\), and \(80, 16\) by the configuration"),
        (None, None, {"num_key_value_heads": 4}, r"k_proj.* and \(16,\) by the configuration"),
    ],
)  # fmt: skip
def test_a_base_that_does_not_match_its_configuration(
    lost: str | None, shape: tuple[int, ...] | None, settings: dict[str, int], said: str,
    tmp_path: Path,
) -> None:  # fmt: skip
    base = write_base(tmp_path / "base", "qwen2")
    adapter = write_adapter(base, tmp_path / "adapter", target_modules=["q"])
    state = load_file(base / "model.safetensors")
    for name in [name for name in state if lost and re.fullmatch(lost, name)]:
        state.pop(name)
        if shape is not None:
            state[name] = torch.zeros(shape)
    save_file(state, base / "model.safetensors", metadata={"format": "pt"})
    own = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(own | settings))
    with pytest.raises((AdapterError, ModelError), match=said):
        merge(base, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


_WATCHED = """
import sys, threading, time
def anonymous():
    text = open("/proc/self/status").read()
    return int(text.split("RssAnon:")[1].split()[0]) / 1024
import torch
from lorakit.adapters.merge.run import merge
merge(*sys.argv[1:3], sys.argv[3] + "-warm", max_shard_size="1MB")
before = peak = anonymous()
done = threading.Event()
def watch():
    global peak
    while not done.wait(0.002):
        peak = max(peak, anonymous())
watcher = threading.Thread(target=watch)
watcher.start()
merge(*sys.argv[1:])
done.set()
watcher.join()
print(peak - before, "transformers" in sys.modules)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_memory_is_a_few_chunks(tmp_path: Path) -> None:
    """With one file of 150 MB, tensors of 50 MB (100 in float32) and an adapter of 88 MB, neither
    file is ever fully in memory, and no model is created."""
    base = tmp_path / "base"
    sizes = {"vocab_size": 64, "hidden_size": 2048, "intermediate_size": 12288,
             "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
             "head_dim": 16}  # fmt: skip
    base.mkdir()
    stem = "model.layers.0"
    shapes = {"mlp.gate_proj": (12288, 2048), "mlp.up_proj": (12288, 2048),
              "mlp.down_proj": (2048, 12288), "self_attn.q_proj": (32, 2048)}  # fmt: skip
    own = by_name.PLAIN["llama"].shapes(sizes)
    assert own is not None
    state = {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in own.items()}
    save_file(state, base / "model.safetensors", metadata={"format": "pt"})
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **sizes}
    (base / "config.json").write_text(json.dumps(config))
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    factors, r = {}, 512
    for name, (rows, columns) in shapes.items():
        factors[f"base_model.model.{stem}.{name}.lora_A.weight"] = torch.ones(r, columns)
        factors[f"base_model.model.{stem}.{name}.lora_B.weight"] = torch.ones(rows, r)
    save_file(factors, adapter / "adapter_model.safetensors")
    (adapter / "adapter_config.json").write_text(json.dumps({
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": r, "lora_alpha": 1,
        "target_modules": [name.rpartition(".")[2] for name in shapes],
    }))  # fmt: skip
    out = subprocess.run(
        [sys.executable, "-c", _WATCHED, base, adapter, tmp_path / "out"],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[3])},
        capture_output=True, text=True, check=True,
    ).stdout.split()  # fmt: skip
    assert float(out[0]) < 130, f"{out[0]} MB"
    assert out[1] == "False"
    merged = load_file(tmp_path / "out" / "model.safetensors")
    assert (merged[f"{stem}.mlp.up_proj.weight"] == 1).all()


def test_magnitudes_outside_the_parts_of_a_fused_matrix(tmp_path: Path) -> None:
    """The parts of q and v cannot express a change of k's rows: refused by merge as by load."""
    base = write_base(tmp_path / "base", "gpt2")
    keys = {"method": "dora", "target_modules": ["q", "v"]}
    adapter = write_adapter(base, tmp_path / "adapter", **keys)
    merge(base, adapter, tmp_path / "out")
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    m = next(value for name, value in tensors.items() if "magnitude" in name)
    m[len(m) // 2] *= 2
    save_file(tensors, file, metadata={"format": "pt"})
    message = "parts q, v do not cover all changes by lora_magnitude_vector"
    with pytest.raises(AdapterError, match=message):
        load(base, adapter)
    with pytest.raises(AdapterError, match=message):
        merge(base, adapter, tmp_path / "other")
    assert not (tmp_path / "other").exists()
