"""Combinations of adapters by ``method``: equal to PEFT's ``add_weighted_adapter``."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from peft.utils.merge_utils import dare_linear, dare_ties
from safetensors.torch import load_file

from lorakit.adapters.load import load
from lorakit.adapters.merge.run import merge
from lorakit.errors import AdapterError
from tests.adapters.directories import fresh, logits, write_adapter, write_base

A, B = "lora_A.weight", "lora_B.weight"
Q = "model.layers.0.self_attn.q_proj"


def write_three(folder: Path, family: str = "llama", **keys: Any) -> tuple[Path, ...]:
    """Write a base and the adapters a, b and c; c has only the first of their targets."""
    base = write_base(folder / "base", family)
    targets = ["q", "k"] if family == "llama" else ["c_attn", "c_fc"]
    r = {"r": 4, "lora_alpha": 6} | keys
    return (
        base,
        write_adapter(base, folder / "a", seed=1, target_modules=targets, **r),
        write_adapter(base, folder / "b", seed=2, target_modules=targets, **r),
        write_adapter(base, folder / "c", seed=3, target_modules=targets[:1], **r),
    )


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ...]:
    return write_three(tmp_path_factory.mktemp("three"))


def peft_merged(
    base: Path, weighted: list[tuple[Path, float]], **how: Any
) -> dict[str, torch.Tensor]:
    """The state of the base with the weighted adapter of PEFT merged into it."""
    names = [f"adapter{i}" for i in range(len(weighted))]
    model = PeftModel.from_pretrained(fresh(base), str(weighted[0][0]), adapter_name=names[0])
    for name, (adapter, _) in zip(names[1:], weighted[1:], strict=True):
        model.load_adapter(str(adapter), adapter_name=name)
    model.add_weighted_adapter(names, [weight for _, weight in weighted], "new", **how)
    model.set_adapter("new")
    merged = model.merge_and_unload()
    return {name: value.detach() for name, value in merged.state_dict().items()}


def factors(adapter: Path, module: str) -> tuple[torch.Tensor, torch.Tensor]:
    stored = load_file(adapter / "adapter_model.safetensors")
    return stored[f"base_model.model.{module}.{A}"], stored[f"base_model.model.{module}.{B}"]


@pytest.mark.parametrize(
    "how",
    [
        {"method": "cat"},
        {"method": "linear"},
        {"method": "svd"},
        {"method": "svd", "svd_rank": 2},
        {"method": "ties", "density": 0.5},
        {"method": "ties", "density": 0.7, "majority_sign_method": "frequency"},
        {"method": "magnitude_prune", "density": 0.3},
        {"method": "dare_linear", "density": 1.0},
        {"method": "dare_ties", "density": 1.0},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:The density 1.0")
def test_equal_to_peft(how: dict[str, Any], three: tuple[Path, ...], tmp_path: Path) -> None:
    check_against_peft(how, three, tmp_path / "out")


def test_transposed_weights_equal_to_peft(tmp_path: Path) -> None:
    files = write_three(tmp_path, "gpt2")
    for how in ({"method": "svd"}, {"method": "ties", "density": 0.5}):
        check_against_peft(how, files, tmp_path / how["method"])


def check_against_peft(how: dict[str, Any], files: tuple[Path, ...], out: Path) -> None:
    base, a, b, c = files
    report = merge(base, a, out, weight=0.7, add=[(b, -0.4), (c, 1.5)], **how)
    assert report.combination == how["method"]
    options = {key: value for key, value in how.items() if key != "method"}
    want = peft_merged(
        base, [(a, 0.7), (b, -0.4), (c, 1.5)], combination_type=how["method"], **options
    )
    got, plain = fresh(out).state_dict(), fresh(base).state_dict()
    changed = [name for name, value in plain.items() if not torch.equal(got[name], value)]
    assert len(changed) == 4  # of two layers
    for name, value in got.items():
        torch.testing.assert_close(value, want[name], atol=1e-5, rtol=0)


def test_embeddings_equal_to_peft(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    a, b = (
        write_adapter(base, tmp_path / n, seed=i, target_modules=["embed_tokens", "q"])
        for i, n in enumerate("ab")
    )
    merge(base, a, tmp_path / "out", add=[(b, 1)], method="ties", density=0.4)
    want = peft_merged(base, [(a, 1.0), (b, 1.0)], combination_type="ties", density=0.4)
    for name, value in fresh(tmp_path / "out").state_dict().items():
        torch.testing.assert_close(value, want[name], atol=1e-5, rtol=0)


def test_different_ranks(three: tuple[Path, ...], tmp_path: Path) -> None:
    base, a, *_ = three
    d = write_adapter(base, tmp_path / "d", seed=4, target_modules=["q"], r=7)
    for rank in (None, 3):
        out = tmp_path / f"out{rank}"
        merge(base, a, out, add=[(d, 0.5)], method="svd", svd_rank=rank)
        want = peft_merged(base, [(a, 1.0), (d, 0.5)], combination_type="svd", svd_rank=rank)
        for name, value in fresh(out).state_dict().items():
            torch.testing.assert_close(value, want[name], atol=1e-5, rtol=0)
    match = r"d: model\.layers\.0\.self_attn\.q_proj has r = 7, and 4 in .*a: linear combines"
    with pytest.raises(AdapterError, match=match):
        merge(base, a, tmp_path / "none", add=[(d, 1)], method="linear")
    assert not (tmp_path / "none").exists()


def pruned(value: np.ndarray, density: float) -> np.ndarray:
    """The largest values by sorting, without PyTorch."""
    order = np.argsort(-np.abs(value).ravel(), kind="stable")[: int(density * value.size)]
    kept = np.zeros(value.size)
    kept[order] = value.ravel()[order]
    return kept.reshape(value.shape)


def ties_by_hand(values: list[np.ndarray], weights: list[float], density: float) -> np.ndarray:
    kept = [pruned(value.astype(np.float64), density) for value in values]
    out = np.zeros_like(kept[0])
    for at in np.ndindex(out.shape):
        own = [value[at] for value in kept]
        sign = 1 if sum(own) >= 0 else -1
        agreeing = [w * v for w, v in zip(weights, own, strict=True) if np.sign(v) == sign]
        out[at] = sum(agreeing) / len(agreeing) if agreeing else 0.0
    return out


def test_ties_by_numpy(three: tuple[Path, ...], tmp_path: Path) -> None:
    base, a, b, c = three
    merge(base, a, tmp_path / "out", weight=2.0, add=[(b, 0.5), (c, -1.0)], method="ties",
          density=0.6)  # fmt: skip
    roots = [math.sqrt(weight * 6 / 4) for weight in (2.0, 0.5, 1.0)]
    own = [tuple(f.numpy() for f in factors(adapter, Q)) for adapter in (a, b, c)]
    new_A = ties_by_hand([A for A, _ in own], [roots[0], roots[1], -roots[2]], 0.6)
    new_B = ties_by_hand([B for _, B in own], roots, 0.6)
    plain, got = (fresh(f).state_dict()[f"{Q}.weight"] for f in (base, tmp_path / "out"))
    np.testing.assert_allclose(got.numpy(), plain.numpy() + new_B @ new_A, atol=1e-5, rtol=0)


@pytest.mark.parametrize("function", [dare_linear, dare_ties], ids=lambda f: f.__name__)
def test_dare_draws_as_peft_does(function: Any, three: tuple[Path, ...], tmp_path: Path) -> None:
    """Modules in the order of their names; in each, A of all adapters before B."""
    base, a, b, _ = three
    how = {"method": function.__name__, "density": 0.5}
    merge(base, a, tmp_path / "out", add=[(b, 1)], **how, seed=7)
    merge(base, a, tmp_path / "again", add=[(b, 1)], **how, seed=7)
    merge(base, a, tmp_path / "other", add=[(b, 1)], **how)
    plain, got, again, other = (
        fresh(f).state_dict() for f in (base, *(tmp_path / n for n in ("out", "again", "other")))
    )
    weights = torch.full((2,), math.sqrt(6 / 4))
    torch.manual_seed(7)
    changed = [n for n, value in plain.items() if not torch.equal(got[n], value)]
    for name in sorted(changed):
        pairs = [factors(adapter, name.removesuffix(".weight")) for adapter in (a, b)]
        new_A, new_B = (function(list(side), weights, 0.5) for side in zip(*pairs, strict=True))
        torch.testing.assert_close(got[name], plain[name] + new_B @ new_A, atol=1e-5, rtol=0)
        assert torch.equal(again[name], got[name])
        assert not torch.equal(other[name], got[name])


def test_rslora_and_adalora(tmp_path: Path) -> None:
    """Their scalings and Lambda count; the sum of two is that of cat if the rank suffices."""
    base = write_base(tmp_path / "base")
    a = write_adapter(base, tmp_path / "a", seed=1, r=3, use_rslora=True)
    b = write_adapter(base, tmp_path / "b", seed=2, method="adalora", target_r=2, init_r=3)
    merge(base, a, tmp_path / "cat", add=[(b, 0.5)], method="cat")
    merge(base, a, tmp_path / "svd", add=[(b, 0.5)], method="svd", svd_rank=6)
    merge(base, a, tmp_path / "low", add=[(b, 0.5)], method="svd")
    cat, svd, low = (fresh(tmp_path / n).state_dict() for n in ("cat", "svd", "low"))
    for name, value in cat.items():
        torch.testing.assert_close(svd[name], value, atol=1e-6, rtol=0)
    assert any((low[name] - value).abs().max() > 1e-3 for name, value in cat.items())


def test_heads_are_those_of_the_first(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", "bert")
    a, b = (write_adapter(base, tmp_path / n, seed=i) for i, n in enumerate("ab"))
    with pytest.raises(AdapterError, match=r"b: classifier\.bias is fully trained, with other"):
        merge(base, a, tmp_path / "out", add=[(b, 1)], method="linear")
    merge(base, a, tmp_path / "out", weight=0.5, add=[(a, 0.5)], method="linear")
    own = load(base, a)
    merged = fresh(tmp_path / "out")
    assert torch.equal(merged.classifier.weight, own.classifier.weight)
    # The root of each half, on both factors, of two equal adapters: their double.
    query = "bert.encoder.layer.0.attention.self.query"
    layer: Any = own.get_submodule(query)
    twice = 2 * layer.fold(layer.weight) - layer.weight
    torch.testing.assert_close(merged.get_submodule(query).weight, twice, atol=1e-5, rtol=0)
    assert logits(merged).isfinite().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "tise"}, r'method = "tise": unknown \(did you mean \'ties\'\?\); allowed: cat'),
        ({"method": "ties"}, r"density: ties needs the share of values to keep; allowed: above 0"),
        ({"method": "dare", "density": 0.0}, r"density = 0: dare_linear needs the share"),
        ({"method": "ties", "density": 1.5}, r"density = 1\.5: ties needs the share"),
        ({"density": 0.5}, r"density = 0\.5: not used by cat; allowed with: ties, dare_linear"),
        ({"method": "linear", "svd_rank": 3}, r"svd_rank = 3: not used by linear; allowed with: s"),
        ({"method": "svd", "svd_rank": 0}, r"svd_rank = 0: allowed: an integer above 0"),
        (
            {"method": "ties", "density": 0.5, "majority_sign_method": "mean"},
            r'majority_sign_method = "mean": allowed: total, frequency',
        ),
        ({"method": "ties", "density": 0.5, "seed": 1}, r"seed = 1: not used by ties"),
        ({"method": "dare", "density": 0.5, "seed": -1}, r"seed = -1: allowed: 0 to 2\^63 - 1"),
    ],
)
def test_options(
    options: dict[str, Any], message: str, three: tuple[Path, ...], tmp_path: Path
) -> None:
    base, a, b, _ = three
    with pytest.raises(AdapterError, match=message):
        merge(base, a, tmp_path / "out", add=[(b, 1)], **options)
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_combined(three: tuple[Path, ...], tmp_path: Path) -> None:
    base, a, *_ = three
    gpt2 = write_base(tmp_path / "gpt2", "gpt2")
    dora = write_adapter(base, tmp_path / "dora", method="dora", target_modules=["q"])
    biases = write_adapter(gpt2, tmp_path / "biases", bias="lora_only")
    for own, added, weight, message in (
        (a, [dora], 1.0, r"dora is not a product of two factors; hint: method cat adds adapters"),
        (a, [], 1.0, r'method = "linear": combines several adapters; hint: add another one'),
        (biases, [biases], 0.5, r"biases: weight = 0\.5: it trains parameters of the base"),
    ):
        with pytest.raises(AdapterError, match=message):
            merge(base, own, tmp_path / "out", weight=weight, add=[(o, 1) for o in added],
                  method="linear")  # fmt: skip
    assert not (tmp_path / "out").exists()
