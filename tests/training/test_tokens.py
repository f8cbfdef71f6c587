"""New tokens from the recipe to PEFT, a merged model and a generated text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaForCausalLM,
)

import lorakit
from lorakit.adapters.peft.write import save_adapter
from lorakit.errors import UserError
from lorakit.models.token_rows import token_rows
from lorakit.recipe.sections import Recipe
from lorakit.training.run import train
from lorakit.training.setup import prepare
from tests.training.runs import (
    WORDS,
    adapter_bytes,
    learning,
    write_recipe_file,
    write_rows,
)

TEXT = "<|im_start|>user\n<a> red <b><|im_end|>\n"
NEW = {"model__chat_template": "chatml", "model__add_tokens": ["<a>", "<b>"]}
#: The ids of the two tokens of chatml and of <a> and <b>: 258 bytes and others come first.
IDS = [258, 259, 260, 261]


@pytest.fixture(scope="module", params=["tied", "untied"])
def base(request: pytest.FixtureRequest, tiny_llama: Path, tmp_path_factory: Any) -> Path:
    """A base without a chat template."""
    folder: Path = tmp_path_factory.mktemp(request.param)
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(folder)
    model = LlamaForCausalLM.from_pretrained(tiny_llama)
    if request.param == "tied":
        model.config.tie_word_embeddings = True
        model.lm_head.weight = model.model.embed_tokens.weight
    model.save_pretrained(folder)
    return folder


def chat_recipe(folder: Path, base: Path, **changes: Any) -> Recipe:
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"<a> {WORDS[i % 12]}"},
                {"role": "assistant", "content": f"<b> {WORDS[i % 7]}"},
            ]
        }
        for i in range(16)
    ]
    write_rows(folder / "data" / "train.jsonl", rows)
    write_rows(folder / "data" / "validation.jsonl", rows[:4])
    return lorakit.load_recipe(write_recipe_file(folder, base, "chat", **{**NEW, **changes}))


def ids(adapter: Path) -> Tensor:
    found: Tensor = AutoTokenizer.from_pretrained(adapter)(TEXT, return_tensors="pt").input_ids
    return found


@torch.no_grad()
def logits(model: Any, tokens: Tensor) -> Tensor:
    found: Tensor = model(tokens).logits
    return found


def in_peft(base: Path, adapter: Path, dtype: torch.dtype = torch.float32) -> Any:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    model.resize_token_embeddings(len(AutoTokenizer.from_pretrained(adapter)))
    return PeftModel.from_pretrained(model, str(adapter)).eval()


def test_train_save_load_in_peft_and_merge(base: Path, tmp_path: Path) -> None:
    train(chat_recipe(tmp_path, base))
    adapter = tmp_path / "run" / "adapter"
    tokens = ids(adapter)
    assert tokens[0, 0] == IDS[0]
    assert tokens[0, -2] == IDS[1]
    expected = logits(in_peft(base, adapter), tokens)
    found = logits(lorakit.load(base, adapter), tokens)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    lorakit.merge(base, adapter, tmp_path / "merged", say=lambda note: None)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.config.vocab_size == 262
    assert merged.config.tie_word_embeddings == (base.name.startswith("tied"))
    torch.testing.assert_close(logits(merged, tokens), expected, rtol=0, atol=1e-5)
    assert merged.generation_config.eos_token_id == [259, 1]
    for folder in (adapter, tmp_path / "merged"):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        assert tokenizer.eos_token == "<|im_end|>"
        chat = [{"role": "user", "content": "<a>"}]
        text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        assert text == "<|im_start|>user\n<a><|im_end|>\n<|im_start|>assistant\n"


def test_only_the_new_rows_are_trained_and_saved(base: Path, tmp_path: Path) -> None:
    train(chat_recipe(tmp_path, base))
    train(chat_recipe(tmp_path, base, model__add_tokens=[], model__chat_template="vicuna",
                      train__output_dir=str(tmp_path / "plain")))  # fmt: skip
    files = [tmp_path / run / "adapter" / "adapter_model.safetensors" for run in ("run", "plain")]
    stored, plain = map(load_file, files)
    new = {name: value for name, value in stored.items() if name not in plain}
    layers = 1 if base.name.startswith("tied") else 2
    assert [tuple(value.shape) for value in new.values()] == [(4, 32)] * layers
    with_rows, without = (file.stat().st_size for file in files)
    header = 200 * layers  # the names of so small an adapter are 1% and more of it
    assert with_rows - without == pytest.approx(4 * 32 * 4 * layers, abs=header + 0.01 * without)
    model, before = lorakit.load(base, files[0].parent), AutoModelForCausalLM.from_pretrained(base)
    state = {name: layer.weight for name, layer in token_rows(model).items()}
    assert len(state) == 2
    for name, weight in state.items():
        original = before.get_parameter(f"{name}.weight")
        assert torch.equal(weight[:258], original)
        mean = original.mean(0)
        assert torch.allclose(weight[258:], mean.expand(4, -1), atol=1e-6)
        rows = token_rows(model)[name].values
        assert (rows - mean).abs().amax(1).min() > 1e-3


def test_a_loaded_adapter_is_saved_again(base: Path, tmp_path: Path) -> None:
    recipe = chat_recipe(tmp_path, base)
    train(recipe)
    adapter = tmp_path / "run" / "adapter"
    model = lorakit.load(base, adapter, trainable=True)
    assert all(layer.values.requires_grad for layer in token_rows(model).values())
    again = save_adapter(
        tmp_path / "again", model, recipe.adapter, base_model_name_or_path=str(base),
        task_type="CAUSAL_LM",
    )  # fmt: skip
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (again / name).read_bytes() == (adapter / name).read_bytes()


def test_a_run_resumes_to_the_bit(base: Path, tmp_path: Path) -> None:
    recipe = chat_recipe(tmp_path, base, train__save_every_steps=1, train__save_total_limit=None)
    train(recipe)
    whole = adapter_bytes(tmp_path / "run"), learning(tmp_path / "run")
    train(recipe, str(tmp_path / "run" / "checkpoints" / "step-1"))
    assert (adapter_bytes(tmp_path / "run"), learning(tmp_path / "run")) == whole


def test_gradients_are_those_of_the_whole_matrices(base: Path, tmp_path: Path) -> None:
    """In the rows of the new tokens; the others have none."""
    prepared = prepare(chat_recipe(tmp_path, base), say=lambda text: None)
    model: Any = prepared.model
    tokens = torch.tensor([[258, 20, 261, 30, 259, 260, 261]])
    model(tokens, labels=tokens).loss.backward()
    full = AutoModelForCausalLM.from_pretrained(base)
    full.resize_token_embeddings(262, mean_resizing=False)
    rows = token_rows(model)
    with torch.no_grad():
        for name, layer in rows.items():
            full.get_parameter(f"{name}.weight")[258:] = layer.values
    full(tokens, labels=tokens).loss.backward()
    for name, layer in rows.items():
        expected = full.get_parameter(f"{name}.weight").grad[258:]
        torch.testing.assert_close(layer.values.grad, expected, rtol=1e-4, atol=1e-7)
        assert layer.weight.grad is None


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"adapter__method": "intrinsic"},
            "it cannot train the rows of new tokens .*; allowed with",
        ),
        ({"adapter__target_modules": ["embed_tokens"]}, "embed_tokens: both a target and a layer"),
    ],
)
def test_what_does_not_go_with_new_tokens(
    changes: dict[str, Any], said: str, base: Path, tmp_path: Path
) -> None:
    recipe = chat_recipe(tmp_path, base)
    file = tmp_path / "recipe.yaml"
    keys = {key.replace("__", "."): value for key, value in changes.items()}
    if "adapter.method" in keys:
        keys = {"adapter": {"method": keys["adapter.method"]}}
    recipe = lorakit.load_recipe(file, keys)
    with pytest.raises(UserError, match=said):
        prepare(recipe, say=lambda text: None)
    assert json.loads(file.read_text())["model"]["chat_template"] == "chatml"


def test_a_run_starts_from_the_rows_of_an_adapter(base: Path, tmp_path: Path) -> None:
    train(chat_recipe(tmp_path, base))
    first = tmp_path / "run" / "adapter"

    def start(*tokens: str) -> Any:
        chat_recipe(tmp_path / "next", base, model__add_tokens=list(tokens))
        keys = {"adapter": {"init_from": str(first)}}
        recipe = lorakit.load_recipe(tmp_path / "next" / "recipe.yaml", keys)
        return prepare(recipe, say=lambda text: None).model

    before = token_rows(lorakit.load(base, first))
    for name, layer in token_rows(start("<a>", "<b>", "<c>")).items():
        assert torch.equal(layer.values[:4], before[name].values)
    with pytest.raises(
        UserError, match=r'model.add_tokens: id 260 is "<b>", but "<a>" in .*allowed'
    ):
        start("<b>", "<a>")
    with pytest.raises(UserError, match=r"trained rows of .* that are not trained here; allowed"):
        start("<a>")


def test_a_classifier(tiny_bert: Path, tmp_path: Path) -> None:
    rows = [{"sentence": f"<É> {WORDS[i % 9]}", "label": i % 2} for i in range(16)]
    for split in ("train", "validation"):
        write_rows(tmp_path / "data" / f"{split}.jsonl", rows)
    file = write_recipe_file(tmp_path, tiny_bert, "glue/sst2", model__add_tokens="<É>")
    train(lorakit.load_recipe(file))
    adapter = tmp_path / "run" / "adapter"
    tokens = AutoTokenizer.from_pretrained(adapter)("<É> red", return_tensors="pt").input_ids
    assert 260 in tokens
    model = AutoModelForSequenceClassification.from_pretrained(tiny_bert)
    model.resize_token_embeddings(261)
    expected = logits(PeftModel.from_pretrained(model, str(adapter)).eval(), tokens)
    torch.testing.assert_close(logits(lorakit.load(None, adapter), tokens), expected)
    lorakit.merge(None, adapter, tmp_path / "merged", say=lambda note: None)
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged, tokens), expected)
