"""The coverage of targets: which parts of a model they cover, and which weights they miss."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lorakit.anatomy import adaptable_modules, behaves_as_its_class, outside_language_model, weights
from lorakit.coverage import Coverage
from lorakit.errors import TargetError
from lorakit.injection import inject
from lorakit.layers import adapter_layers
from lorakit.methods.full import FullConfig
from lorakit.methods.lora import LoraConfig
from lorakit.module_names import describe_modules
from lorakit.targets import find_targets
from tests.families import ALL, tiny, token_ids
from tests.hybrids import hybrid


def covered(model: nn.Module, *targets: str, **changes: object) -> Coverage:
    config = LoraConfig(r=2, target_modules=list(targets), **changes)  # type: ignore[arg-type]
    coverage = inject(model, config).coverage
    assert coverage is not None
    return coverage


def shares(coverage: Coverage) -> dict[str, float]:
    return {name: round(part.covered / part.total, 3) for name, part in coverage.parts.items()}


EXPERTS = "3-D expert parameters"


def test_all_linear_on_experts_in_one_parameter() -> None:
    model = hybrid("qwen3_moe")
    experts = sum(p.numel() for n, p in model.named_parameters() if ".experts." in n)
    total = sum(p.numel() for p in model.parameters())
    coverage = covered(model, "all-linear")
    assert shares(coverage) == {"attention": 1, "expert": 0}
    first, second = coverage.missed
    assert (first.what, first.parameters, first.share) == (EXPERTS, experts, experts / total)
    assert "model.layers.{0-1}.mlp.experts.gate_up_proj" in first.modules
    assert "target_parameters" in first.reason
    assert (second.what, second.modules) == ("routers", "model.layers.{0-1}.mlp.gate")
    text = str(coverage)
    assert "targets cover 100% of attention, 0% of expert parameters" in text
    assert f"({experts / total:.1%} of all parameters)" in text


def test_attention_on_gated_linear_attention() -> None:
    model = hybrid("qwen3_next")
    names = set(find_targets(model, ["attention"]))
    linear = {
        f"model.layers.{i}.linear_attn.{n}"
        for i in (0, 1, 2)
        for n in ("in_proj_qkvz", "in_proj_ba", "out_proj")
    }
    assert names == linear | {f"model.layers.3.self_attn.{n}_proj" for n in "qkvo"}
    coverage = covered(model, "attention")
    assert shares(coverage)["MLP"] == shares(coverage)["expert"] == 0
    assert shares(coverage)["attention"] > 0.9
    (convolution,) = coverage.missed
    assert convolution.what == "linear attention"
    assert convolution.modules == "model.layers.{0-2}.linear_attn.conv1d"


@pytest.mark.parametrize("targets", [("q", "v"), ("q_proj", "v_proj")])
def test_roles_that_only_some_layers_have(targets: tuple[str, ...]) -> None:
    coverage = covered(hybrid("qwen3_next"), *targets)
    (missed,) = coverage.missed
    assert missed.targets == targets
    assert "model.layers.{0-2}.linear_attn.in_proj_qkvz" in missed.modules
    assert "'attention' selects every kind of attention" in str(missed)
    assert not covered(hybrid("qwen3_next"), "q", "v", layers=[3]).missed
    assert not covered(hybrid("qwen3_next"), "3.self_attn.q_proj").missed
    assert not covered(hybrid("qwen3_next"), r"re:.*\.3\..*\.q_proj").missed
    assert not covered(tiny("llama"), "q", "v").missed


def test_attention_on_latent_attention() -> None:
    model = hybrid("deepseek_v3")
    ends = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
    want = {f"model.layers.{layer}.self_attn.{end}" for layer in (0, 1) for end in ends}
    assert set(find_targets(model, ["attention"])) == want
    with pytest.raises(
        TargetError, match=r"the attention modules are kv_a_proj_with_mqa, .*'attention' selects"
    ):
        find_targets(model, ["q", "v"])
    coverage = covered(model, "attention")
    assert shares(coverage) == {"attention": 1, "MLP": 0, "expert": 0}
    assert not coverage.missed


def test_mlp_names_on_experts() -> None:
    names = ["gate_proj", "up_proj", "down_proj"]
    with pytest.raises(
        TargetError,
        match=r"'gate_proj' names experts, .* 3-D parameters .*\{0-1\}\.mlp\.experts.*target_parameters",
    ):
        inject(hybrid("qwen3_moe"), LoraConfig(target_modules=names))
    model = hybrid("deepseek_v3")  # the first layer and the shared experts are linear layers
    coverage = covered(model, *names)
    assert shares(coverage) == {"attention": 0, "MLP": 1, "expert": 0}
    assert {m.what for m in coverage.missed} == {EXPERTS}
    assert {m.modules for m in coverage.missed} == {
        "model.layers.1.mlp.experts.gate_up_proj",
        "model.layers.1.mlp.experts.down_proj",
    }


@pytest.mark.parametrize(
    ("family", "target", "message"),
    [
        ("qwen3_moe", "gate_up_proj", "names experts.*target_parameters"),
        ("qwen3_moe", "down_proj", "names experts.*target_parameters"),
        ("llama", "experts", "matches no linear or embedding module"),
        ("mixtral", "w1", "names experts.*gate_up_proj"),
        ("gpt_oss", "re:.*experts.*down_proj", "names experts.*target_parameters"),
        ("qwen3_moe", "re:.*experts.0.gate_proj", "names experts.*target_parameters"),
        ("qwen3_moe", "gate", "of class Qwen3MoeTopKRouter, which is not a plain linear layer"),
        ("llama4_text", "router", "of class Llama4Router, which is not a plain linear layer"),
        ("qwen3_next", "conv1d", "of class Conv1d, which is not a plain linear layer"),
        ("gemma3", "re:.*vision_tower.*q_proj", "matches only modules of model.vision_tower"),
        ("qwen3_moe", "nothing", "matches no linear or embedding module"),
    ],
)  # fmt: skip
def test_modules_that_cannot_be_adapted_are_errors_with_a_reason(
    family: str, target: str, message: str
) -> None:
    with pytest.raises(TargetError, match=message):
        inject(
            tiny(family) if family == "llama" else hybrid(family),
            LoraConfig(target_modules=[target]),
        )


def test_a_linear_layer_by_class_but_not_by_behavior_is_left_out() -> None:
    model = hybrid("llama4_text")
    before = model(token_ids()).logits
    report = inject(model, LoraConfig(target_modules=["all-linear"]))
    names = [module.name for module in report.adapted_modules]
    assert not [name for name in names if "router" in name]
    assert len(names) == 2 * (4 + 3)
    torch.testing.assert_close(model(token_ids()).logits, before)
    assert "routers model.layers.{0-1}.feed_forward.router" in str(report)


class Doubled(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


class Pair(nn.Linear):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        return super().forward(x), None


class Asks(nn.Linear):
    def forward(self, x: torch.Tensor, scale: float) -> torch.Tensor:  # type: ignore[override]
        return super().forward(x) * scale


class Plain(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        y = input @ self.weight.T
        return y if self.bias is None else y + self.bias


@pytest.mark.parametrize(
    ("kind", "adapted"), [(Doubled, False), (Pair, False), (Asks, False), (Plain, True)]
)
def test_subclasses_are_judged_by_their_computation(kind: type[nn.Linear], adapted: bool) -> None:
    model = nn.ModuleDict(
        {"layers": nn.ModuleList([nn.ModuleDict({"up": kind(4, 6), "down": nn.Linear(6, 4)})])}
    )
    report = inject(model, LoraConfig(r=2, target_modules=["all-linear"]))
    names = [module.name for module in report.adapted_modules]
    assert names == (["layers.0.up"] if adapted else []) + ["layers.0.down"]
    if not adapted:
        assert "layers.0.up" in str(report)


def test_a_layer_of_a_quantization_package_is_adaptable() -> None:
    kind = type("Linear4bit", (Doubled,), {"__module__": "bitsandbytes.nn.modules"})
    assert behaves_as_its_class(kind(4, 4))


def test_position_embeddings_with_an_offset_are_not_adapted() -> None:
    names = adaptable_modules(tiny("opt"))
    assert "model.decoder.embed_tokens" in names
    assert "model.decoder.embed_positions" not in names
    assert "model.embed_tokens" in adaptable_modules(tiny("gemma3"))


@pytest.mark.parametrize(
    "targets", [["q", "v"], ["attention"], ["all-linear"], ["q_proj"], ["re:.*q_proj"]]
)
def test_only_the_language_model_is_adapted(targets: list[str]) -> None:
    model = hybrid("gemma3")
    tower = sum(
        p.numel() for n, p in model.named_parameters() if "vision_tower" in n or "projector" in n
    )
    total = sum(p.numel() for p in model.parameters())
    report = inject(model, LoraConfig(target_modules=targets))
    assert all(name.startswith("model.language_model.") for name in adapter_layers(model))
    assert report.coverage is not None
    outside = report.coverage.missed[-1]
    assert outside.modules == "model.vision_tower, model.multi_modal_projector"
    assert (outside.parameters, outside.share) == (tower, tower / total)


@pytest.mark.parametrize(
    ("family", "outside"),
    [
        ("qwen3_5", ("model.visual",)),
        ("llama4", ("vision_model", "multi_modal_projector")),
        ("mllama", ("model.vision_model", "model.multi_modal_projector")),
        ("qwen3_next", ()),
    ],
)
def test_modules_that_text_does_not_pass_through(family: str, outside: tuple[str, ...]) -> None:
    assert outside_language_model(hybrid(family)) == outside


@pytest.mark.parametrize("keys", [{}, {"target_modules": ["q_proj"]}])
def test_training_everything_stays_inside_the_language_model(keys: dict[str, list[str]]) -> None:
    model = hybrid("gemma3")
    report = inject(model, FullConfig(**keys))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert all(name.startswith("model.language_model.") for name in trained)
    assert "not adapted: modules outside the language model model.vision_tower" in str(report)
    biases = inject(hybrid("gemma3"), LoraConfig(target_modules=["q"], bias="all"))
    plain = inject(hybrid("gemma3"), LoraConfig(target_modules=["q"]))
    assert biases.trainable_parameters == plain.trainable_parameters


def test_the_head_of_a_multimodal_classifier_is_inside() -> None:
    from transformers import Qwen3_5ForSequenceClassification

    config = hybrid("qwen3_5").config
    config.text_config.pad_token_id = 0
    model = Qwen3_5ForSequenceClassification(config)
    assert outside_language_model(model) == ("model.visual",)
    report = inject(model, LoraConfig(target_modules=["q", "v"]))
    assert report.modules_to_save == ("score",)
    assert {m.name for m in report.adapted_modules} == {
        f"model.language_model.layers.3.self_attn.{role}_proj" for role in "qv"
    }


@pytest.mark.parametrize(
    ("family", "parts"),
    [
        ("mamba", {"state-space"}),
        ("jamba", {"attention", "MLP", "expert", "state-space"}),
        ("falcon_h1", {"attention", "MLP", "state-space"}),
        ("llama4_text", {"attention", "MLP", "expert"}),
        ("mixtral", {"attention", "expert"}),
        ("gpt_oss", {"attention", "expert"}),
        ("falcon", {"attention", "MLP"}),
        ("qwen3_5", {"attention", "MLP"}),
    ],
)
def test_the_parts_of_families(family: str, parts: set[str]) -> None:
    model = hybrid(family)
    coverage = covered(model, "all-linear")
    assert set(coverage.parts) == parts
    missed = sum(m.parameters for m in coverage.missed)
    heads = {"lm_head", "embed_tokens", "embeddings", "word_embeddings"}
    matrices = sum(
        p.numel()
        for n, p in hybrid(family).named_parameters()
        if p.ndim > 1 and not n.endswith("bias") and not heads & set(n.split("."))
    )
    adapted = sum(layer.weight.numel() for layer in adapter_layers(model).values())
    outside = sum(
        p.numel() for n, p in hybrid(family).named_parameters() if ".visual." in n and p.ndim < 2
    )
    assert missed + adapted == matrices + outside


@pytest.mark.parametrize("family", [f for f in ALL if f != "t5_encoder"])
def test_all_linear_covers_plain_families_whole(family: str) -> None:
    coverage = covered(tiny(family), "all-linear")
    assert shares(coverage) == {"attention": 1, "MLP": 1}
    assert not coverage.missed


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "bert"])
def test_the_share_of_one_role(family: str) -> None:
    model = tiny(family)
    q = sum(
        target.module.weight.numel() // (3 if family == "gpt2" else 1)
        if target.rows is None or family == "gpt2"
        else target.rows.of(target.module.weight).numel()
        for target in find_targets(model, ["q"]).values()
    )
    part = covered(model, "q").parts["attention"]
    assert part.covered == q
    assert covered(tiny(family), "attention").parts["attention"].covered == part.total


def test_layers_are_listed_exactly() -> None:
    assert describe_modules([f"layers.{i}.q" for i in (3, 7)]) == "layers.{3,7}.q"
    assert describe_modules([f"layers.{i}.q" for i in (0, 1, 2, 7)]) == "layers.{0-2,7}.q"
    assert describe_modules(["layers.4.q"]) == "layers.4.q"
    experts = [f"layers.{i}.experts.{j}.up" for i in (0, 1) for j in range(4)]
    assert describe_modules(experts) == "layers.{0-1}.experts.{0-3}.up"
    assert describe_modules([*experts, "layers.5.experts.2.up"]) == (
        "layers.{0-1}.experts.{0-1,3}.up, layers.{0-1,5}.experts.2.up"
    )


def test_gated_linear_attention_is_the_same_beside_experts() -> None:
    """Qwen3.5's class with experts is Qwen3_5MoeGatedDeltaNet, which is not a router."""
    dense, mixture = hybrid("qwen3_5_text"), hybrid("qwen3_5_moe_text")
    names = set(find_targets(dense, ["attention"]))
    assert names == set(find_targets(mixture, ["attention"]))
    assert "model.layers.0.linear_attn.in_proj_qkv" in names
    found = [covered(model, "attention") for model in (dense, mixture)]
    assert found[0].parts["attention"] == found[1].parts["attention"]
    assert found[0].missed[0].modules == found[1].missed[0].modules


