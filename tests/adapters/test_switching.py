"""Adapter switching: which adapter is active, and the base stays bit-equal."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import lorakit
from lorakit import registry
from lorakit.adapters.load import load
from lorakit.adapters.merge.run import merge
from lorakit.adapters.switching import switch
from lorakit.errors import AdapterError
from lorakit.layers import adapter_layers
from tests.adapters.directories import fresh, logits, write_adapter, write_base
from tests.families import tiny

State = Mapping[str, torch.Tensor]


def same(state: State, other: State) -> bool:
    return list(state) == list(other) and all(torch.equal(state[k], other[k]) for k in state)


#: Family -> what its adapters differ in: rank, targets, biases, whole modules, slices of fused ones.
KINDS: dict[str, tuple[dict[str, Any], ...]] = {
    "llama": (
        {"r": 2, "target_modules": ["q", "v"]},
        {"r": 5, "target_modules": ["all-linear"], "use_rslora": True},
        {"r": 3, "target_modules": ["embed_tokens", "o"]},
        {"target_modules": ["q"], "modules_to_save": ["norm"]},
    ),
    "gpt2": (
        {"r": 2, "target_modules": ["q", "v"]},
        {"r": 4, "target_modules": ["c_attn", "c_fc"], "bias": "lora_only"},
        {"r": 2, "target_modules": ["k"], "bias": "all"},
    ),
    "gpt_neox": ({"r": 2, "target_modules": ["q"]}, {"r": 4, "target_modules": ["v", "o"]}),
    "bert": (
        {"r": 2, "target_modules": ["q", "v"]},
        {"r": 4, "target_modules": ["all-linear"], "bias": "all"},
    ),
}  # fmt: skip
ORDER = [("1", True), ("0", False), ("1", False), ("0", True), ("1", True), (None, False)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", KINDS)
def test_every_switch_is_exact(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", family, dtype)
    dirs = {
        str(i): write_adapter(base, tmp_path / str(i), seed=i, **keys)
        for i, keys in enumerate(KINDS[family])
    }
    single = {name: load(base, folder) for name, folder in dirs.items()}
    folded = {}
    for name, folder in dirs.items():
        merge(base, folder, tmp_path / f"merged-{name}", say=lambda _text: None)
        folded[name] = fresh(tmp_path / f"merged-{name}")
    plain = fresh(base)
    model = load(base, dirs)
    assert torch.equal(logits(model), logits(single["0"]))
    last = [(name, merged) for name in dirs for merged in (False, True)]
    for name, merged in [*ORDER, *last, (None, False)]:
        switch(model, name, merged=merged)
        assert bool(adapter_layers(model)) == (name is not None and not merged)
        if name is None:
            assert same(model.state_dict(), plain.state_dict())
            assert torch.equal(logits(model), logits(plain))
        elif not merged:
            assert same(model.state_dict(), single[name].state_dict())
            assert torch.equal(logits(model), logits(single[name]))
        else:
            state = folded[name].state_dict()
            weights = {key: value.to(state[key].dtype) for key, value in model.state_dict().items()}
            assert same(weights, state)
            tolerance = 1e-5 if dtype is torch.float32 else 0.05
            torch.testing.assert_close(
                logits(model).float(), logits(folded[name]).float(), atol=tolerance, rtol=0
            )


@pytest.mark.parametrize("method", sorted(registry.methods()))
def test_every_method_beside_lora(method: str, tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", "gpt2")
    scale = 0.1 if registry.methods()[method].kinds else 0.01
    dirs = {
        "lora": write_adapter(base, tmp_path / "lora", seed=1),
        "other": write_adapter(base, tmp_path / "other", seed=2, scale=scale, method=method),
    }
    model = load(base, dirs)
    want = {name: logits(load(base, folder)) for name, folder in dirs.items()}
    for name in ("other", "lora", "other"):
        switch(model, name)
        assert torch.equal(logits(model), want[name])
        switch(model, name, merged=True)
        torch.testing.assert_close(logits(model), want[name], atol=1e-5, rtol=1e-5)
    switch(model, None)
    assert same(model.state_dict(), fresh(base).state_dict())
    assert not torch.equal(want["other"], logits(model)), "the adapter does something"


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_tied_embeddings_part_and_are_tied_again(family: str, tmp_path: Path) -> None:
    embedding = {"llama": "embed_tokens", "gpt_neox": "embed_in"}[family]
    base = write_base(tmp_path / "base", family, tie_word_embeddings=True)
    output = type(fresh(base).get_output_embeddings())
    assert output is nn.Linear
    cases: dict[str, dict[str, Any]] = {
        "input": {"target_modules": [embedding, "q"]},
        "output": {"target_modules": ["lm_head"]},
        "both": {"target_modules": ["lm_head", embedding]},
        "whole": {"target_modules": ["q"], "modules_to_save": [embedding]},
    }
    dirs = {n: write_adapter(base, tmp_path / n, **keys) for n, keys in cases.items()}
    model = load(base, dirs)
    plain = fresh(base)
    for name, merged in [(n, m) for n in dirs for m in (True, False, True)]:
        switch(model, name, merged=merged)
        want = logits(load(base, dirs[name]))
        torch.testing.assert_close(logits(model), want, atol=1e-5 if merged else 0, rtol=0)
        if merged:
            tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
            assert tied == (name == "whole")
        switch(model, None)
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
        assert same(model.state_dict(), plain.state_dict())


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    ("family", "embedding"), [("llama", "model.embed_tokens"), ("gpt_neox", "gpt_neox.embed_in")]
)
def test_an_adapter_that_includes_a_base_matrix(
    family: str, embedding: str, tied: bool, tmp_path: Path
) -> None:
    """PEFT saves the embeddings of the base with their adapter, and their values may differ."""
    base = write_base(tmp_path / "base", family, tie_word_embeddings=tied)
    keys: dict[str, Any] = {"target_modules": [embedding.rpartition(".")[2], "q"]}
    dirs = {n: write_adapter(base, tmp_path / n, seed=i, **keys) for i, n in enumerate("ab")}
    file = dirs["a"] / "adapter_model.safetensors"
    own = fresh(base).get_input_embeddings().weight.detach() + 1
    tensors = load_file(file) | {f"base_model.model.{embedding}.base_layer.weight": own}
    save_file(tensors, file, metadata={"format": "pt"})
    model = load(base, dirs)
    for name, merged in [("b", True), ("a", True), ("a", False), ("b", True), ("a", True)]:
        switch(model, name, merged=merged)
        if merged:
            merge(base, dirs[name], tmp_path / "out", overwrite=True, say=lambda _text: None)
            state = fresh(tmp_path / "out").state_dict()
            assert same(model.state_dict(), state)
        torch.testing.assert_close(
            logits(model), logits(load(base, dirs[name])), atol=1e-5 if merged else 0, rtol=1e-5
        )
    switch(model, None)
    assert same(model.state_dict(), fresh(base).state_dict())


def test_classifiers_bring_their_head_and_their_labels(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", "bert", num_labels=2)
    labels = {"good": {0: "bad", 1: "good"}, "same": {0: "other", 1: "same"}}
    dirs = {
        name: write_adapter(base, tmp_path / name, seed=i, id2label=names)
        for i, (name, names) in enumerate(labels.items())
    }
    model = load(base, dirs)
    for name in ("good", "same", "good", None, "same"):
        for merged in (False, True):
            switch(model, name, merged=merged)
            want = fresh(base) if name is None else load(base, dirs[name])
            tolerance = 1e-5 if merged and name else 0
            torch.testing.assert_close(logits(model), logits(want), atol=tolerance, rtol=0)
            assert model.config.id2label == want.config.id2label
            assert model.config.label2id == want.config.label2id
            assert model.config.problem_type == want.config.problem_type
            assert model.config.pad_token_id == want.config.pad_token_id


def test_a_base_without_a_head_says_so(tmp_path: Path) -> None:
    whole = write_base(tmp_path / "whole", "bert")
    dirs = {n: write_adapter(whole, tmp_path / n, seed=i) for i, n in enumerate("ab")}
    tiny("bert").bert.save_pretrained(tmp_path / "bare")
    model = load(tmp_path / "bare", dirs)
    switch(model, "b")
    assert torch.equal(logits(model), logits(load(tmp_path / "bare", dirs["b"])))
    with pytest.warns(UserWarning, match=r"the base has no classifier.bias, classifier.weight"):
        switch(model, None)


def test_heads_of_different_shapes(tmp_path: Path) -> None:
    bases = {n: write_base(tmp_path / f"base{n}", "bert", num_labels=n) for n in (2, 5)}
    dirs = {f"of{n}": write_adapter(base, tmp_path / f"of{n}") for n, base in bases.items()}
    with pytest.raises(AdapterError, match=r"different numbers of labels: of2: 2, of5: 5"):
        load(bases[2], dirs)


def test_adapters_that_do_not_go_together(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    half = write_base(tmp_path / "half", dtype=torch.bfloat16)
    reader = write_base(tmp_path / "reader", classifier=True)
    one, two = write_adapter(base, tmp_path / "one"), write_adapter(half, tmp_path / "two")
    pairs = {"one": one, "two": two}
    with pytest.raises(AdapterError, match=r"different base models: one: .*base, two: .*half"):
        load(None, pairs)
    message = r"different training dtypes \(pass dtype to choose one\): one: float32, two: bfloat16"
    with pytest.raises(AdapterError, match=message):
        load(base, pairs)
    assert load(base, pairs, dtype="float32").dtype == torch.float32
    three = write_adapter(reader, tmp_path / "three")
    with pytest.raises(AdapterError, match="task types: one: CAUSAL_LM, three: SEQ_CLS"):
        load(base, {"one": one, "three": three})
    with pytest.raises(AdapterError, match="no such adapter directory"):
        load(base, {"one": one, "four": tmp_path / "four"})
    with pytest.raises(AdapterError, match="at least one name -> directory"):
        load(base, {})
    with pytest.raises(AdapterError, match="allowed for a single adapter"):
        load(base, {"one": one}, trainable=True)
    wider = write_base(tmp_path / "wider", hidden_size=32)
    with pytest.raises(AdapterError, match="another base model"):
        load(base, {"one": one, "wide": write_adapter(wider, tmp_path / "wide")})


def test_a_wrong_name_changes_nothing(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    dirs = {n: write_adapter(base, tmp_path / n) for n in ("sql", "nlg")}
    model = load(base, dirs)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(AdapterError, match=r"'sq1': not loaded; allowed: sql, nlg, None"):
        switch(model, "sq1", merged=True)
    assert same(model.state_dict(), before)
    with pytest.raises(AdapterError, match="has no named adapters"):
        switch(load(base, dirs["sql"]), "sql")


def test_a_sum_that_is_too_large_changes_nothing(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", dtype=torch.float16)
    dirs = {n: write_adapter(base, tmp_path / n, seed=i) for i, n in enumerate("ab")}
    file = dirs["b"] / "adapter_model.safetensors"
    tensors = load_file(file)
    last = [name for name in tensors if name.endswith("lora_B.weight")][-1]
    tensors[last] *= 1e7
    save_file(tensors, file, metadata={"format": "pt"})
    model = load(base, dirs)
    for before in (("a", True), ("a", False), (None, False)):
        switch(model, *before)
        state = {key: value.clone() for key, value in model.state_dict().items()}
        with pytest.raises(
            AdapterError, match=r"NaN or infinite values in float16 after the merge"
        ):
            switch(model, "b", merged=True)
        assert same(model.state_dict(), state)
    switch(model, None)
    assert same(model.state_dict(), fresh(base).state_dict())


def test_only_merged_matrices_are_copied(tmp_path: Path) -> None:
    """No copies are made before the first merge."""
    base = write_base(tmp_path / "base")
    dirs = {
        "q": write_adapter(base, tmp_path / "q", target_modules=["q"]),
        "qv": write_adapter(base, tmp_path / "qv", target_modules=["q", "v"]),
    }
    model = load(base, dirs)
    addresses = {name: p.data_ptr() for name, p in fresh_names(model)}
    kept: dict[str, torch.Tensor] = model._lorakit_adapters.copies  # type: ignore[assignment, union-attr]
    for name, merged, count in [("qv", False, 0), ("q", True, 2), ("qv", True, 4), ("q", True, 4)]:
        switch(model, name, merged=merged)
        assert len(kept) == count
    assert {name: p.data_ptr() for name, p in fresh_names(model)} == addresses, "nothing moved"
    plain = fresh(base).state_dict()
    assert all(torch.equal(value, plain[f"{name}.weight"]) for name, value in kept.items())


def fresh_names(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [
        (name.replace(".base_layer.", "."), parameter)
        for name, parameter in model.named_parameters()
        if "lora_" not in name
    ]


def test_a_copy_of_the_model_switches_independently(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", "gpt2")
    dirs = {
        n: write_adapter(base, tmp_path / n, seed=i, bias="lora_only", modules_to_save=["ln_f"])
        for i, n in enumerate("ab")
    }
    model = load(base, dirs)
    switch(model, "b", merged=True)
    twin = copy.deepcopy(model)
    before = logits(model)
    switch(twin, "a")
    assert torch.equal(logits(twin), logits(load(base, dirs["a"])))
    switch(twin, None)
    assert same(twin.state_dict(), fresh(base).state_dict())
    assert torch.equal(logits(model), before)


def test_mode_and_dtype_of_the_model_are_followed(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", "bert")
    dirs = {n: write_adapter(base, tmp_path / n, lora_dropout=0.1) for n in "ab"}
    model = load(base, dirs)
    assert not any(module.training for module in model.modules())
    model.train()
    switch(model, "b")
    assert all(module.training for module in model.modules())
    model.eval()
    switch(model, "a", merged=True)
    assert not any(module.training for module in model.modules())
    model.bfloat16()
    switch(model, None)
    assert same(
        {k: v.float() for k, v in model.bert.state_dict().items()},
        {k: v.bfloat16().float() for k, v in fresh(base).bert.state_dict().items()},
    )


@pytest.mark.parametrize("active", ["a", None])
@pytest.mark.parametrize(
    ("family", "keys"),
    [
        ("llama", {"target_modules": ["embed_tokens", "q"], "modules_to_save": ["norm"]}),
        ("gpt2", {"target_modules": ["q"], "bias": "all"}),
    ],
)
def test_what_is_swapped_follows_a_conversion(
    family: str, keys: dict[str, Any], active: str | None, tmp_path: Path
) -> None:
    """The adapters' factors stay in float32, as on a base that was loaded in bfloat16."""
    base = write_base(tmp_path / "base", family)
    dirs = {n: write_adapter(base, tmp_path / n, seed=i, **keys) for i, n in enumerate("ab")}
    model = load(base, dirs)
    switch(model, active)
    model.bfloat16()
    for name in ("b", "a", "b"):
        switch(model, name)
        own = {n: p for n, p in model.named_parameters() if ".lora_" not in n}
        assert {p.dtype for p in own.values()} == {torch.bfloat16}
        assert logits(model).dtype == torch.bfloat16
        converted = load(base, dirs[name]).bfloat16()
        assert all(torch.equal(p, converted.get_parameter(n)) for n, p in own.items())
    switch(model, "a", merged=True)
    switch(model, None)
    assert same(model.state_dict(), fresh(base).bfloat16().state_dict())


def test_the_public_names(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    dirs = {n: write_adapter(base, tmp_path / n, seed=i) for i, n in enumerate(("sql", "nlg"))}
    model = lorakit.load(None, dirs)
    lorakit.switch(model, "nlg")
    assert torch.equal(logits(model), logits(lorakit.load(None, dirs["nlg"])))


def test_changes_to_the_bare_base_persist(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    model = load(base, {"a": write_adapter(base, tmp_path / "a")})
    weight = model.get_parameter("model.layers.0.self_attn.q_proj.weight")
    for value in (1.0, 2.0):
        switch(model, "a", merged=True)
        switch(model, None)
        with torch.no_grad():
            weight.fill_(value)
    switch(model, "a", merged=True)
    assert not weight.eq(2).all()
    switch(model, None)
    assert weight.eq(2).all()
