"""The merged model keeps every tensor and setting of the base, whatever class was trained."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, Qwen3_5ForConditionalGeneration

from lorakit.adapters.load import load
from lorakit.adapters.merge.run import merge
from lorakit.errors import AdapterError
from tests.adapters.checkpoints import (
    MODELS,
    add_tensors,
    settings,
    tensors,
    write_model,
    write_random_adapter,
)
from tests.adapters.conftest import MakePair
from tests.families import tiny, token_ids


def _logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model(input_ids=token_ids()).logits
    return out


def _check(base: Path, adapter: Path, out: Path) -> set[str]:
    """Assert that the merged model equals ``lorakit.load`` and keeps everything of the base; return
    the changed tensors."""
    merge(base, adapter, out)
    merged = AutoModelForCausalLM.from_pretrained(out, dtype="auto").eval()
    want = _logits(load(base, adapter))
    torch.testing.assert_close(_logits(merged), want, atol=1e-5, rtol=0)
    plain = _logits(AutoModelForCausalLM.from_pretrained(base, dtype="auto").eval())
    assert (plain - want).abs().max() > 1e-3, "the adapter does something"
    before, after = tensors(base), tensors(out)
    assert set(before) == set(after)
    for name, value in before.items():
        assert (value.dtype, value.shape) == (after[name].dtype, after[name].shape), name
    assert (base / "config.json").read_bytes() == (out / "config.json").read_bytes()
    return {name for name, value in before.items() if not torch.equal(value, after[name])}


#: Modules of these are not adapted as linear layers.
_TARGETS = {
    "llama4": ["attention"], "llama4_text": ["attention"], "mamba": ["in_proj", "out_proj"],
    "qwen3_5": ["q", "v", "o"], "gemma3": [r"re:.*language_model.*_proj"],
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_nothing_of_the_base_is_lost(name: str, tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", name)
    targets = _TARGETS.get(name, ["all-linear"])
    write_random_adapter(base, tmp_path / "adapter", target_modules=targets)
    changed = _check(base, tmp_path / "adapter", tmp_path / "out")
    assert not {key for key in changed if key.startswith(("mtp.", "model.visual."))}


@pytest.mark.parametrize(
    ("name", "whole"),
    [("qwen3_moe", "experts"), ("mixtral", "experts"), ("gpt_oss", "experts"),
     ("deepseek_v3", "gate"), ("qwen3_moe", "gate")],
)  # fmt: skip
def test_fully_trained_experts_and_routers(name: str, whole: str, tmp_path: Path) -> None:
    """transformers loads the experts as one matrix; they are written in the base's own layout."""
    base = write_model(tmp_path / "base", name)
    write_random_adapter(
        base, tmp_path / "adapter", target_modules=["o_proj"], modules_to_save=[whole]
    )
    changed = _check(base, tmp_path / "adapter", tmp_path / "out")
    assert {key for key in changed if f".{whole}." in key}


