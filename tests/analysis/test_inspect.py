"""The report on adapters of every method, compared with their layers on the loaded model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import AdaLoraConfig, get_peft_model
from peft import LoraConfig as PeftLora
from safetensors.torch import load_file, save_file
from torch import Tensor

import lorakit
from lorakit.adapters.peft.place import load_adapter
from lorakit.adapters.peft.schema import WEIGHTS
from lorakit.analysis.report import MatrixReport
from lorakit.base_weight import dense_weight
from lorakit.errors import AdapterError
from lorakit.layers import CompositeLayer, adapted_modules
from lorakit.module_names import without_wrappers
from tests.adapters.checkpoints import MODELS, write_model, write_random_adapter
from tests.adapters.directories import fresh, write_adapter, write_base, write_pair
from tests.training.runs import recipe_for

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("llama", {"r": 4, "target_modules": ["q", "v", "up_proj"]}),
    "rslora": ("llama", {"r": 4, "use_rslora": True}),
    "lora_plus": ("llama", {"method": "lora_plus", "r": 4}),
    "patterns": ("llama", {"r": 4, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}}),
    "moslora": ("llama", {"method": "moslora", "r": 4}),
    "adalora": ("llama", {"method": "adalora", "init_r": 4, "target_r": 2}),
    "embedding": ("llama", {"r": 4, "target_modules": ["embed_tokens", "q"]}),
    "tied output layer": ("gemma2", {"r": 4, "target_modules": ["lm_head"]}),
    "Conv1D": ("gpt2", {"r": 4, "target_modules": ["c_attn", "o"]}),
    "classifier": ("bert", {"r": 4, "target_modules": ["q", "dense"]}),
}


def dense_updates(base: Path, adapter: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Module -> dW and W (out, in) of the loaded adapter."""
    model = fresh(base)
    load_adapter(model, adapter)
    found = {}
    for name, layer in adapted_modules(model).items():
        W = dense_weight(layer.base_layer).detach().double()
        found[name] = (layer.merged_weight(W.float()).detach().double() - W, W)
    return found


def assert_describes(found: MatrixReport, dense: Tensor, W: Tensor) -> None:
    U, S, Vt = np.linalg.svd(dense.numpy())
    p = S[: found.r] / S[: found.r].sum()
    tolerance = {"rel": 1e-4}  # of the float32 sum that the loaded layer merges
    assert found.shape == tuple(dense.shape)
    assert found.norm_delta == pytest.approx(np.linalg.norm(dense), **tolerance)
    assert found.effective_rank == pytest.approx(np.exp(-(p * np.log(p)).sum()), **tolerance)
    within = np.linalg.norm(U[:, : found.r].T @ W.numpy() @ Vt[: found.r].T)
    assert found.amplification == pytest.approx(np.linalg.norm(dense) / within, rel=1e-3)


@pytest.mark.parametrize("case", CASES)
def test_matches_the_loaded_adapter(case: str, tmp_path: Path) -> None:
    family, keys = CASES[case]
    base, adapter = write_pair(tmp_path, family, **keys)
    report = lorakit.inspect(adapter, base=base)
    updates = dense_updates(base, adapter)
    assert {m.module for m in report.modules} == set(updates)
    assert (report.method, report.base) == (keys.get("method", "lora"), str(base))
    for found in report.modules:
        assert_describes(found, *updates[found.module])


def test_the_parts_of_a_fused_projection(tmp_path: Path) -> None:
    keys = {"r": 3, "target_modules": ["q", "v"], "rank_pattern": {"v": 2}}
    base, adapter = write_pair(tmp_path, "gpt2", **keys)
    report = lorakit.inspect(adapter, base=base)
    model = fresh(base)
    load_adapter(model, adapter)
    layers = adapted_modules(model)
    assert [(m.role, m.r, m.layer) for m in report.modules[:2]] == [("q", 3, 0), ("v", 2, 0)]
    for found in report.modules:
        owner, _, role = found.module.rpartition(".")
        layer = layers[owner]
        assert isinstance(layer, CompositeLayer)
        W = dense_weight(layer.base_layer).detach()
        change = (layer.merged_weight(W) - W).double()
        rows = layer.rows(role)
        assert_describes(found, rows.of(change), rows.of(W.double()))


