"""Weighted sums of adapters in one merge: W + w_1 delta_1 + w_2 delta_2, rounded once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorakit.adapters.load import load
from lorakit.adapters.merge.run import merge
from lorakit.errors import AdapterError
from lorakit.layers import adapted_modules
from tests.adapters.directories import fresh, logits, write_adapter, write_base


def quiet(_text: str) -> None:
    pass


def deltas(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    """Return the update of each matrix in float64, from float32 sums."""
    found = {}
    for name, layer in adapted_modules(load(base, adapter, dtype="float32")).items():
        merged = layer.fold(layer.weight)
        found[f"{name}.weight"] = (merged.double() - layer.weight.double()).detach()
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_the_sum_by_hand(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Ranks and targets differ; GPT-NeoX names its weights differently in checkpoint and class."""
    base = write_base(tmp_path / "base", family, dtype)
    a = write_adapter(base, tmp_path / "a", seed=1, r=2, target_modules=["q", "v"])
    b = write_adapter(base, tmp_path / "b", seed=2, r=5, target_modules=["all-linear"])
    c = write_adapter(base, tmp_path / "c", seed=3, r=3, target_modules=["o"])
    report = merge(base, a, tmp_path / "out", add=[(b, 0.5), (str(c), -1)], weight=2.0, say=quiet)
    assert not report.notes
    assert report.weight == 2.0
    assert [(added.adapter, added.weight) for added in report.added] == [(b, 0.5), (c, -1.0)]
    plain, merged = fresh(base).state_dict(), fresh(tmp_path / "out").state_dict()
    assert list(plain) == list(merged)
    parts = [(2.0, deltas(base, a)), (0.5, deltas(base, b)), (-1.0, deltas(base, c))]
    touched = {name for _, part in parts for name in part}
    assert report.merged_modules == len(touched)
    for name, weight in plain.items():
        terms = [factor * part[name] for factor, part in parts if name in part]
        if not terms:
            assert torch.equal(merged[name], weight), name
            continue
        exact = weight.double() + sum(terms)
        if dtype is torch.float32:
            torch.testing.assert_close(merged[name].double(), exact, atol=1e-6, rtol=0)
        else:
            assert (merged[name] == exact.float().bfloat16()).double().mean() > 0.999, name


