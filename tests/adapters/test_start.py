"""Values of ``adapter.init_from`` in a new adapter: the model equals the loaded one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from lorakit import registry
from lorakit.adapters.load import load
from lorakit.adapters.start import load_values, read_start
from lorakit.errors import UserError
from lorakit.injection import find_heads, inject
from lorakit.recipe.sections import AdapterSection, ModelSection
from tests.adapters.directories import fresh, logits, write_adapter, write_base


def started(
    base: Path, adapter: Path, say: Any = lambda text: None, **keys: Any
) -> tuple[Any, AdapterSection]:
    """A model with a new adapter that has the values of ``adapter``, and its configuration."""
    model = fresh(base)
    method = registry.methods()[keys.setdefault("method", "lora")]
    config = method.Config(init_from=str(adapter), **keys)
    heads = find_heads(model)
    start = read_start(model, ModelSection(name_or_path=str(base)), config, heads, say)
    report = inject(model, start.config.model_copy(update={"init_from": None}), heads)
    load_values(model, start, report.modules_to_save)
    return model.eval(), start.config


@pytest.mark.parametrize(
    ("family", "written", "keys"),
    [
        ("llama", {"r": 3, "lora_alpha": 5, "target_modules": ["q", "o"]}, {}),
        ("llama", {"use_rslora": True, "rank_pattern": {"q_proj": 2}, "layers": [1]}, {}),
        ("llama", {"alpha_pattern": {"layers.0.self_attn.v_proj": 3.0}}, {"method": "lora_plus"}),
        ("llama", {"method": "lora_plus", "target_modules": ["all-linear"]}, {"method": "lora"}),
        ("llama", {"target_modules": ["embed_tokens", "down_proj"]}, {}),
        ("llama", {"modules_to_save": ["norm", "down_proj"]}, {}),
        ("llama", {"method": "dora", "r": 2}, {"method": "dora"}),
        ("llama", {"method": "adalora", "init_r": 5, "target_r": 2}, {"method": "adalora"}),
        ("gpt2", {"target_modules": ["q", "v", "c_fc"], "r": 3}, {}),
        ("gpt2", {"bias": "all", "target_modules": ["c_attn"]}, {}),
        ("gpt_neox", {"bias": "lora_only", "target_modules": ["q", "v"]}, {}),
        ("bert", {"target_modules": ["q"], "r": 2}, {}),
        ("llama", {"method": "moslora", "r": 2}, {}),
        ("gpt2", {"method": "bitfit"}, {"method": "bitfit"}),
        ("llama", {"init": "pissa", "r": 2}, {}),
    ],
    ids=str,
)
def test_own_adapters(
    family: str, written: dict[str, Any], keys: dict[str, Any], tmp_path: Path
) -> None:
    base = write_base(tmp_path / "base", family)
    adapter = write_adapter(base, tmp_path / "adapter", **written)
    model, _ = started(base, adapter, **keys)
    want = logits(load(base, adapter))
    assert (want - logits(fresh(base))).abs().max() > 1e-3
    torch.testing.assert_close(logits(model), want, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("llama", {"r": 3, "target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1]}),
        ("llama", {"r": 4, "target_modules": "all-linear", "use_rslora": True}),
        ("llama", {"target_modules": r".*\.0\.mlp\..*_proj", "rank_pattern": {"up_proj": 2}}),
        ("llama", {"use_dora": True, "target_modules": ["o_proj"]}),
        ("gpt2", {"bias": "lora_only", "target_modules": ["c_attn"], "modules_to_save": ["ln_f"]}),
        ("bert", {"target_modules": ["query"], "task_type": "SEQ_CLS"}),
    ],
    ids=str,
)
def test_adapters_of_peft(family: str, config: dict[str, Any], tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", family)
    model = peft.get_peft_model(fresh(base), peft.LoraConfig(**config))
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(str(tmp_path / "adapter"))
    method = "dora" if config.get("use_dora") else "lora"
    own, completed = started(base, tmp_path / "adapter", method=method)
    assert completed.r == config.get("r", 8)  # type: ignore[attr-defined]
    torch.testing.assert_close(logits(own), logits(model.eval()), atol=1e-6, rtol=0)


def test_the_keys_of_the_adapter(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    adapter = write_adapter(
        base, tmp_path / "adapter", r=3, lora_alpha=6, lora_dropout=0.25, layers=[0],
        target_modules=["q", "down_proj"], modules_to_save=["norm"],
    )  # fmt: skip
    said: list[str] = []
    _, config = started(base, adapter, said.append, lora_dropout=0.5)
    expected = {"r": 3, "lora_alpha": 6, "lora_dropout": 0.5, "modules_to_save": ["model.norm"],
                "target_modules": ["0.mlp.down_proj", "0.self_attn.q_proj"]}  # fmt: skip
    assert {key: getattr(config, key) for key in expected} == expected
    [line] = said
    assert line.startswith(f"starting from the adapter {adapter}, r = 3, lora_alpha = 6, target_m")
    again, _ = started(
        base, adapter, r=3, lora_alpha=6, target_modules=["q", "down_proj"], layers="0"
    )
    torch.testing.assert_close(logits(again), logits(load(base, adapter)), atol=1e-6, rtol=0)


def test_more_modules_are_trained_than_before(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    adapter = write_adapter(base, tmp_path / "adapter")
    model, config = started(base, adapter, modules_to_save=["norm"])
    assert config.modules_to_save == ["norm"]
    assert model.model.norm.weight.requires_grad
    torch.testing.assert_close(logits(model), logits(load(base, adapter)), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("written", "keys", "message"),
    [
        ({"r": 4}, {"r": 8}, r"adapter\.r = 8: .*k_proj has rank 4 in .*adapter, and 8 here; all"),
        ({"lora_alpha": 4}, {"lora_alpha": 16}, r"adapter\.lora_alpha = 16: .* has scaling 0\.5 in"),
        ({}, {"use_rslora": True}, r"adapter\.lora_alpha = 16: .* has scaling 2 in .*, and 5\.65"),
        (
            {"target_modules": ["q", "v"]}, {"target_modules": ["q", "k"]},
            r'adapter\.target_modules = \["q", "k"\]: does not adapt .*v_proj.* and also adapts .*k_',
        ),
        ({"layers": [0]}, {"layers": [1]}, r"adapter\.layers: no layer 1 among"),
        (
            {"modules_to_save": ["norm"]}, {"modules_to_save": ["down_proj"]},
            r'adapter\.modules_to_save = \["down_proj"\]: .*adapter also trained model\.norm',
        ),
        ({}, {"init": "pissa"}, r'adapter\.init = "pissa": the values are those of .*adapter'),
        ({}, {"method": "dora"}, r'adapter\.method = "dora": .* adapter of lora; allowed: lora, lo'),
        ({"method": "dora"}, {}, r'adapter\.method = "lora": .* an adapter of dora; allowed: dora'),
        (
            {"method": "adalora", "init_r": 6, "target_r": 2}, {"method": "adalora", "init_r": 5, "target_r": 2},
            r"adapter\.init_r = 5: .*adapter has rank 6 in",
        ),
        (
            {"target_modules": ["c_attn"], "bias": "all"}, {"bias": "none"},
            r'adapter\.bias = "none": .*adapter also trained',
        ),
    ],
    ids=str,
)  # fmt: skip
def test_what_does_not_match(
    written: dict[str, Any], keys: dict[str, Any], message: str, tmp_path: Path
) -> None:
    base = write_base(tmp_path / "base", "gpt2" if "bias" in written else "llama")
    adapter = write_adapter(base, tmp_path / "adapter", **written)
    with pytest.raises(UserError, match=message):
        started(base, adapter, **keys)


def test_another_base_or_directory(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    other = write_base(tmp_path / "other", "gpt2")
    adapter = write_adapter(base, tmp_path / "adapter")
    with pytest.raises(UserError, match=r"adapter\.init_from: .*adapter: does not fit the model"):
        started(other, adapter)
    with pytest.raises(UserError, match=r"adapter\.init_from: .*none: no such adapter directory"):
        started(base, tmp_path / "none")
    with pytest.raises(
        UserError, match=r"adapter\.init_from = .*: allowed: in the recipe of a run"
    ):
        inject(fresh(base), registry.methods()["lora"].Config(init_from="adapter"))


def test_labels_in_another_order(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", "bert")
    names = {0: "yes", 1: "no", 2: "maybe"}
    adapter = write_adapter(base, tmp_path / "adapter", id2label=names)
    with pytest.raises(UserError, match=r'its labels are \["yes", "no", "maybe"\], and those of'):
        started(base, adapter)


def test_tied_embeddings(tmp_path: Path) -> None:
    """PEFT trains a copy of one of the two weights, which a tied model has no place for."""
    base = write_base(tmp_path / "base", tie_word_embeddings=True)
    adapter = write_adapter(base, tmp_path / "adapter", modules_to_save=["embed_tokens"])
    model, _ = started(base, adapter)
    torch.testing.assert_close(logits(model), logits(load(base, adapter)), atol=1e-6, rtol=0)
    config = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    peft.get_peft_model(fresh(base), config).save_pretrained(str(tmp_path / "peft"))
    with pytest.raises(UserError, match="which the model ties to another weight"):
        started(base, tmp_path / "peft")