def test_dora_is_described_without_its_magnitudes(tmp_path: Path) -> None:
    base, adapter = write_pair(tmp_path, "llama", method="dora", r=4, target_modules=["q"])
    found = lorakit.inspect(adapter, base=base)
    model = fresh(base)
    load_adapter(model, adapter)
    assert found.method == "dora"
    for one, layer in zip(found.modules, adapted_modules(model).values(), strict=True):
        A, B = (getattr(layer, name).detach().double() for name in ("lora_A", "lora_B"))
        dense = layer.scaling * B @ A
        assert_describes(one, dense, dense_weight(layer.base_layer).double())
        assert (one.norm_A, one.norm_B) == pytest.approx((float(A.norm()), float(B.norm())))


def test_an_adapter_of_peft(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", "llama")
    config = PeftLora(
        r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], rank_pattern={"q_proj": 2},
        alpha_pattern={"down_proj": 3}, use_rslora=True, init_lora_weights=False,
    )  # fmt: skip
    get_peft_model(fresh(base), config).save_pretrained(tmp_path / "peft")
    report = lorakit.inspect(tmp_path / "peft", base=base)
    updates = dense_updates(base, tmp_path / "peft")
    assert {m.role: m.r for m in report.modules} == {"q": 2, "down_proj": 4}
    for found in report.modules:
        assert_describes(found, *updates[found.module])


def test_kept_triplets_of_adalora(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", "llama")
    config = AdaLoraConfig(
        init_r=4, target_r=2, tinit=1, tfinal=1, total_step=5, target_modules=["q_proj"]
    )
    model = get_peft_model(fresh(base), config)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name.endswith("lora_E.default"):
                kept = 3 if ".0." in name else 0
                value.copy_(torch.tensor([[1.0], [-2.0], [3.0], [0.0]]) if kept else 0 * value)
    model.save_pretrained(tmp_path / "adapter")
    report = lorakit.inspect(tmp_path / "adapter", base=base)
    assert [(m.layer, m.role, m.r) for m in report.modules] == [(0, "q", 3), (1, "q", 0)]
    zero = report.modules[1]
    assert (zero.norm_delta, zero.effective_rank, zero.amplification) == (0, 0, None)


def test_an_untrained_adapter_is_zero(tmp_path: Path) -> None:
    base, adapter = write_pair(tmp_path, "llama", scale=0, r=4, target_modules=["q"])
    report = lorakit.inspect(adapter, adapter, base=base, side="left")
    assert {(m.r, m.norm_B, m.norm_delta) for m in report.modules} == {(4, 0, 0)}
    assert {(m.effective_rank, m.amplification) for m in report.modules} == {(0, None)}
    assert report.similarity is not None
    assert [m.phi for m in report.similarity.modules] == [[], []]


@pytest.mark.parametrize("side", ["right", "left"])
def test_two_adapters(side: Any, tmp_path: Path) -> None:
    base, one = write_pair(tmp_path, "llama", r=4, target_modules=["q", "v"])
    two = write_adapter(base, tmp_path / "two", seed=1, r=6, target_modules=["q", "up_proj"])
    notes: list[str] = []
    found = lorakit.inspect(one, two, side=side, say=notes.append).similarity
    assert found is not None
    assert (found.other, found.side) == (str(two), side)
    assert [m.module for m in found.modules] == [
        f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)
    ]
    assert len(notes) == 1, "the adapters do not start from one A"
    assert "not compared" in notes[0] and "v_proj" in notes[0] and "up_proj" in notes[0]
    model = fresh(base), fresh(base)
    for own, adapter in zip(model, (one, two), strict=True):
        load_adapter(own, adapter)
    for m in found.modules:
        bases = []
        for own in model:
            layer = adapted_modules(own)[m.module]
            factor = layer.lora_A.T if side == "right" else layer.lora_B
            U, _, _ = np.linalg.svd(factor.detach().double().numpy(), full_matrices=False)
            bases.append(U)
        product = bases[0][:, :3].T @ bases[1][:, :5]
        assert m.phi[2][4] == pytest.approx(np.linalg.norm(product) ** 2 / 3, rel=1e-6)
        assert m.projection_metric[2][4] ** 2 == pytest.approx(3 * (1 - m.phi[2][4]))
        for grid in (m.phi, m.projection_metric, m.control_phi):
            assert (len(grid), len(grid[0])) == (4, 6)


def test_an_adapter_and_itself(tmp_path: Path) -> None:
    _, adapter = write_pair(tmp_path, "llama", r=4, target_modules=["q"])
    notes: list[str] = []
    found = lorakit.inspect(adapter, adapter, say=notes.append).similarity
    assert found is not None
    (note,) = notes
    assert note.endswith("hint: --side left, or runs with different seeds")
    for m in found.modules:
        np.testing.assert_allclose(m.phi, np.ones((4, 4)), atol=1e-9)
        assert np.mean(m.control_phi) < 0.6


