from __future__ import annotations

import json
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lorakit.errors import ModelError, UserError
from lorakit.models.load import load_empty, load_pretrained
from lorakit.models.window import fit_max_length, window
from lorakit.recipe.sections import ModelSection, TaskSection
from tests.families import tiny, token_ids


def section(path: Path | str, **keys: Any) -> ModelSection:
    return ModelSection(**{"name_or_path": str(path), "dtype": "float32", **keys})


def edited(folder: Path, model: Path, **config: Any) -> Path:
    """Return a copy of the model with another configuration."""
    copy = folder / "model"
    shutil.copytree(model, copy)
    found = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(found | config))
    return copy


def test_a_causal_model_equals_its_files(tiny_llama: Path) -> None:
    loaded = load_pretrained(section(tiny_llama), "causal")
    assert not loaded.model.training
    assert loaded.new_modules == ()
    stored = load_file(tiny_llama / "model.safetensors")
    state = loaded.model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in stored.items())
    assert load_pretrained(section(tiny_llama, dtype="bfloat16"), "causal").model.dtype == (
        torch.bfloat16
    )


def test_a_pad_token_is_chosen_and_eos_is_unchanged(tiny_llama: Path) -> None:
    loaded = load_pretrained(section(tiny_llama), "causal")
    assert loaded.tokenizer.eos_token == "</s>"
    assert loaded.tokenizer.pad_token_id is not None
    assert loaded.model.config.pad_token_id == loaded.tokenizer.pad_token_id
    assert loaded.model.config.eos_token_id == loaded.tokenizer.eos_token_id
    assert loaded.tokenizer.padding_side == "right"
    assert len(loaded.notes) == 1
    assert "no pad token" in loaded.notes[0]


def test_a_reserved_token_is_preferred_for_padding(tiny_llama: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<pad>"]})
    copy = edited(tmp_path, tiny_llama)
    tokenizer.save_pretrained(copy)
    loaded = load_pretrained(section(copy), "causal")
    assert loaded.tokenizer.pad_token == "<pad>"
    assert loaded.tokenizer.eos_token == "</s>"


def test_an_encoders_head_is_initialized_from_the_seed(tiny_bert: Path) -> None:
    def head(seed: int) -> torch.Tensor:
        torch.rand(seed)
        loaded = load_pretrained(section(tiny_bert), "encoder", ["no", "yes", "maybe"], seed)
        assert "classifier" in loaded.new_modules
        assert loaded.model.config.id2label == {0: "no", 1: "yes", 2: "maybe"}
        assert loaded.model.config.problem_type == "single_label_classification"
        assert loaded.notes == ()
        weight: torch.Tensor = loaded.model.get_submodule("classifier").weight  # type: ignore[assignment]
        return weight

    assert head(1).shape == (3, 32)
    assert torch.equal(head(1), head(1))
    assert not torch.equal(head(1), head(2))


def test_regression_has_one_output(tiny_bert: Path) -> None:
    config = load_pretrained(section(tiny_bert), "encoder", None).model.config
    assert (config.num_labels, config.problem_type) == (1, "regression")


def test_trained_head_is_kept(tiny_bert: Path, tmp_path: Path) -> None:
    first = load_pretrained(section(tiny_bert), "encoder", ["a", "b"], seed=1)
    first.model.save_pretrained(tmp_path / "classifier")
    first.tokenizer.save_pretrained(tmp_path / "classifier")
    again = load_pretrained(section(tmp_path / "classifier"), "encoder", ["a", "b"], seed=2)
    assert again.new_modules == ()
    for name, value in first.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[name])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "no/such-model",
            "no such directory, not in the local cache, and the Hub cannot be reached",
        ),
        ("nowhere", "nowhere"),
    ],
)
def test_a_missing_model(name: str, message: str, in_tmp: Path) -> None:
    with pytest.raises(ModelError) as caught:
        load_pretrained(section(name), "causal")
    assert message in str(caught.value)
    assert str(caught.value).startswith(f"{name}: ")
    assert "\n" not in str(caught.value)


def test_a_directory_without_a_model(in_tmp: Path) -> None:
    (in_tmp / "empty").mkdir()
    with pytest.raises(ModelError, match=r"no config\.json in the directory$"):
        load_pretrained(section("empty"), "causal")
    (in_tmp / "empty" / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="it contains an adapter, not a base model"):
        load_pretrained(section("empty"), "causal")


def test_a_multimodal_model_without_a_text_class_is_refused(
    tiny_llama: Path, tmp_path: Path
) -> None:
    model = edited(tmp_path, tiny_llama, model_type="mistral3")
    with pytest.raises(ModelError, match=r"mistral3 is multimodal, .* not supported yet"):
        load_pretrained(section(model), "causal")


def test_an_encoder_is_not_a_causal_model(tiny_bert: Path) -> None:
    with pytest.raises(ModelError, match="bert is not a causal language model"):
        load_pretrained(section(tiny_bert), "causal")


@pytest.mark.skipif(find_spec("flash_attn") is not None, reason="flash_attn is installed")
def test_an_unsupported_attention_is_named(tiny_llama: Path) -> None:
    start = f'model.attn_implementation = "flash_attention_2": {tiny_llama}: '
    with pytest.raises(ModelError, match="installed; hint: auto chooses") as caught:
        load_pretrained(section(tiny_llama, attn_implementation="flash_attention_2"), "causal")
    assert str(caught.value).startswith(start)


def test_pickled_weights_are_refused(tiny_llama: Path, tmp_path: Path) -> None:
    copy = edited(tmp_path, tiny_llama)
    (copy / "model.safetensors").unlink()
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    torch.save(model.state_dict(), copy / "pytorch_model.bin")
    with pytest.raises(ModelError, match="no safetensors weights; lorakit does not load pickles"):
        load_pretrained(section(copy), "causal")