@pytest.mark.parametrize("targets", [["in_proj"], ["in_proj", "dt_proj"]], ids=str)
def test_a_layer_that_is_not_called_is_named(
    targets: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = write_model(tmp_path / "base", "mamba")
    write_random_adapter(base, tmp_path / "adapter", target_modules=targets)
    capsys.readouterr()
    for act in (load, lambda *given: merge(*given, tmp_path / "out")):
        act(base, tmp_path / "adapter")
        said = capsys.readouterr().err
        assert ("backbone.layers.0.mixer.dt_proj" in said) == ("dt_proj" in targets)


def test_single_experts_of_a_class_that_stacks_them(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", "mixtral")
    adapter = tmp_path / "adapter"
    write_random_adapter(base, adapter, target_modules=["q_proj"])
    stem = "base_model.model.model.layers.0.block_sparse_moe.experts.0.w9.lora"
    more = {f"{stem}_A.weight": torch.ones(4, 16), f"{stem}_B.weight": torch.ones(24, 4)}
    file = adapter / "adapter_model.safetensors"
    save_file(load_file(file) | more, file)
    for act in (load, lambda *given: merge(*given, tmp_path / "out")):
        with pytest.raises(AdapterError, match=r"experts\.0\.w9.*its experts are stacked"):
            act(base, adapter)


def test_experts_of_several_dtypes_keep_them(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", "qwen3_moe")
    name = "model.layers.0.mlp.experts.1.up_proj.weight"
    add_tensors(base, {name: tensors(base)[name].bfloat16()})
    write_random_adapter(
        base, tmp_path / "adapter", target_modules=["o_proj"], modules_to_save=["experts"]
    )
    merge(base, tmp_path / "adapter", tmp_path / "out")
    before, after = tensors(base), tensors(tmp_path / "out")
    assert {k: v.dtype for k, v in before.items()} == {k: v.dtype for k, v in after.items()}
    assert not torch.equal(before[name], after[name])


def test_tensors_that_the_class_does_not_read_are_reported(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", "qwen3_5")
    write_random_adapter(base, tmp_path / "adapter", target_modules=["q"])
    report = merge(base, tmp_path / "adapter", tmp_path / "out", dtype="bfloat16")
    assert {name.split(".")[0] for name in report.kept} >= {"mtp"}
    assert {n for n in tensors(base) if "visual" in n} < set(report.kept)
    merged = tensors(tmp_path / "out")
    assert merged["mtp.steps"].dtype == torch.int64
    assert merged["mtp.scale"].dtype == torch.bfloat16
    edited = settings(tmp_path / "out")
    assert edited["dtype"] == "bfloat16"
    assert edited["architectures"] == ["Qwen3_5ForConditionalGeneration"]


@pytest.mark.parametrize("targets", [["q", "v"], ["lm_head", "q"]], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_output_layer_that_the_configuration_calls_tied(
    dtype: torch.dtype, targets: list[str], tmp_path: Path
) -> None:
    """The stored tensors decide, and the merged configuration matches them."""
    base = tmp_path / "base"
    tiny("llama", tie_word_embeddings=True).to(dtype).save_pretrained(base)
    head = torch.randn(64, 16, generator=torch.Generator().manual_seed(5)).to(dtype)
    add_tensors(base, {"lm_head.weight": head})
    write_random_adapter(base, tmp_path / "adapter", target_modules=targets)
    merge(base, tmp_path / "adapter", tmp_path / "out", dtype="float32")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    unmerged = load(base, tmp_path / "adapter", dtype="float32")
    torch.testing.assert_close(_logits(merged), _logits(unmerged), atol=1e-5, rtol=0)
    if "lm_head" not in targets:
        assert torch.equal(merged.lm_head.weight, head.float())
    before, after = settings(base), settings(tmp_path / "out")
    differ = {key for key in before if before[key] != after[key]}
    assert differ == {"tie_word_embeddings"} | ({"dtype"} if dtype != torch.float32 else set())
    assert after["tie_word_embeddings"] is False


@pytest.mark.parametrize("targets", [["q"], ["lm_head"], ["embed_tokens"]], ids=str)
def test_a_tied_output_layer_that_is_stored_twice(targets: list[str], tmp_path: Path) -> None:
    """Equal values under both names (as in converted pickles) count as one weight."""
    base = tmp_path / "base"
    model = tiny("llama", tie_word_embeddings=True)
    model.save_pretrained(base)
    add_tensors(base, {"lm_head.weight": model.lm_head.weight.detach().clone()})
    write_random_adapter(base, tmp_path / "adapter", target_modules=targets)
    merge(base, tmp_path / "adapter", tmp_path / "out")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    want = _logits(load(base, tmp_path / "adapter"))
    torch.testing.assert_close(_logits(merged), want, atol=1e-5, rtol=0)
    assert set(tensors(base)) == set(tensors(tmp_path / "out"))
    assert settings(tmp_path / "out")["tie_word_embeddings"] is (targets == ["q"])


@pytest.mark.parametrize("new_names", [False, True])
@pytest.mark.parametrize("name", ["gemma3", "qwen3_5"])
def test_tied_embeddings_of_a_multimodal_base(name: str, new_names: bool, tmp_path: Path) -> None:
    """The adapter unties them: every configuration section says so, and the new output layer gets the
    name that checkpoints of this kind use."""
    base = write_model(tmp_path / "base", name)
    own = settings(base)
    own["tie_word_embeddings"] = own["text_config"]["tie_word_embeddings"] = True
    (base / "config.json").write_text(json.dumps(own))
    state = {key: value for key, value in tensors(base).items() if key != "lm_head.weight"}
    if new_names:  # Gemma 3 is saved under its first names, and read under later ones as well
        state = {re.sub(r"^language_model\.model\.", "model.language_model.", key): value
                 for key, value in state.items()}  # fmt: skip
        state = {re.sub(r"^(vision_tower|multi_modal_projector)", r"model.\1", key): value
                 for key, value in state.items()}  # fmt: skip
    save_file(state, base / "model.safetensors", metadata={"format": "pt"})
    targets = [r"re:lm_head", "re:.*language_model.*q_proj" if name == "gemma3" else "q"]
    write_random_adapter(base, tmp_path / "adapter", target_modules=targets)
    merge(base, tmp_path / "adapter", tmp_path / "out")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    want = _logits(load(base, tmp_path / "adapter"))
    torch.testing.assert_close(_logits(merged), want, atol=1e-5, rtol=0)
    [new] = set(tensors(tmp_path / "out")) - set(state)
    assert set(state) < set(tensors(tmp_path / "out"))
    first = any(key.startswith("language_model.model.") for key in state)
    assert first == (name == "gemma3" and not new_names)
    assert new == ("language_model.lm_head.weight" if first else "lm_head.weight")
    edited = settings(tmp_path / "out")
    assert edited["tie_word_embeddings"] is False
    assert edited["text_config"]["tie_word_embeddings"] is False
    assert {k for k in own if own[k] != edited[k]} == {"tie_word_embeddings", "text_config"}


@pytest.mark.parametrize("stored", [False, True])
def test_a_multimodal_base_tied_at_the_top_level(stored: bool, tmp_path: Path) -> None:
    """The class reads only the top-level flag; a stored output layer stays separate."""
    base = write_model(tmp_path / "base", "qwen3_5")
    own = settings(base) | {"tie_word_embeddings": True}
    assert own["text_config"]["tie_word_embeddings"] is False
    (base / "config.json").write_text(json.dumps(own))
    state = tensors(base)
    head = state["lm_head.weight"]
    if not stored:
        head = state["model.language_model.embed_tokens.weight"]
        state.pop("lm_head.weight")
        save_file(state, base / "model.safetensors", metadata={"format": "pt"})
    write_random_adapter(base, tmp_path / "adapter", target_modules=["q"])
    model = load(base, tmp_path / "adapter")
    assert torch.equal(model.get_output_embeddings().weight, head)
    merge(base, tmp_path / "adapter", tmp_path / "out")
    assert set(tensors(base)) == set(tensors(tmp_path / "out"))
    merged, info = Qwen3_5ForConditionalGeneration.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not info["missing_keys"]
    torch.testing.assert_close(_logits(merged.eval()), _logits(model), atol=1e-5, rtol=0)


_OLD_CONFIG = """{
  "_name_or_path": "somewhere/else",
  "architectures": [
    "LlamaForCausalLM"
  ],
  "model_type": "llama",
  "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
  "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4, "vocab_size": 64,
  "max_position_embeddings": 64, "rms_norm_eps": 1e-06,
  "rope_theta": 500000.0,
  "rope_scaling": {"rope_type": "linear", "factor": 2.0},
  "tokenizer_class": "LlamaTokenizer", "unknown_key": {"a": [1, null, "\\u00e9"]},
  "tie_word_embeddings": false, "torch_dtype": "float32",
  "transformers_version": "4.44.0"
}"""


def test_a_configuration_that_an_older_version_wrote(make_pair: MakePair, tmp_path: Path) -> None:
    """No byte changes unless necessary; a different dtype changes only that setting."""
    base, adapter, _ = make_pair()
    (base / "config.json").write_text(_OLD_CONFIG)
    merge(base, adapter, tmp_path / "out")
    assert (tmp_path / "out" / "config.json").read_text() == _OLD_CONFIG
    merge(base, adapter, tmp_path / "half", dtype="bfloat16")
    want = json.loads(_OLD_CONFIG) | {"torch_dtype": "bfloat16"}
    assert settings(tmp_path / "half") == want
    assert list(settings(tmp_path / "half")) == list(want)


def test_only_the_labels_of_a_classifier_are_edited(make_pair: MakePair, tmp_path: Path) -> None:
    _, adapter, _ = make_pair("roberta", id2label={0: "no", 1: "maybe", 2: "yes"})
    base = tmp_path / "bare"
    tiny("roberta").base_model.save_pretrained(base)
    own = settings(base) | {"position_embedding_type": "absolute", "gradient_checkpointing": False}
    (base / "config.json").write_text(json.dumps(own))
    merge(base, adapter, tmp_path / "out")
    edited = settings(tmp_path / "out")
    differ = {key for key in {*own, *edited} if own.get(key) != edited.get(key)}
    assert differ <= {"architectures", "id2label", "label2id"}
    assert edited["architectures"] == ["RobertaForSequenceClassification"]
    assert edited["id2label"] == {"0": "no", "1": "maybe", "2": "yes"}
    assert edited["label2id"] == {"no": 0, "maybe": 1, "yes": 2}


def test_a_masked_language_head_stays_beside_a_classifier(
    make_pair: MakePair, tmp_path: Path
) -> None:
    from transformers import BertForMaskedLM

    _, adapter, model = make_pair("bert")
    base = tmp_path / "masked"
    masked = BertForMaskedLM(tiny("bert").config)
    masked.bert.load_state_dict(tiny("bert").bert.state_dict(), strict=False)
    masked.save_pretrained(base)
    add_tensors(base, {k: v for k, v in tensors(tmp_path / "base").items() if "pooler" in k})
    report = merge(base, adapter, tmp_path / "out")
    assert any(name.startswith("cls.") for name in report.kept)
    assert set(tensors(tmp_path / "out")) == {
        *tensors(base), "classifier.weight", "classifier.bias",
    }  # fmt: skip
    from transformers import AutoModelForSequenceClassification as Auto

    merged = Auto.from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(_logits(merged), _logits(model), atol=1e-5, rtol=0)


def test_file_metadata_and_order_are_the_bases(make_pair: MakePair, tmp_path: Path) -> None:
    base, adapter, _ = make_pair()
    state = dict(reversed(load_file(base / "model.safetensors").items()))
    save_file(state, base / "model.safetensors", metadata={"format": "pt", "note": "kept"})
    merge(base, adapter, tmp_path / "out")
    found: list[Any] = []
    for folder in (base, tmp_path / "out"):
        with safe_open(folder / "model.safetensors", "pt") as stored:
            offsets = json.loads(_header(folder / "model.safetensors"))
            found.append((stored.metadata(), {k: v for k, v in offsets.items() if k[0] != "_"}))
    assert found[0] == found[1]


def _header(file: Path) -> bytes:
    content = file.read_bytes()
    return content[8 : 8 + int.from_bytes(content[:8], "little")]