def test_training_with_two_seeds_finds_common_directions(tiny_llama: Path, tmp_path: Path) -> None:
    """The contrast of figure 4 of the LoRA paper: the leading directions agree, unlike those of
    random matrices."""
    runs = []
    for seed in (1, 2):
        recipe = recipe_for(
            tmp_path / str(seed), tiny_llama, train__seed=seed, train__epochs=20, adapter__r=4
        )
        runs.append(lorakit.train(recipe).adapter_dir)
    found = lorakit.inspect(*runs).similarity
    assert found is not None
    trained = np.mean([m.phi[0][0] for m in found.modules])
    control = np.mean([m.control_phi[0][0] for m in found.modules])
    assert trained > 5 * control


#: A multimodal base whose text part has other names, one with stacked experts, and one whose
#: checkpoint has q, k, v and a gate in one matrix.
_UNUSUAL = {"qwen3_5": ["q", "v", "o"], "gemma3": [r"re:.*language_model.*_proj"]}


@pytest.mark.parametrize(
    "name", [n for n in ("gemma3", "qwen3_5", "qwen3_moe", "hrm_text") if n in MODELS]
)
def test_bases_whose_checkpoint_differs_from_the_class(name: str, tmp_path: Path) -> None:
    base, adapter = write_model(tmp_path / "base", name), tmp_path / "adapter"
    targets = _UNUSUAL.get(name, ["all-linear"])
    model = write_random_adapter(base, adapter, target_modules=targets)
    found = {
        tuple(without_wrappers(m.module)): m for m in lorakit.inspect(adapter, base=base).modules
    }
    layers = adapted_modules(model)
    assert len(found) == len(layers)
    for module, layer in layers.items():
        W = dense_weight(layer.base_layer).detach()
        change = (layer.merged_weight(W) - W).double()
        assert_describes(found[tuple(without_wrappers(module))], change, W.double())


def test_a_base_of_another_shape(tmp_path: Path) -> None:
    _, adapter = write_pair(tmp_path, "llama", r=4)
    other = write_base(tmp_path / "other", "llama", hidden_size=32)
    with pytest.raises(AdapterError, match="another base model"):
        lorakit.inspect(adapter, base=other)


def test_an_empty_name_of_a_base(tmp_path: Path) -> None:
    _, adapter = write_pair(tmp_path, "llama", r=4, target_modules=["q"])
    with pytest.raises(AdapterError, match=r'^base = "": allowed: a model directory'):
        lorakit.inspect(adapter, base="")


def test_an_unknown_side() -> None:
    with pytest.raises(AdapterError, match="side = up: allowed: right, left"):
        lorakit.inspect("adapter", side="up")  # type: ignore[arg-type]


@pytest.mark.parametrize("values", [1e200, 1e100])
def test_an_update_beyond_float64(values: float, tmp_path: Path) -> None:
    _, adapter = write_pair(tmp_path, "llama", r=4, target_modules=["q"])
    tensors = load_file(adapter / WEIGHTS)
    save_file({k: v.double() * values for k, v in tensors.items()}, adapter / WEIGHTS)
    with pytest.raises(AdapterError, match=r"adapter: model.*q_proj: the update is too large"):
        lorakit.inspect(adapter)


def test_a_base_that_is_not_finite(tmp_path: Path) -> None:
    base, adapter = write_pair(tmp_path, "llama", r=4, target_modules=["q"])
    weights = load_file(base / "model.safetensors")
    weights["model.layers.1.self_attn.q_proj.weight"][0, 0] = torch.nan
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(AdapterError, match=r"^base: model\.layers\.1.*: contains NaN or infinite"):
        lorakit.inspect(adapter, base=base)


@pytest.mark.parametrize("index", ["\u00b2", "9" * 5000])
def test_names_that_resemble_an_index(index: str, tmp_path: Path) -> None:
    _, adapter = write_pair(tmp_path, "llama", r=4, target_modules=["q"])
    tensors = load_file(adapter / WEIGHTS)
    save_file({k.replace("s.0.", f"s.{index}."): v for k, v in tensors.items()}, adapter / WEIGHTS)
    found = {m.module: m.layer for m in lorakit.inspect(adapter).modules}
    assert found[f"model.layers.{index}.self_attn.q_proj"] is None


def test_a_path_that_is_too_long() -> None:
    with pytest.raises(AdapterError, match="xxx: cannot be read: File name too long"):
        lorakit.inspect("x" * 300)
