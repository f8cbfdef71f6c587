"""``lorakit.load``: the base with its adapter, ready to use."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from lorakit.adapters.load import load
from lorakit.adapters.merge.run import merge
from lorakit.errors import AdapterError, ModelError
from tests.adapters.conftest import MakePair
from tests.families import tiny, token_ids
from tests.methods.pairs import config, logits, pair


def test_the_base_defaults_to_the_one_that_the_adapter_names(make_pair: MakePair) -> None:
    _, adapter, model = make_pair()
    loaded = load(None, adapter)
    assert not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())
    with torch.no_grad():
        assert torch.equal(loaded(token_ids()).logits, model(token_ids()).logits)


@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
def test_dtype_is_that_of_the_training_unless_given(make_pair: MakePair, stored: str) -> None:
    base, adapter, _ = make_pair(dtype=getattr(torch, stored))
    assert load(base, adapter).dtype == getattr(torch, stored)
    assert load(base, adapter, dtype="float16").lm_head.weight.dtype == torch.float16
    assert load(base, adapter, dtype=torch.float32).lm_head.weight.dtype == torch.float32
    with pytest.raises(AdapterError, match="dtype = int8: allowed: float32, bfloat16, float16"):
        load(base, adapter, dtype="int8")


def test_labels_come_from_the_sidecar(make_pair: MakePair, tmp_path: Path) -> None:
    names = {0: "no", 1: "maybe", 2: "yes"}
    _, adapter, model = make_pair("bert", id2label=names)
    tiny("bert").bert.save_pretrained(tmp_path / "bare")
    loaded = load(tmp_path / "bare", adapter)
    assert loaded.config.id2label == names
    with torch.no_grad():
        assert torch.equal(loaded(token_ids()).logits, model(token_ids()).logits)


@pytest.mark.parametrize("family", ["bert", "roberta", "modernbert"])
def test_without_a_sidecar_the_head_says_how_many(
    make_pair: MakePair, family: str, tmp_path: Path
) -> None:
    _, adapter, model = make_pair(family, num_labels=5)
    (adapter / "lorakit.json").unlink()
    tiny(family).base_model.save_pretrained(tmp_path / "bare")
    loaded = load(tmp_path / "bare", adapter)
    assert loaded.config.num_labels == 5
    with torch.no_grad():
        assert torch.equal(loaded(token_ids()).logits, model(token_ids()).logits)


def test_a_base_with_a_head_for_other_labels(make_pair: MakePair, tmp_path: Path) -> None:
    _, adapter, model = make_pair("roberta")
    tiny("roberta", num_labels=7).save_pretrained(tmp_path / "other")
    loaded = load(tmp_path / "other", adapter)
    with torch.no_grad():
        assert torch.equal(loaded(token_ids()).logits, model(token_ids()).logits)


def test_a_decoder_that_classifies_knows_its_padding(make_pair: MakePair) -> None:
    base, adapter, model = make_pair("llama", classifier=True)
    settings = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**settings, "pad_token_id": None}))
    assert load(base, adapter).config.pad_token_id == model.config.pad_token_id == 0


def test_a_weight_that_neither_has_is_an_error(make_pair: MakePair, tmp_path: Path) -> None:
    from transformers import BertModel

    _, adapter, _ = make_pair("bert")
    config = tiny("bert").config
    BertModel(config, add_pooling_layer=False).save_pretrained(tmp_path / "poolerless")
    with pytest.raises(AdapterError, match=r"2 weights .* including bert.pooler.dense.bias"):
        load(tmp_path / "poolerless", adapter)


def test_errors_name_the_argument(make_pair: MakePair, tmp_path: Path) -> None:
    base, adapter, _ = make_pair()
    with pytest.raises(ModelError, match="nowhere"):
        load(tmp_path / "nowhere", adapter)
    settings = json.loads((adapter / "adapter_config.json").read_text())
    for changes, message in (
        ({"task_type": "SEQ_2_SEQ_LM"}, 'task_type = "SEQ_2_SEQ_LM": allowed: CAUSAL_LM, SEQ_CLS'),
        (
            {
                "task_type": None,
                "auto_mapping": {"base_model_class": "LlamaForQuestionAnswering"},
            },
            "task_type = null: allowed: CAUSAL_LM, SEQ_CLS",
        ),
        ({"base_model_name_or_path": None}, "names no base model"),
    ):
        (adapter / "adapter_config.json").write_text(json.dumps(settings | changes))
        with pytest.raises(AdapterError, match=message):
            load(base if "task_type" in changes else None, adapter)


@pytest.mark.parametrize(
    ("family", "base_class"),
    [
        ("llama", None),
        ("llama", "LlamaForCausalLM"),
        ("llama", "LlamaModel"),
        ("llama", "LlavaForConditionalGeneration"),
        ("bert", None),
        ("bert", "BertForSequenceClassification"),
    ],
)
def test_a_task_type_that_peft_left_out(
    family: str, base_class: str | None, make_pair: MakePair
) -> None:
    """PEFT's default is null; whether there is a classification head is inferred from the tensors."""
    base, adapter, model = make_pair(family)
    settings = json.loads((adapter / "adapter_config.json").read_text())
    mapping = {"auto_mapping": {"base_model_class": base_class}} if base_class else {}
    changes = {"task_type": None, **mapping}
    (adapter / "adapter_config.json").write_text(json.dumps(settings | changes))
    (adapter / "lorakit.json").unlink()
    loaded = load(base, adapter, dtype="float32")
    assert type(loaded) is type(model)
    inputs = {"input_ids": token_ids()}
    torch.testing.assert_close(loaded(**inputs).logits, model(**inputs).logits)


def test_roberta_offsets_positions_by_its_pad_token(make_pair: MakePair, tmp_path: Path) -> None:
    base, adapter, model = make_pair("roberta")
    sidecar = json.loads((adapter / "lorakit.json").read_text())
    (adapter / "lorakit.json").write_text(json.dumps(sidecar | {"pad_token_id": 5}))
    merge(base, adapter, tmp_path / "out")
    settings = json.loads((tmp_path / "out" / "config.json").read_text())
    assert settings["pad_token_id"] == model.config.pad_token_id == 1
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        want = model(token_ids()).logits
        assert torch.equal(load(base, adapter)(token_ids()).logits, want)
        torch.testing.assert_close(merged(token_ids()).logits, want, atol=1e-5, rtol=0)


@pytest.mark.parametrize("method", ["dora", "intrinsic"])
def test_in_inference_mode(method: str, tmp_path: Path) -> None:
    """Where torch does not count what is written to a tensor."""
    keys = {"r": 2} if method == "dora" else {"d": 24}
    model = pair(tmp_path, "llama", config(method, **keys))
    with torch.inference_mode():
        loaded = load(tmp_path / "base", tmp_path / "adapter")
        for _ in range(2):
            assert torch.equal(logits(loaded), logits(model))
