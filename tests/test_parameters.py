"""Adapters on single parameters: which are found, which are refused, and what a pass computes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError

from lorakit.errors import TargetError
from lorakit.injection import inject
from lorakit.layers import adapter_layers
from lorakit.methods.dora import DoraConfig
from lorakit.methods.full import FullConfig
from lorakit.methods.lora import LoraConfig
from lorakit.methods.moslora import MosLoraConfig
from lorakit.parameters import replaced_modules
from lorakit.recipe.sections import AdapterSection
from tests.families import tiny, token_ids
from tests.hybrids import hybrid

GATE_UP = "mlp.experts.gate_up_proj"


@pytest.mark.parametrize(
    ("family", "want"),
    [
        ("qwen3_moe", {f"model.layers.{i}.mlp.experts.{n}" for i in (0, 1) for n in ("gate_up_proj", "down_proj")}),
        ("jetmoe", {f"model.layers.{i}.mlp.{n}_linear.weight" for i in (0, 1) for n in ("input", "output")}),
    ],
)  # fmt: skip
def test_experts_are_all_expert_weights(family: str, want: set[str]) -> None:
    model = hybrid(family)
    before = model(token_ids()).logits
    report = inject(model, LoraConfig(target_modules=["experts"]))
    assert {module.name for module in report.adapted_modules} == want
    assert report.coverage is not None
    part = report.coverage.parts["expert"]
    assert part.covered == part.total
    torch.testing.assert_close(model(token_ids()).logits, before, atol=0, rtol=0)


def test_target_parameters_replace_the_default_target_modules() -> None:
    config = LoraConfig(target_parameters=[GATE_UP], layers=[1])
    assert config.target_modules == []
    report = inject(hybrid("mixtral"), config)
    assert [module.name for module in report.adapted_modules] == [f"model.layers.1.{GATE_UP}"]
    assert "'experts' or adapter.target_parameters" not in str(report)
    assert LoraConfig(target_parameters=GATE_UP, target_modules=["q"]).target_modules == ["q"]
    with pytest.raises(ValidationError, match="must not be empty"):
        LoraConfig(target_modules=[])
    with pytest.raises(ValidationError, match="1 validation error"):
        LoraConfig(target_parameters=[""])


def test_the_delta_is_scaling_b_a_of_each_expert() -> None:
    model = hybrid("gpt_oss")  # stores the transposed matrices
    inject(model, LoraConfig(r=2, lora_alpha=6, target_parameters=[GATE_UP]))
    layer = adapter_layers(model)[f"model.layers.0.{GATE_UP}"]
    torch.nn.init.normal_(layer.lora_B)
    want = 3 * torch.einsum("eor,eri->eoi", layer.lora_B, layer.lora_A)
    torch.testing.assert_close(layer.delta_weight(), want)
    base = replaced_modules(model)["model.layers.0.mlp.experts"].base_layer
    assert base.gate_up_proj.shape == want.mT.shape
    torch.testing.assert_close(layer.fold(base.gate_up_proj), base.gate_up_proj + want.mT)
    assert not base.gate_up_proj.requires_grad


REFUSED: dict[str, tuple[str, AdapterSection, str]] = {
    "dropout": ("mixtral", LoraConfig(target_modules=["experts"], lora_dropout=0.1),
                r"adapter\.lora_dropout = 0\.1: not supported for parameters .*allowed: 0"),
    "init": ("mixtral", LoraConfig(target_modules=["experts"], init="pissa"),
             r"adapter\.init = 'pissa': not supported for parameters .*allowed: default, b_gaussian"),
    "dora": ("mixtral", DoraConfig(target_modules=["experts"]),
             r"adapter\.target_modules: dora does not adapt model\.layers.*experts.*; allowed: conv1d"),
    "moslora": ("mixtral", MosLoraConfig(target_parameters=[GATE_UP]),
                r"target_parameters = .*: not supported by moslora; allowed: adalora, lora, lora_plus$"),
    "full": ("mixtral", FullConfig(target_parameters=[GATE_UP]),
             r"adapter\.target_parameters = .*: not supported by full; allowed: adalora, lora, lora_plus"),
    "nothing": ("mixtral", LoraConfig(target_parameters=["experts.w1"]),
                r"'experts\.w1' matches no parameter; allowed: mlp\.experts\.down_proj, mlp"),
    "no experts": ("llama", LoraConfig(target_parameters=["w"]), "'w' matches no parameter"),
    "a linear layer": ("llama", LoraConfig(target_parameters=["mlp.up_proj.weight"]),
                       r"belongs to a Linear; hint: target_modules: \[up_proj\]"),
    "a vector": ("llama", LoraConfig(target_parameters=["norm.weight"]),
                 r"model\.norm\.weight is not a matrix or a stack of matrices, but \(16,\)"),
    "a convolution": ("qwen3_next", LoraConfig(target_parameters=["conv1d.weight"]),
                      "is not a matrix or a stack of matrices"),
    "both": ("mixtral", LoraConfig(target_modules=["experts"], modules_to_save=["0.mlp"]),
             "both a target and fully trained"),
}  # fmt: skip


@pytest.mark.parametrize(("family", "config", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_adapted_is_refused(
    family: str, config: AdapterSection, message: str
) -> None:
    model: Any = tiny(family) if family == "llama" else hybrid(family)
    with pytest.raises(TargetError, match=message):
        inject(model, config)


def test_no_adapter_on_weights_in_8_bits() -> None:
    model = hybrid("mixtral")
    experts = model.get_submodule("model.layers.0.mlp.experts")
    quantized = experts.gate_up_proj.to(torch.float8_e4m3fn)
    experts.gate_up_proj = torch.nn.Parameter(quantized, requires_grad=False)
    with pytest.raises(TargetError, match="is stored as float8_e4m3fn; allowed: float32, bfloat16"):
        inject(model, LoraConfig(target_modules=["experts"]))
