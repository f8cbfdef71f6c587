"""Saving and loading adapters: what is written, bit-equal reading, and errors."""

from __future__ import annotations

import errno
import json
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoTokenizer

from lorakit.adapters.load import load
from lorakit.adapters.model_card import CardFacts
from lorakit.adapters.peft.place import load_adapter
from lorakit.adapters.peft.read import read_adapter
from lorakit.adapters.peft.targets import exact_patterns, target_modules
from lorakit.adapters.peft.write import save_adapter
from lorakit.base_weight import RowView
from lorakit.errors import AdapterError
from lorakit.injection import inject, trainable_state
from lorakit.kernels.low_rank import RowSlice
from lorakit.layers import CompositeLayer, adapted_modules, adapter_layers
from lorakit.methods.lora import LoraConfig
from lorakit.methods.lora_layer import LoraLayer
from tests.adapters.conftest import MakePair
from tests.families import tiny, token_ids


def _logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model(input_ids=token_ids()).logits
    return out


def _edit(file: Path, **changes: Any) -> None:
    settings = json.loads(file.read_text())
    file.write_text(json.dumps(settings | changes))


def test_the_directory_contains_only_the_adapter(
    make_pair: MakePair, tiny_llama: Path, tmp_path: Path
) -> None:
    _, adapter, model = make_pair()
    assert sorted(p.name for p in adapter.iterdir()) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors", "lorakit.json",
    ]  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    save_adapter(
        tmp_path / "b", model, LoraConfig(r=4), base_model_name_or_path="b",
        task_type="CAUSAL_LM", tokenizer=tokenizer,
    )  # fmt: skip
    again = AutoTokenizer.from_pretrained(tmp_path / "b")
    assert again.get_vocab() == tokenizer.get_vocab()
    assert again.chat_template == tokenizer.chat_template
    assert [p.name for p in tmp_path.glob(".*")] == []


def test_tensors_are_sorted_contiguous_float32(make_pair: MakePair) -> None:
    _, adapter, _ = make_pair("roberta", dtype=torch.bfloat16)
    with safe_open(adapter / "adapter_model.safetensors", "pt") as stored:
        names = list(stored.keys())
        assert stored.metadata() == {"format": "pt"}
        assert {stored.get_slice(name).get_dtype() for name in names} == {"F32"}
    assert names == sorted(names)
    heads = [n for n in names if "lora_" not in n]
    assert heads == [
        f"base_model.model.classifier.{layer}.{kind}"
        for layer in ("dense", "out_proj")
        for kind in ("bias", "weight")
    ]


def test_the_card_has_the_facts(make_pair: MakePair, tmp_path: Path) -> None:
    _, _, model = make_pair("bert")
    facts = CardFacts(
        "org/base: it's", "lora", task="glue/sst2", data_rows=67349, metrics={"accuracy": 0.9512},
        steps=1200, seconds=63.4, hardware="1 x CPU",
    )  # fmt: skip
    save_adapter(
        tmp_path / "b", model, LoraConfig(r=4, target_modules=["q"]),
        base_model_name_or_path="org/base: it's", task_type="SEQ_CLS", card=facts,
    )  # fmt: skip
    text = (tmp_path / "b" / "README.md").read_text()
    import yaml

    front = yaml.safe_load(text.split("---")[1])
    assert front["base_model"] == "org/base: it's"
    assert front["library_name"] == "peft"
    for part in (
        "67,349",
        "accuracy | 0.9512",
        "1,200",
        "63 s",
        "1 x CPU",
        'id2label={0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}',
        "| r | 4",
    ):
        assert part in text, part


def test_the_sidecar_stores_what_peft_has_no_key_for(make_pair: MakePair) -> None:
    _, adapter, _ = make_pair("bert", id2label={0: "no", 1: "yes", 2: "may"}, dtype=torch.bfloat16)
    sidecar = json.loads((adapter / "lorakit.json").read_text())
    assert sidecar["method"] == "lora"
    assert sidecar["id2label"] == {"0": "no", "1": "yes", "2": "may"}
    assert sidecar["base_dtype"] == "bfloat16"


