"""Adapters of PEFT that train rows of the vocabulary, or save a resized one: read as PEFT does."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

import lorakit
from lorakit.errors import AdapterError
from lorakit.models.token_rows import token_rows
from tests.families import tiny

Edit = Callable[[PreTrainedModel], None]
IDS = [3, 40, 11]


def write_base(folder: Path, family: str, tied: bool, **more: Any) -> Path:
    tiny(family, tie_word_embeddings=tied, **more).save_pretrained(folder)
    return folder


def by_peft(
    base: Path, folder: Path, rows: Any, grow: int = 0, save: bool | str = "auto", **keys: Any
) -> tuple[Path, Tensor]:
    """Write an adapter with random values; return its directory and its logits in PEFT."""
    model: Any = AutoModelForCausalLM.from_pretrained(base)
    size = model.config.vocab_size + grow
    torch.manual_seed(0)
    if grow:
        model.resize_token_embeddings(size)
    targets = keys.pop("target_modules", ["q_proj", "v_proj"])
    kind = peft.AdaLoraConfig if "total_step" in keys else peft.LoraConfig
    config = kind(target_modules=targets, trainable_token_indices=rows, task_type="CAUSAL_LM", **keys)  # fmt: skip
    adapted: Any = peft.get_peft_model(model, config).eval()
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.2)
        expected = adapted(tokens(size)).logits
    adapted.save_pretrained(str(folder), save_embedding_layers=save)
    return folder, expected


def tokens(size: int) -> Tensor:
    """All ids of the vocabulary, so that every row is read."""
    return torch.arange(size).view(4, -1)[:, :60] if size % 4 == 0 else torch.arange(60, size)[None]


@torch.no_grad()
def check(base: Path, adapter: Path, expected: Tensor, tmp_path: Path) -> None:
    """Loaded and merged, the adapter has the logits that it had in PEFT."""
    ids = tokens(expected.shape[-1])
    found = lorakit.load(base, adapter)
    torch.testing.assert_close(found(ids).logits, expected, rtol=0, atol=1e-5)
    lorakit.merge(base, adapter, tmp_path / "merged", say=lambda note: None)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(merged(ids).logits, expected, rtol=0, atol=1e-5)
    if token_rows(found):
        tied = json.loads((base / "config.json").read_text()).get("tie_word_embeddings", True)
        assert merged.config.tie_word_embeddings == tied


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen2"])
def test_a_list_is_for_the_embedding(family: str, tied: bool, tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", family, tied)
    check(base, *by_peft(base, tmp_path / "adapter", IDS), tmp_path)


def test_gpt2(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", "gpt2", True)
    check(base, *by_peft(base, tmp_path / "adapter", IDS, target_modules=["c_attn"]), tmp_path)


@pytest.mark.parametrize("tied", [True, False])
def test_rows_by_layer(tied: bool, tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", "llama", tied)
    rows = {"embed_tokens": IDS, "lm_head": IDS}
    check(base, *by_peft(base, tmp_path / "adapter", rows), tmp_path)


def test_other_rows_in_the_output_layer(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", "llama", False)
    rows = {"model.embed_tokens": [1], "lm_head": [2, 9]}
    check(base, *by_peft(base, tmp_path / "adapter", rows), tmp_path)


def test_adalora(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", "llama", True)
    check(base, *by_peft(base, tmp_path / "adapter", IDS, total_step=9, init_r=3), tmp_path)


@pytest.mark.parametrize("tied", [True, False])
def test_a_resized_vocabulary_with_rows(tied: bool, tmp_path: Path) -> None:
    """PEFT then saves the whole embeddings too."""
    base = write_base(tmp_path / "base", "llama", tied)
    rows: Any = [64, 65] if tied else {"embed_tokens": [64, 65], "lm_head": [64, 65]}
    check(base, *by_peft(base, tmp_path / "adapter", rows, grow=4), tmp_path)


@pytest.mark.parametrize(
    ("tied", "keys"),
    [
        (True, {}),
        (False, {}),
        (True, {"modules_to_save": ["embed_tokens", "lm_head"]}),
        (False, {"modules_to_save": ["embed_tokens", "lm_head"]}),
        (True, {"target_modules": ["q_proj", "embed_tokens"]}),
    ],
)
def test_a_resized_vocabulary(tied: bool, keys: dict[str, Any], tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", "llama", tied)
    check(base, *by_peft(base, tmp_path / "adapter", None, grow=4, **keys), tmp_path)


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("untied")
    base = write_base(folder / "base", "llama", False)
    return base, by_peft(base, folder / "adapter", IDS)[0]


def rewrite(adapter: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    file, weights = adapter / "adapter_config.json", adapter / "adapter_model.safetensors"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    kept = {k: v for k, v in (load_file(weights) | tensors).items() if v.numel()}
    save_file(kept, weights)


ROWS = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"


@pytest.mark.parametrize(
    ("config", "tensors", "said"),
    [
        ({"trainable_token_indices": [1, 2]}, {}, r"is \(3, 16\), and the model with 2 trainable"),
        ({"trainable_token_indices": [1, 1, 2]}, {}, "allowed: token ids, each once"),
        (
            {"trainable_token_indices": [1, -1, 2]},
            {},
            "allowed: a list of token ids, or a list for",
        ),
        ({"trainable_token_indices": [1, True, 2]}, {}, "allowed: a list of token ids, or a list"),
        ({"trainable_token_indices": "embed_tokens"}, {}, "allowed: a list of token ids"),
        ({"trainable_token_indices": {"embed_tokens": 3}}, {}, "or a list for each layer by name"),
        ({"trainable_token_indices": {"wte": [1, 2, 3]}}, {}, "lacks the rows .* in wte"),
        ({"trainable_token_indices": None}, {}, "not in trainable_token_indices"),
        (
            {},
            {ROWS: torch.empty(0)},
            "lacks the rows of trainable_token_indices in model.embed_tok",
        ),
        (
            {"trainable_token_indices": [1, 2, 66]},
            {},
            "row 64 is in neither the base, which has 64 rows",
        ),
        ({"trainable_token_indices": [1, 2, 10**12]}, {}, "is in neither the base"),
        ({}, {ROWS.replace("embed_tokens", "norm"): torch.ones(3, 16)}, "norm.*: allowed: rows of"),
        ({}, {ROWS: torch.full((3, 16), torch.nan)}, "NaN or infinite"),
    ],
)
def test_rows_that_do_not_fit(
    config: dict[str, Any],
    tensors: dict[str, Tensor],
    said: str,
    untied: tuple[Path, Path],
    tmp_path: Path,
) -> None:
    base = untied[0]
    adapter = shutil.copytree(untied[1], tmp_path / "adapter")
    rewrite(adapter, config, tensors)
    with pytest.raises(AdapterError, match=said):
        lorakit.load(base, adapter)
    with pytest.raises(AdapterError, match=said):
        lorakit.merge(base, adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_such_adapters_are_not_switched_or_added(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", "llama", True)
    adapter, _ = by_peft(base, tmp_path / "adapter", IDS)
    other, _ = by_peft(base, tmp_path / "other", None)
    with pytest.raises(AdapterError, match="rows of the vocabulary, which cannot be switched"):
        lorakit.load(base, {"a": adapter, "b": other})
    with pytest.raises(AdapterError, match="fully trained, with other values"):
        lorakit.merge(base, other, tmp_path / "merged", add=[(adapter, 1.0)])
    with pytest.raises(AdapterError, match=r"weight = 0.5: it trains parameters of the base"):
        lorakit.merge(base, adapter, tmp_path / "merged", weight=0.5)
    lorakit.merge(base, adapter, tmp_path / "merged", add=[(other, 1.0)])


def test_convert_and_combine(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", "llama", True)
    adapter, expected = by_peft(base, tmp_path / "adapter", IDS)
    other, _ = by_peft(base, tmp_path / "other", None)
    lorakit.convert(adapter, tmp_path / "lora", "lora", say=lambda note: None)
    check(base, tmp_path / "lora", expected, tmp_path)
    with pytest.raises(AdapterError, match="loralib has no layer for trained rows of tokens"):
        lorakit.convert(adapter, tmp_path / "loralib", "loralib")
    lorakit.merge(base, adapter, tmp_path / "both", add=[(other, 1.0)], method="linear")
    both = AutoModelForCausalLM.from_pretrained(tmp_path / "both").get_input_embeddings().weight
    rows = load_file(adapter / "adapter_model.safetensors")[ROWS]
    assert torch.equal(both[IDS], rows)


@torch.no_grad()
def test_a_classifier(tmp_path: Path) -> None:
    """Which has no output layer."""
    model = tiny("bert", classifier=True)
    model.save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(target_modules=["query"], trainable_token_indices=IDS, task_type="SEQ_CLS")  # fmt: skip
    adapted: Any = peft.get_peft_model(model, config).eval()
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn_like(parameter))
    adapted.save_pretrained(str(tmp_path / "adapter"))
    ids = tokens(64)
    expected = adapted(ids).logits
    torch.testing.assert_close(
        lorakit.load(tmp_path / "base", tmp_path / "adapter")(ids).logits, expected
    )
    lorakit.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(merged(ids).logits, expected)
