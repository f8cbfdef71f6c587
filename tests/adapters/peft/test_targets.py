"""An adapter takes effect wherever it is loaded: on the base's own class and on its text part."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

import lorakit
from lorakit.adapters.peft.place import load_adapter
from lorakit.adapters.peft.targets import misread_by_peft, names_in_base, refused_by_peft
from lorakit.adapters.peft.write import save_adapter
from lorakit.cli.main import run
from lorakit.errors import AdapterError
from lorakit.injection import inject
from lorakit.layers import adapted_modules, adapter_layers
from lorakit.methods.adalora import AdaLoraConfig
from lorakit.methods.intrinsic import IntrinsicConfig
from lorakit.methods.lora import LoraConfig
from tests.families import tiny, token_ids
from tests.hybrids import hybrid, saved_hybrid
from tests.training.runs import write_recipe_file

pytestmark = pytest.mark.filterwarnings("ignore")
#: Family -> how the language model's layers are named in the base's own class.
TEXT_PARTS = {
    "qwen3_5": "model.language_model.layers.",
    "llama4": "language_model.model.layers.",
    "mllama": "model.language_model.layers.",
}


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model(input_ids=token_ids(), use_cache=False).logits.float()
    return out


def language_logits(model: Any) -> torch.Tensor:
    """Return the logits of the multimodal model (Llama 4's own forward requires an image)."""
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    return logits(inner.language_model if hasattr(inner, "language_model") else model)


def adapted(base: Path, config: Any) -> Any:
    """Return the text part with a random adapter."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    inject(model, config)
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.3)
    return model.eval()


def save(model: Any, config: Any, base: Path, folder: Path, named: bool = True) -> Path:
    names = names_in_base(model, AutoConfig.from_pretrained(base)) if named else None
    return save_adapter(
        folder, model, config, base_model_name_or_path=str(base), task_type="CAUSAL_LM", names=names
    )


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3.5": ("qwen3_5", {"target_modules": ["all-linear"]}),
    "qwen3.5 roles": ("qwen3_5", {"target_modules": ["q", "v"]}),
    "qwen3.5 ranks": (
        "qwen3_5",
        {
            "target_modules": ["attention"],
            "rank_pattern": {"o_proj": 3, "1.linear_attn.out_proj": 5},
            "alpha_pattern": {"k_proj": 5},
        },
    ),
    "qwen3.5 embeddings and head": (
        "qwen3_5",
        {"target_modules": ["v", "embed_tokens"], "modules_to_save": ["lm_head"]},
    ),
    "llama4": ("llama4", {"target_modules": ["all-linear"]}),
    "llama4 head": ("llama4", {"target_modules": ["q"], "modules_to_save": ["lm_head"]}),
    "mllama": ("mllama", {"target_modules": ["q", "v"], "layers": [0]}),
}


@pytest.mark.parametrize("case", CASES)
def test_names_fit_the_class_of_the_base(case: str, tmp_path: Path) -> None:
    family, keys = CASES[case]
    base = tmp_path / "base"
    hybrid(family).save_pretrained(base)
    config = LoraConfig(r=2, **keys)
    model = adapted(base, config)
    want = logits(model)
    adapter = save(model, config, base, tmp_path / "adapter")

    own = type(hybrid(family)).from_pretrained(base, dtype=torch.float32).eval()
    before = language_logits(own)
    theirs = PeftModel.from_pretrained(own, str(adapter)).eval()
    assert (want - before).abs().max() > 1e-3, "the adapter does something"
    torch.testing.assert_close(language_logits(theirs), want, atol=1e-5, rtol=0)
    tuned = {n for n, m in theirs.base_model.model.named_modules() if hasattr(m, "lora_A")}
    assert len(tuned) == len(adapted_modules(model))
    assert all(TEXT_PARTS[family] in n for n in tuned if ".layers." in n)
    assert type(own).__name__ in (adapter / "README.md").read_text()

    loaded = lorakit.load(base, adapter)
    torch.testing.assert_close(logits(loaded), want, atol=0, rtol=0)
    scales = {n: (x.r, x.scaling) for n, x in adapter_layers(model).items()}
    assert {n: (x.r, x.scaling) for n, x in adapter_layers(loaded).items()} == scales


@pytest.mark.parametrize("family", TEXT_PARTS)
def test_adapters_with_the_text_parts_names_still_load(family: str, tmp_path: Path) -> None:
    base = tmp_path / "base"
    hybrid(family).save_pretrained(base)
    config = LoraConfig(r=2, target_modules=["q", "v"], layers=None if family != "mllama" else [0])
    model = adapted(base, config)
    adapter = save(model, config, base, tmp_path / "adapter", named=False)
    torch.testing.assert_close(logits(lorakit.load(base, adapter)), logits(model))
    own = type(hybrid(family)).from_pretrained(base, dtype=torch.float32).eval()
    load_adapter(own, adapter)
    torch.testing.assert_close(language_logits(own), logits(model), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "config",
    [
        AdaLoraConfig(init_r=3, target_r=2, target_modules=["attention"]),
        IntrinsicConfig(d=8, target_modules=["attention"]),
        LoraConfig(r=2, use_rslora=True, target_modules=["re:.*layers.3.*"]),
    ],
    ids=["adalora", "intrinsic", "regex"],
)
def test_other_forms_are_read_again(config: Any, tmp_path: Path) -> None:
    base = tmp_path / "base"
    hybrid("qwen3_5").save_pretrained(base)
    model = adapted(base, config)
    adapter = save(model, config, base, tmp_path / "adapter")
    torch.testing.assert_close(
        logits(lorakit.load(base, adapter)), logits(model), atol=1e-6, rtol=0
    )


def test_an_adapter_that_peft_trained_on_the_base_s_class_loads(tmp_path: Path) -> None:
    from peft import LoraConfig as PeftLora
    from peft import get_peft_model

    base = tmp_path / "base"
    hybrid("qwen3_5").save_pretrained(base)
    targets = r"model\.language_model.*\.(q_proj|in_proj_qkv)"
    theirs = get_peft_model(
        type(hybrid("qwen3_5")).from_pretrained(base),
        PeftLora(r=2, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM"),
    ).eval()
    theirs.save_pretrained(tmp_path / "adapter")
    loaded = lorakit.load(base, tmp_path / "adapter")
    torch.testing.assert_close(logits(loaded), logits(theirs), atol=1e-5, rtol=0)


def test_an_adapter_of_the_vision_tower_is_refused(tmp_path: Path) -> None:
    base = tmp_path / "base"
    hybrid("llama4").save_pretrained(base)
    config = LoraConfig(r=2, target_modules=["q"], layers=[0])
    adapter = save(adapted(base, config), config, base, tmp_path / "adapter")
    file = adapter / "adapter_model.safetensors"
    moved = {
        k.replace("language_model.model", "vision_model.model"): v
        for k, v in load_file(file).items()
    }
    save_file(moved, file, metadata={"format": "pt"})
    with pytest.raises(AdapterError, match=r"the model has no module for vision_model\.model"):
        lorakit.load(base, adapter)


def test_a_base_whose_class_was_trained_keeps_its_names(tmp_path: Path) -> None:
    for family in ("gemma3", "qwen3_next"):
        hybrid(family).save_pretrained(tmp_path / family)
        model = AutoModelForCausalLM.from_pretrained(tmp_path / family)
        assert names_in_base(model, AutoConfig.from_pretrained(tmp_path / family)) is None


def test_only_the_language_model_is_adapted_in_peft_too(tmp_path: Path) -> None:
    """target_modules must not match the vision tower's projections."""
    base = tmp_path / "base"
    hybrid("gemma3").save_pretrained(base)
    config = LoraConfig(r=2, target_modules=["attention"])
    model = adapted(base, config)
    adapter = save(model, config, base, tmp_path / "adapter")
    theirs = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base), str(adapter)
    ).eval()
    tuned = {n for n, m in theirs.base_model.model.named_modules() if hasattr(m, "lora_A")}
    assert tuned == set(adapter_layers(model))
    torch.testing.assert_close(logits(theirs), logits(model), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("family", "targets", "wrong"),
    [
        ("qwen3_next", ["all-linear"], ["down_proj", "gate_proj", "up_proj"]),
        ("deepseek_v3", ["down_proj"], ["down_proj"]),
        ("qwen3_next", ["attention"], []),
        ("mixtral", ["all-linear"], []),
        ("llama4_text", ["all-linear"], []),
    ],
)
def test_modules_that_peft_misreads_are_detected(
    family: str, targets: list[str], wrong: list[str], tmp_path: Path
) -> None:
    base = tmp_path / "base"
    hybrid(family).save_pretrained(base)
    config = LoraConfig(r=2, target_modules=targets)
    model = adapted(base, config)
    assert misread_by_peft(model, adapter_layers(model)) == wrong
    adapter = save(model, config, base, tmp_path / "adapter")
    bare = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    try:
        distance = (
            (logits(PeftModel.from_pretrained(bare, str(adapter)).eval()) - logits(model))
            .abs()
            .max()
        )
    except Exception:
        assert wrong
        return
    assert bool(distance > 1e-4) == bool(wrong)
    assert ("PEFT 0.19 to 0.21" in (adapter / "README.md").read_text()) == bool(wrong)