#: Classes of transformers and of models' own code -> whether they are routers.
ROUTERS = {
    "Qwen3_5MoeGatedDeltaNet": False, "DeepseekV3TopkRouter": True, "MoEGate": True,
    "DeepseekV2MoEGate": True, "HunYuanMoEV1Gate": True, "JetMoeTopKGating": True,
    "DeepseekV32Indexer": True, "KimiLinearForgetGate": False, "GraniteMoeAttention": False,
}  # fmt: skip


@pytest.mark.parametrize(("name", "routes"), ROUTERS.items())
def test_what_is_a_router_by_its_class(name: str, routes: bool) -> None:
    kind = type(name, (nn.Module,), {})
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"block": kind()})])})
    model["layers"][0]["block"].inner = nn.Linear(4, 4)  # type: ignore[index]
    (weight,) = weights(model)
    assert (weight.part == "router") == routes


def test_experts_of_attention_are_attention() -> None:
    coverage = covered(hybrid("jetmoe"), "attention")
    assert shares(coverage)["attention"] < 0.5
    (missed,) = coverage.missed
    assert "self_attention.experts.input_linear" in missed.modules
    assert "target_parameters" in missed.reason


@pytest.mark.parametrize("family", ["xlm", "rwkv"])
def test_attention_and_mlps_in_lists_of_their_own(family: str) -> None:
    assert shares(covered(hybrid(family), "attention")) == {"attention": 1, "MLP": 0}
    assert shares(covered(hybrid(family), "all-linear")) == {"attention": 1, "MLP": 1}


def test_cross_attention_in_a_list_is_attention() -> None:
    attention = type("BltCrossAttention", (nn.Module,), {})()
    attention.q_proj = attention.mix = nn.Linear(4, 4)
    model = nn.ModuleDict({"cross_attn_layers": nn.ModuleList([attention])})
    assert [weight.part for weight in weights(model)] == ["attention"]


def test_a_router_read_past_forward_is_said() -> None:
    coverage = covered(hybrid("longcat_flash"), "all-linear")
    (router,) = [missed for missed in coverage.missed if missed.what == "routers"]
    assert router.modules == "model.layers.{0-1}.mlp.router.classifier"
    assert router.reason == "the model reads their weights without calling them"