@pytest.mark.parametrize(("kind", "gone"), [("causal", "q_proj"), ("encoder", "query")])
def test_missing_weights_are_refused(
    kind: Any, gone: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    model = request.getfixturevalue("tiny_llama" if kind == "causal" else "tiny_bert")
    copy = edited(tmp_path, model)
    file = copy / "model.safetensors"
    tensors = {name: value for name, value in load_file(file).items() if gone not in name}
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=rf"the checkpoint lacks \d+ weights of .*{gone}"):
        load_pretrained(section(copy), kind, ["a", "b"])


def test_corrupt_weights_are_a_one_line_error(tiny_llama: Path, tmp_path: Path) -> None:
    copy = edited(tmp_path, tiny_llama)
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ModelError) as caught:
        load_pretrained(section(copy), "causal")
    assert "\n" not in str(caught.value)


def test_custom_code_needs_to_be_allowed(tiny_llama: Path, tmp_path: Path) -> None:
    copy = edited(
        tmp_path, tiny_llama, model_type="homemade",
        auto_map={"AutoConfig": "home.Config", "AutoModelForCausalLM": "home.Model"},
    )  # fmt: skip
    (copy / "home.py").write_text("raise SystemExit('ran')")
    with pytest.raises(ModelError, match="enable trust_remote_code to run it"):
        load_pretrained(section(copy), "causal")


def test_missing_tokenizer_is_named(tiny_llama: Path, tmp_path: Path) -> None:
    copy = edited(tmp_path, tiny_llama)
    for file in copy.glob("*token*"):
        file.unlink()
    with pytest.raises(ModelError, match="no usable tokenizer"):
        load_pretrained(section(copy), "causal")


def test_a_shape_that_differs_is_named(tiny_llama: Path, tmp_path: Path) -> None:
    copy = edited(tmp_path, tiny_llama)
    tensors = load_file(copy / "model.safetensors")
    name = "model.embed_tokens.weight"
    rows, width = tensors[name].shape
    tensors[name] = tensors[name][:-1].clone()
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError) as caught:
        load_pretrained(section(copy), "causal")
    assert f"{name} has shape ({rows - 1}, {width}), but the configuration says" in str(
        caught.value
    )


def test_a_missing_shard_is_named(tiny_llama: Path, tmp_path: Path) -> None:
    copy = edited(tmp_path, tiny_llama)
    (copy / "model.safetensors").unlink()
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    model.save_pretrained(copy, max_shard_size="20KB")
    shard = sorted(copy.glob("model-*.safetensors"))[-1]
    shard.unlink()
    with pytest.raises(ModelError, match=f"No such file.*{shard.name}"):
        load_pretrained(section(copy), "causal")


def test_an_invalid_configuration_value_is_named(tiny_llama: Path, tmp_path: Path) -> None:
    copy = edited(tmp_path, tiny_llama, hidden_size="x")
    with pytest.raises(ModelError, match=r"'hidden_size': .*expected int, got str") as caught:
        load_pretrained(section(copy), "causal")
    assert str(caught.value).startswith(f"{copy}: config.json does not describe a model: ")
    assert "\n" not in str(caught.value)


def test_an_unknown_activation_is_named(tiny_llama: Path, tmp_path: Path) -> None:
    copy = edited(tmp_path, tiny_llama, hidden_act="no_such")
    with pytest.raises(ModelError, match=r": cannot be loaded: KeyError: 'no_such'$"):
        load_pretrained(section(copy), "causal")
    with pytest.raises(ModelError, match=r": config.json does not .*: KeyError: 'no_such'$"):
        load_empty(section(copy), "causal")


def test_an_encoder_decoder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "t5"}')
    with pytest.raises(ModelError, match="t5 is an encoder-decoder"):
        load_pretrained(section(tmp_path), "encoder", ["a", "b"])


@pytest.mark.parametrize(
    ("family", "tokens"),
    [("bert", 64), ("roberta", 62), ("gpt2", 64), ("opt", 64), ("llama", 64), ("bloom", None)],
)
def test_the_window_is_what_the_model_accepts(family: str, tokens: int | None) -> None:
    model = tiny(family, max_position_embeddings=64) if family != "bloom" else tiny("bloom")
    assert window(model) == tokens
    if tokens is not None:
        with torch.no_grad():
            model(input_ids=token_ids(1, tokens))


@pytest.mark.parametrize("family", ["bert", "roberta", "gpt2"])
def test_learned_positions_are_limited(family: str) -> None:
    model = tiny(family)
    room = window(model)
    assert room is not None
    said: list[str] = []
    assert fit_max_length(model, task(max_length=room), said.append).max_length == room
    with pytest.raises(UserError, match=rf"task\.max_length = {room + 1}: .* allowed: 1 to {room}"):
        fit_max_length(model, task(max_length=room + 1), said.append)
    with pytest.raises((IndexError, RuntimeError)), torch.no_grad():
        model(input_ids=token_ids(1, room + 1))
    assert said == []


def test_a_default_length_is_reduced_to_the_window() -> None:
    said: list[str] = []
    assert fit_max_length(tiny("gpt2"), task(), said.append).max_length == 64
    assert said == ["task.max_length: 64 instead of the default 512: the model has 64 positions"]


def test_rotary_positions_are_not_limited() -> None:
    assert fit_max_length(tiny("llama"), task(), print).max_length == 512


def task(**keys: int) -> TaskSection:
    return TaskSection(name="text", **keys)