def test_a_converted_adapter_keeps_the_notes_on_peft(tmp_path: Path) -> None:
    base = tmp_path / "base"
    for family, said in (("qwen3_next", "takes down_proj"), ("qwen3_5", "Qwen3_5ForConditional")):
        hybrid(family).save_pretrained(base / family)
        config = AdaLoraConfig(init_r=3, target_r=2, target_modules=["down_proj"])
        model = adapted(base / family, config)
        adapter = save(model, config, base / family, tmp_path / family / "adapter")
        out, notes = tmp_path / family / "lora", []
        lorakit.convert(adapter, out, "lora", say=notes.append)
        assert said in (out / "README.md").read_text()
        assert any(said in note for note in notes) == (family == "qwen3_next")
        torch.testing.assert_close(
            logits(lorakit.load(base / family, out)), logits(model), atol=1e-5, rtol=0
        )


@pytest.mark.parametrize("family", ["mamba", "falcon_h1"])
@pytest.mark.parametrize("targets", [["out_proj"], ["in_proj"]])
def test_modules_that_peft_refuses_are_detected(
    family: str, targets: list[str], tmp_path: Path
) -> None:
    base = tmp_path / "base"
    hybrid(family).save_pretrained(base)
    config = LoraConfig(r=2, target_modules=targets)
    model = adapted(base, config)
    adapter = save(model, config, base, tmp_path / "adapter")
    wrong = [name for name in targets if name == "out_proj"]
    assert refused_by_peft(model, adapter_layers(model)) == wrong
    info = json.loads((adapter / "lorakit.json").read_text())
    assert info.get("refused_by_peft", []) == wrong
    assert ("do not load an adapter of out_proj" in (adapter / "README.md").read_text()) == bool(
        wrong
    )
    bare = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    if wrong:
        with pytest.raises(ValueError, match="incompatible with Mamba"):
            PeftModel.from_pretrained(bare, str(adapter))
    else:
        PeftModel.from_pretrained(bare, str(adapter))
    torch.testing.assert_close(
        logits(lorakit.load(base, adapter)), logits(model), atol=1e-5, rtol=0
    )