@pytest.mark.parametrize("family", ["llama", "gpt2", "distilbert", "modernbert", "albert"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_loaded_adapter_is_bit_equal(
    make_pair: MakePair, family: str, dtype: torch.dtype
) -> None:
    base, adapter, model = make_pair(
        family, dtype=dtype, adapter={"target_modules": ["all-linear"]}
    )
    loaded = load(base, adapter, trainable=True)
    saved, again = trainable_state(model), trainable_state(loaded)
    assert list(saved) == list(again)
    assert all(torch.equal(saved[name], again[name]) for name in saved)
    assert torch.equal(_logits(loaded), _logits(model))
    assert {n: x.scaling for n, x in adapter_layers(loaded).items()} == {
        n: x.scaling for n, x in adapter_layers(model).items()
    }


def test_an_adapter_is_replaced_completely(make_pair: MakePair) -> None:
    _, adapter, model = make_pair()
    (adapter / "old.txt").write_text("x")
    save_adapter(
        adapter, model, LoraConfig(r=4), base_model_name_or_path="b", task_type="CAUSAL_LM"
    )
    assert not (adapter / "old.txt").exists()
    assert {p.name for p in adapter.parent.iterdir()} == {"adapter", "base"}


def test_a_failed_save_leaves_the_old_adapter(
    make_pair: MakePair, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, adapter, model = make_pair()
    before = (adapter / "adapter_model.safetensors").read_bytes()

    def full(*_args: object, **_kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lorakit.adapters.peft.write.save_tensors", full)
    with pytest.raises(OSError, match="No space left"):
        save_adapter(
            adapter, model, LoraConfig(), base_model_name_or_path="b", task_type="CAUSAL_LM"
        )
    assert (adapter / "adapter_model.safetensors").read_bytes() == before
    assert {p.name for p in adapter.parent.iterdir()} == {"adapter", "base"}


def test_an_unwritable_tokenizer_is_an_os_error(make_pair: MakePair, tiny_llama: Path) -> None:
    """tokenizers raises an Exception with the text of the operating system's error."""
    _, adapter, model = make_pair()
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    tokenizer.add_tokens([f"token {number}" for number in range(200)])
    limit = 10_000
    assert limit > max(file.stat().st_size for file in adapter.iterdir())
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(OSError, match="File too large") as caught:
            save_adapter(
                adapter, model, LoraConfig(r=4), base_model_name_or_path="b",
                task_type="CAUSAL_LM", tokenizer=tokenizer,
            )  # fmt: skip
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert caught.value.errno == errno.EFBIG
    assert {p.name for p in adapter.parent.iterdir()} == {"adapter", "base"}


def test_a_directory_of_something_else_is_not_replaced(make_pair: MakePair, tmp_path: Path) -> None:
    _, _, model = make_pair()
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "1.jpg").write_text("x")
    with pytest.raises(AdapterError, match="not empty and not an adapter"):
        save_adapter(
            tmp_path / "photos", model, LoraConfig(), base_model_name_or_path="b",
            task_type="CAUSAL_LM",
        )  # fmt: skip
    assert (tmp_path / "photos" / "1.jpg").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("link", "link: is a symbolic link; not replaced"),
        ("dangling", "dangling: is a symbolic link; not replaced"),
        ("file", "file: exists and is not a directory"),
        ("file/deep/out", "cannot be written: Not a directory"),
        ("new/" + "x" * 250, "cannot be written: File name too long"),
        ("new/a\0b", "cannot be written: contains a control character"),
    ],
)
def test_paths_that_cannot_be_a_new_directory(
    name: str, message: str, make_pair: MakePair, tmp_path: Path
) -> None:
    _, adapter, model = make_pair()
    (tmp_path / "link").symlink_to(adapter)
    (tmp_path / "dangling").symlink_to(tmp_path / "none")
    (tmp_path / "file").write_text("x")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(AdapterError, match=message) as caught:
        save_adapter(
            tmp_path / name, model, LoraConfig(), base_model_name_or_path="b",
            task_type="CAUSAL_LM",
        )  # fmt: skip
    assert "\n" not in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_model_without_an_adapter_is_not_saved(tmp_path: Path) -> None:
    model = tiny("llama").requires_grad_(False)
    with pytest.raises(AdapterError, match="no adapter to save"):
        save_adapter(
            tmp_path / "a", model, LoraConfig(), base_model_name_or_path="b", task_type="CAUSAL_LM"
        )
    assert not (tmp_path / "a").exists()


def test_parts_that_overlap_are_not_saved(tmp_path: Path) -> None:
    """The reader accepts q, k and v of one projection, without overlap."""
    model = tiny("phi3")
    inject(model, LoraConfig(r=2, target_modules=["q", "v"], layers=[0]))
    [(name, layer)] = adapted_modules(model).items()
    assert isinstance(layer, CompositeLayer)
    base = layer.base_layer
    size = layer.out_features
    for rows in (RowSlice(0, size, size), RowSlice(0, 1, 2)):
        parts = {"q": layer.parts["q"], "v": LoraLayer(RowView(base, rows), r=2, scaling=1.0)}
        model.set_submodule(name, CompositeLayer(base, parts))
        with pytest.raises(AdapterError, match=rf"^{name}: the parts q, v cannot be saved; allow"):
            save_adapter(
                tmp_path / "a", model, LoraConfig(), base_model_name_or_path="b",
                task_type="CAUSAL_LM",
            )  # fmt: skip
        assert not any(tmp_path.iterdir())


def test_target_modules_match_exactly_the_adapted_modules() -> None:
    names = ["a.0.attn.dense", "a.0.dense", "a.1.attn.dense", "a.1.dense", "dense", "x.dense"]
    assert target_modules(["a.0.attn.dense", "a.1.attn.dense"], names, {}) == ["attn.dense"]
    assert target_modules(["a.1.dense"], names, {}) == ["1.dense"]
    assert target_modules(["dense"], names, {}) == "dense"
    assert target_modules(["dense", "x.dense"], names[-2:], {}) == ["dense"]


def test_patterns_that_would_fit_another_module_are_anchored() -> None:
    assert exact_patterns({"a.q": 2}, ["a.q", "b.q"]) == {"a.q": 2}
    assert exact_patterns({"a.q": 2}, ["a.q", "b.a.q"]) == {r"^a\.q": 2}


def test_nested_names_keep_their_ranks(tmp_path: Path) -> None:
    """``q`` is a module and a suffix of ``x.q``: neither targets nor ranks may confuse the two."""

    def nested() -> nn.Module:
        inner = nn.ModuleDict({"q": nn.Linear(4, 4), "k": nn.Linear(4, 4)})
        return nn.ModuleDict({"q": nn.Linear(4, 4), "x": inner})

    model = nested()
    config = LoraConfig(r=3, target_modules=["re:q|x.k"], rank_pattern={"q": 2})
    inject(model, config)
    save_adapter(tmp_path / "a", model, config, base_model_name_or_path="b", task_type="CAUSAL_LM")
    again = nested()
    load_adapter(again, tmp_path / "a")
    assert {n: x.r for n, x in adapter_layers(again).items()} == {"q": 2, "x.k": 3}


REFUSED: dict[str, dict[str, Any]] = {
    "peft_type": {"peft_type": "IA3"},
    "bias": {"bias": "some"},
    "alora_invocation_tokens": {"alora_invocation_tokens": [1, 2]},
    "target_parameters": {"target_parameters": "mlp.experts"},
    "layer_replication": {"layer_replication": [[0, 1]]},
    "init_lora_weights": {"init_lora_weights": "loftq"},
    "use_qalora": {"use_qalora": True},
    "r = 0": {"r": 0},
    "lora_alpha": {"lora_alpha": "16"},
    "rank_pattern": {"rank_pattern": {"(": 3}},
    "target_modules": {"target_modules": "("},
}


@pytest.mark.parametrize("key", REFUSED)
def test_settings_that_are_not_understood_are_refused(make_pair: MakePair, key: str) -> None:
    _, adapter, _ = make_pair()
    _edit(adapter / "adapter_config.json", **REFUSED[key])
    with pytest.raises(AdapterError, match=key) as error:
        read_adapter(adapter)
    assert "adapter_config.json" in str(error.value)


def test_missing_and_broken_files(make_pair: MakePair, tmp_path: Path) -> None:
    base, adapter, _ = make_pair()
    weights = adapter / "adapter_model.safetensors"
    with pytest.raises(AdapterError, match="no such adapter directory"):
        read_adapter(tmp_path / "nowhere")
    with pytest.raises(AdapterError, match="a model, not an adapter"):
        read_adapter(base)
    content = weights.read_bytes()
    weights.write_bytes(content[: len(content) // 2])
    with pytest.raises(AdapterError, match="corrupt or truncated"):
        read_adapter(adapter)
    weights.rename(adapter / "adapter_model.bin")
    with pytest.raises(AdapterError, match="pickled weights are not supported"):
        read_adapter(adapter)
    (adapter / "adapter_model.bin").unlink()
    with pytest.raises(AdapterError, match=r"adapter_model\.safetensors is missing"):
        read_adapter(adapter)
    (adapter / "adapter_config.json").write_text("{")
    with pytest.raises(AdapterError, match="invalid JSON"):
        read_adapter(adapter)


def _rewrite(adapter: Path, change: Any) -> None:
    tensors = load_file(adapter / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, adapter / "adapter_model.safetensors", metadata={"format": "pt"})


_Q = "base_model.model.model.layers.1.self_attn.q_proj"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{_Q}.lora_B.weight"), r"missing tensors: model\S*q_proj.lora_B.weight"),
        (
            lambda t: [t.pop(f"{_Q}.lora_{factor}.weight") for factor in "AB"],
            r"the adapter lacks model.layers.1.self_attn.q_proj \(adapter\)",
        ),
        (
            lambda t: t.update(
                {"base_model.model.model.layers.7.x.lora_A.weight": torch.ones(1, 1)}
            ),
            r"the model has no module for model.layers.7.x.lora_A.weight",
        ),
        (
            lambda t: t.update({f"{_Q}.lora_magnitude_vector": torch.ones(16)}),
            "unknown tensors: .*lora_magnitude_vector",
        ),
        (
            lambda t: t.update({f"{_Q}.lora_A.weight": torch.ones(4, 5)}),
            r"is \(4, 5\), and the model",
        ),
        *[
            (
                lambda t, kind=kind: t.update(
                    {f"{_Q}.lora_B.weight": t[f"{_Q}.lora_B.weight"].to(kind)}
                ),
                rf"{_Q.removeprefix('base_model.model.')}.lora_B is {str(kind)[6:]}; "
                "allowed: floating-point numbers",
            )
            for kind in (torch.int32, torch.bool, torch.complex64)
        ],
        (lambda t: t.update({"q.lora_A.weight": torch.ones(4, 5)}), "not a tensor name of PEFT"),
        (lambda t: t.update({f"{_Q}.lora_A.weight": torch.ones(0)}), "empty tensor"),
    ],
)
def test_tensors_that_do_not_fit_are_listed_and_the_model_is_untouched(
    make_pair: MakePair, change: Any, message: str
) -> None:
    _, adapter, _ = make_pair()
    _rewrite(adapter, change)
    model = tiny("llama")
    with pytest.raises(AdapterError, match=message):
        load_adapter(model, adapter)
    assert not adapter_layers(model)
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("bias", ["lora_only", "all"])
def test_a_missing_bias_is_an_error(make_pair: MakePair, bias: str) -> None:
    base, adapter, _ = make_pair("gpt2", adapter={"bias": bias})
    load(base, adapter)
    key = "base_model.model.transformer.h.1.attn.c_proj.base_layer.bias"
    _rewrite(adapter, lambda tensors: tensors.pop(key))
    message = r"the adapter lacks transformer\.h\.1\.attn\.c_proj\.bias$"
    with pytest.raises(AdapterError, match=message):
        load(base, adapter)


def test_an_adapter_of_another_base_is_refused(make_pair: MakePair) -> None:
    _, adapter, _ = make_pair()
    for other in (tiny("llama", hidden_size=32), tiny("gpt2"), tiny("llama", num_hidden_layers=1)):
        with pytest.raises(AdapterError, match=r"another base model|does not fit the model"):
            load_adapter(other, adapter)


def test_a_missing_head_is_an_error(make_pair: MakePair) -> None:
    _, adapter, _ = make_pair("bert")
    _rewrite(adapter, lambda t: t.pop("base_model.model.classifier.bias"))
    with pytest.raises(AdapterError, match=r"the adapter lacks classifier.bias"):
        load_adapter(tiny("bert"), adapter)


def test_a_head_for_other_labels_is_an_error(make_pair: MakePair) -> None:
    _, adapter, _ = make_pair("bert")
    with pytest.raises(AdapterError, match="or number of labels"):
        load_adapter(tiny("bert", num_labels=5), adapter)


def test_a_second_adapter_is_refused(make_pair: MakePair) -> None:
    base, adapter, _ = make_pair()
    with pytest.raises(AdapterError, match="already has an adapter"):
        load_adapter(load(base, adapter), adapter)