def test_minus_itself_is_the_base_and_zero_is_nothing(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    a = write_adapter(base, tmp_path / "a", target_modules=["all-linear"], scale=0.001)
    merge(base, a, tmp_path / "nothing", weight=0)
    merge(base, a, tmp_path / "one")
    merge(base, a, tmp_path / "halves", weight=0.5, add=[(a, 0.5)])
    merge(base, a, tmp_path / "difference", add=[(a, -1)])
    plain, one, halves, difference, nothing = (
        load_file(tmp_path / name / "model.safetensors")
        for name in ("base", "one", "halves", "difference", "nothing")
    )
    for name, weight in plain.items():
        assert torch.equal(nothing[name], weight)
        torch.testing.assert_close(halves[name], one[name], atol=1e-7, rtol=0)
        torch.testing.assert_close(difference[name], weight, atol=1e-7, rtol=0)
    assert any(not torch.equal(plain[name], one[name]) for name in plain)


def test_a_method_that_does_more_than_add(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    a = write_adapter(base, tmp_path / "a", seed=1, target_modules=["q"])
    dora = write_adapter(base, tmp_path / "dora", seed=2, target_modules=["q", "o"], method="dora")
    merge(base, a, tmp_path / "out", add=[(dora, 0.25)])
    plain, merged = fresh(base).state_dict(), fresh(tmp_path / "out").state_dict()
    own, other = deltas(base, a), deltas(base, dora)
    for name, delta in other.items():
        exact = plain[name].double() + 0.25 * delta + own.get(name, 0.0)
        torch.testing.assert_close(merged[name].double(), exact, atol=1e-6, rtol=0)


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_an_added_adapter_parts_tied_embeddings(family: str, tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", family, tie_word_embeddings=True)
    a = write_adapter(base, tmp_path / "a", target_modules=["q"])
    b = write_adapter(base, tmp_path / "b", target_modules=["lm_head"])
    merge(base, a, tmp_path / "out", add=[(b, 1)], say=quiet)
    model = fresh(tmp_path / "out")
    output, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    torch.testing.assert_close(
        output.double(), embedding.double() + deltas(base, b)["lm_head.weight"], atol=1e-6, rtol=0
    )
    assert torch.equal(embedding, fresh(base).get_input_embeddings().weight)


def copy_head(source: Path, target: Path) -> None:
    """Copy the head of one adapter to another."""
    file = target / "adapter_model.safetensors"
    head = {k: v for k, v in load_file(source / file.name).items() if ".classifier." in k}
    assert head
    save_file(load_file(file) | head, file, metadata={"format": "pt"})


def test_heads_must_be_equal(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", "bert")
    a, b = (write_adapter(base, tmp_path / n, seed=i) for i, n in enumerate("ab"))
    with pytest.raises(AdapterError, match=r"b: classifier\.bias is fully trained, with other"):
        merge(base, a, tmp_path / "out", add=[(b, 0.5)])
    assert not (tmp_path / "out").exists()
    copy_head(a, b)
    merge(base, a, tmp_path / "out", weight=0.5, add=[(b, 0.5)])
    merged, one = fresh(tmp_path / "out"), load(base, a)
    assert torch.equal(merged.classifier.weight, one.classifier.weight)
    name = "bert.encoder.layer.0.attention.self.query"
    exact = fresh(base).state_dict()[f"{name}.weight"].double()
    exact = exact + sum(0.5 * deltas(base, folder)[f"{name}.weight"] for folder in (a, b))
    got = merged.get_submodule(name).weight.double()
    torch.testing.assert_close(got, exact, atol=1e-6, rtol=0)


@pytest.mark.parametrize("keys", [{"bias": "all"}, {"modules_to_save": ["ln_f"]}], ids=str)
@pytest.mark.parametrize("family", ["gpt2"])
def test_fully_trained_modules_have_no_sum(
    family: str, keys: dict[str, Any], tmp_path: Path
) -> None:
    base = write_base(tmp_path / "base", family)
    a, b = write_adapter(base, tmp_path / "a"), write_adapter(base, tmp_path / "b", **keys)
    with pytest.raises(
        AdapterError,
        match=r"is fully trained, with other values than in .*a: fully trained modules",
    ):
        merge(base, a, tmp_path / "out", add=[(b, 1)])
    merge(base, b, tmp_path / "out", add=[(a, 0)])  # the first one's is unchanged
    torch.testing.assert_close(
        logits(fresh(tmp_path / "out")), logits(load(base, b)), atol=1e-5, rtol=0
    )
    if "bias" in keys:
        with pytest.raises(AdapterError, match=r"weight = 0.5: it trains parameters of the base"):
            merge(base, b, tmp_path / "half", weight=0.5)
        assert not (tmp_path / "half").exists()


def test_the_sum_is_refused_as_a_merge_is(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    wider = write_base(tmp_path / "wider", hidden_size=32)
    a, other = write_adapter(base, tmp_path / "a"), write_adapter(wider, tmp_path / "other")
    cases: list[tuple[Any, str]] = [
        ([(a, float("nan"))], "weight = nan: allowed: a finite number"),
        ([(a, float("-inf"))], "weight = -inf: allowed: a finite number"),
        ([(tmp_path / "none", 1.0)], "none: no such adapter directory"),
        ([("", 1.0)], "without an adapter directory"),
        ([(base, 1.0)], "a model, not an adapter"),
        ([(other, 1.0)], "belongs to another base model"),
    ]
    for add, message in cases:
        with pytest.raises(AdapterError, match=message):
            merge(base, a, tmp_path / "out", add=add)
    with pytest.raises(AdapterError, match="weight = inf"):
        merge(base, a, tmp_path / "out", weight=float("inf"))
    b = write_adapter(base, tmp_path / "b")
    with pytest.raises(AdapterError, match="outside the adapter's directory"):
        merge(base, a, b / "out", add=[(b, 1.0)])
    assert {p.name for p in tmp_path.iterdir()} == {"base", "wider", "a", "b", "other"}
