"""LoRA adapters as GGUF: the update that llama.cpp adds, computed here from the file alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import pytest
import torch

import lorakit
from lorakit.api import export_gguf
from lorakit.errors import UserError
from lorakit.layers import adapted_modules
from tests.adapters.directories import fresh, write_adapter
from tests.export.bases import write_base

pytestmark = pytest.mark.filterwarnings("ignore")

#: GGUF's name of a matrix in a layer -> transformers'.
NAMES = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}  # fmt: skip


def quiet(_note: str) -> None:
    pass


def field(reader: gguf.GGUFReader, key: str) -> Any:
    return reader.fields[key].contents()


def updates(file: Path, rotates_pairs: bool) -> dict[str, torch.Tensor]:
    """alpha / r * B A of each matrix, by transformers' names, in transformers' order of rows."""
    reader = gguf.GGUFReader(file)
    assert field(reader, "general.type") == "adapter"
    assert field(reader, "adapter.type") == "lora"
    alpha = field(reader, "adapter.lora.alpha")
    stored = {t.name: torch.tensor(gguf.dequantize(t.data, t.tensor_type)) for t in reader.tensors}
    found = {}
    for name, A in stored.items():
        if not name.endswith(".lora_a"):
            continue
        B = stored[name.removesuffix("a") + "b"]
        if name.startswith("token_embd"):
            found["model.embed_tokens"] = alpha / A.shape[1] * A.double() @ B.double().T
            continue
        delta = alpha / A.shape[0] * B.double() @ A.double()
        if name.startswith("output."):
            found["lm_head"] = delta
            continue
        _, layer, kind, _, _ = name.split(".")
        if rotates_pairs and kind in ("attn_q", "attn_k"):  # heads of 4: 0 2 1 3
            rows = torch.arange(delta.shape[0]).reshape(-1, 4)[:, [0, 2, 1, 3]].flatten()
            delta = delta[rows]
        found[f"model.layers.{layer}.{NAMES[kind]}"] = delta
    return found


def trained(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    """What merging adds to each matrix."""
    weights = {name: value.detach() for name, value in fresh(base).named_parameters()}
    found = {}
    for name, layer in adapted_modules(lorakit.load(base, adapter)).items():
        W = weights[f"{name}.weight"]
        W = W.T if name.endswith("embed_tokens") else W  # the layer's B A is (features, tokens)
        delta = layer.merged_weight(W.clone()).detach() - W
        found[name] = delta.T if name.endswith("embed_tokens") else delta
    return found


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"r": 4, "target_modules": ["all-linear"]}),
    "mistral": ("mistral", {"r": 4, "target_modules": ["q", "k"]}),
    "qwen2": ("qwen2", {"r": 2, "target_modules": ["attention"]}),
    "qwen3": ("qwen3", {"r": 4, "target_modules": ["all-linear"]}),
    "gemma3": ("gemma3", {"r": 4, "target_modules": ["all-linear"]}),
    "rslora": ("llama", {"r": 4, "use_rslora": True}),
    "patterns": ("llama", {"r": 4, "rank_pattern": {"q_proj": 3}, "alpha_pattern": {"v_proj": 5}}),
    "adalora": ("llama", {"method": "adalora", "init_r": 4, "target_r": 2}),
    "pissa": ("llama", {"r": 4, "init": "pissa"}),
    "embeddings": ("llama", {"r": 2, "target_modules": ["embed_tokens", "lm_head", "q"]}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_the_update_is_that_of_the_adapter(case: str, tmp_path: Path) -> None:
    family, keys = CASES[case]
    base = write_base(tmp_path / "base", family)
    adapter = write_adapter(base, tmp_path / "adapter", **keys)
    report = export_gguf(adapter, tmp_path / "a.gguf", say=quiet)
    want = trained(base, adapter)
    have = updates(tmp_path / "a.gguf", family in ("llama", "mistral"))
    assert have.keys() == want.keys()
    assert (report.kind, report.dtype, report.tensors) == ("adapter", "f32", 2 * len(want))
    for name, delta in want.items():
        assert delta.abs().max() > 1e-3
        torch.testing.assert_close(have[name].float(), delta, atol=2e-6, rtol=1e-5)
    notes = {"patterns": ("B is scaled in 2 of 8 matrices to fit one lora_alpha",)}
    assert report.notes == notes.get(case, ())


def test_factors_keep_their_bits(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    base = write_base(tmp_path / "base", "qwen2")
    adapter = write_adapter(base, tmp_path / "adapter", r=4, lora_alpha=20, target_modules=["v"])
    export_gguf(adapter, tmp_path / "a.gguf", say=quiet)
    reader = gguf.GGUFReader(tmp_path / "a.gguf")
    assert field(reader, "general.architecture") == "qwen2"
    assert field(reader, "adapter.lora.alpha") == 20
    tensors = load_file(adapter / "adapter_model.safetensors")
    prefix = "base_model.model.model.layers.1.self_attn.v_proj.lora_"
    stored = {t.name: torch.tensor(t.data) for t in reader.tensors}
    assert len(stored) == 4
    assert stored["blk.1.attn_v.weight.lora_a"].equal(tensors[f"{prefix}A.weight"])
    assert stored["blk.1.attn_v.weight.lora_b"].equal(tensors[f"{prefix}B.weight"])
    report = export_gguf(adapter, tmp_path / "h.gguf", "f16", say=quiet)
    assert report.dtype == "f16"
    assert {t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "h.gguf").tensors} == {"F16"}


#: The recipe's keys, changes of the base, and what the message says.
REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "dora": ({"method": "dora", "r": 4}, {}, "dora is not a product of two factors; hint: lorakit merge"),
    "bias": ({"r": 4, "bias": "all"}, {"attention_bias": True}, "fully trained, and an adapter for llama.cpp has low-rank updates only; hint: lorakit merge"),
    "tied": ({"r": 4, "target_modules": ["embed_tokens"]}, {"tie_word_embeddings": True}, "the base uses one matrix as embedding and output layer"),
    "full": ({"r": 4, "modules_to_save": ["lm_head"]}, {}, "lm_head: fully trained"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str, tmp_path: Path) -> None:
    keys, changes, message = REFUSED[case]
    base = write_base(tmp_path / "base", "llama", **changes)
    adapter = write_adapter(base, tmp_path / "adapter", **keys)
    with pytest.raises(UserError) as found:
        export_gguf(adapter, tmp_path / "a.gguf", say=quiet)
    assert message in str(found.value)
    assert not (tmp_path / "a.gguf").exists()


def test_another_base(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", "llama")
    adapter = write_adapter(base, tmp_path / "adapter", r=4)
    other = write_base(tmp_path / "other", "llama", num_key_value_heads=4)
    with pytest.raises(UserError, match="k_proj has 8 rows, and the base 16"):
        export_gguf(adapter, tmp_path / "a.gguf", base=str(other), say=quiet)
    fewer = write_base(tmp_path / "fewer", "llama", num_hidden_layers=1)
    with pytest.raises(
        UserError, match=r"llama.cpp has no model.layers.1.self_attn.[kq]_proj in llama"
    ):
        export_gguf(adapter, tmp_path / "a.gguf", base=str(fewer), say=quiet)
    phi = write_base(tmp_path / "phi", "phi3")
    with pytest.raises(UserError, match="model_type = phi3: cannot be written as GGUF"):
        export_gguf(adapter, tmp_path / "a.gguf", base=str(phi), say=quiet)
    with pytest.raises(UserError, match=r"allowed: f32, f16, bf16$"):
        export_gguf(adapter, tmp_path / "a.gguf", "q8_0", say=quiet)