def test_dense_models_are_not_misread() -> None:
    assert misread_by_peft(tiny("llama"), ["model.layers.0.mlp.down_proj"]) == []
    assert misread_by_peft(nn.Linear(2, 2), ["gate"]) == []


# Keys of adapter_config.json

#: What LoraConfig of PEFT 0.13.2 takes.
PEFT_0_13 = {
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "fan_in_fan_out",
    "inference_mode", "init_lora_weights", "layer_replication", "layers_pattern",
    "layers_to_transform", "loftq_config", "lora_alpha", "lora_dropout", "megatron_config",
    "megatron_core", "modules_to_save", "peft_type", "r", "rank_pattern", "revision",
    "target_modules", "task_type", "use_dora", "use_rslora",
}  # fmt: skip


@pytest.mark.parametrize(
    ("family", "keys", "more"),
    [
        ("llama", {}, set()),
        ("llama", {"use_rslora": True, "lora_dropout": 0.1}, {"use_rslora", "lora_dropout"}),
        ("llama", {"rank_pattern": {"v_proj": 2}}, {"rank_pattern"}),
        ("llama", {"modules_to_save": ["lm_head"]}, {"modules_to_save"}),
        ("gpt2", {"target_modules": ["c_attn"]}, {"fan_in_fan_out"}),
    ],
)
def test_keys_at_their_defaults_are_left_out(
    family: str, keys: dict[str, Any], more: set[str], tmp_path: Path
) -> None:
    from peft import LoraConfig as PeftLora

    model, config = tiny(family), LoraConfig(**{"r": 4, "target_modules": ["q", "v"], **keys})
    inject(model, config)
    save_adapter(tmp_path / "a", model, config, base_model_name_or_path="b", task_type="CAUSAL_LM")
    settings = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    always = {
        "peft_type",
        "task_type",
        "base_model_name_or_path",
        "r",
        "lora_alpha",
        "target_modules",
    }
    assert set(settings) == always | {"inference_mode"} | more
    assert set(settings) <= PEFT_0_13
    defaults = PeftLora().to_dict()
    assert [k for k in settings if k not in always and settings[k] == defaults[k]] == []


def test_misread_and_renamed_modules_are_reported(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = {"train__epochs": None, "train__max_steps": 1, "task__limit_eval": 2}
    for family, said in (
        (
            "qwen3_5",
            "module names are those of the base's original class, Qwen3_5ForConditionalGeneration",
        ),
        ("qwen3_next", "mistakes down_proj, gate_proj, up_proj for experts"),
        ("falcon_h1", "PEFT 0.16 and later do not load an adapter of out_proj"),
    ):
        model = saved_hybrid(family, tiny_llama, tmp_path / family)
        recipe = write_recipe_file(
            tmp_path / f"{family}-run",
            model,
            "completion",
            adapter__target_modules=["all-linear"],
            **few,
        )
        capsys.readouterr()
        assert run(["train", str(recipe)]) == 0
        assert said in capsys.readouterr().err
        assert run(["eval", str(recipe), "--limit", "2"]) == 0
