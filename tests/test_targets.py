"""Roles, suffixes and patterns select exactly the matrices that they name in every model family."""

from __future__ import annotations

import pytest
from torch import nn

from lorakit.base_weight import ADAPTABLE
from lorakit.errors import TargetError
from lorakit.injection import find_heads, inject
from lorakit.layers import adapter_layers
from lorakit.methods.lora import LoraConfig
from lorakit.module_names import describe_modules
from lorakit.targets import find_targets
from tests.families import ALL, ENCODERS, tiny
from tests.hybrids import hybrid

_LLAMA = {role: "model.layers.{}.self_attn." + f"{role}_proj" for role in "qkvo"}
_OPT = {role: "model.decoder.layers.{}.self_attn." + f"{role}_proj" for role in "qkv"} | {
    "o": "model.decoder.layers.{}.self_attn.out_proj"
}


def _bert(prefix: str) -> dict[str, str]:
    stem = f"{prefix}.encoder.layer.{{}}.attention"
    names = {"q": "query", "k": "key", "v": "value"}
    return {role: f"{stem}.self.{name}" for role, name in names.items()} | {
        "o": f"{stem}.output.dense"
    }


#: Family -> role -> module of layer {}, read from the families' sources.
ROLES = {
    **dict.fromkeys(("llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3"), _LLAMA),
    "phi": _LLAMA | {"o": "model.layers.{}.self_attn.dense"},
    "opt": _OPT,
    "bert": _bert("bert"),
    "roberta": _bert("roberta"),
    "electra": _bert("electra"),
    "deberta_v2": {
        **{
            role: f"deberta.encoder.layer.{{}}.attention.self.{name}_proj"
            for role, name in {"q": "query", "k": "key", "v": "value"}.items()
        },
        "o": "deberta.encoder.layer.{}.attention.output.dense",
    },
    "distilbert": {
        **{role: f"distilbert.transformer.layer.{{}}.attention.{role}_lin" for role in "qkv"},
        "o": "distilbert.transformer.layer.{}.attention.out_lin",
    },
    "albert": {
        role: f"albert.encoder.albert_layer_groups.0.albert_layers.0.attention.{name}"
        for role, name in {"q": "query", "k": "key", "v": "value", "o": "dense"}.items()
    },
    "t5_encoder": {role: f"encoder.block.{{}}.layer.0.SelfAttention.{role}" for role in "qkvo"},
}
#: Families whose q, k and v are one matrix -> that matrix, and o.
FUSED = {
    "gpt2": ("transformer.h.{}.attn.c_attn", "transformer.h.{}.attn.c_proj"),
    "gpt_neox": (
        "gpt_neox.layers.{}.attention.query_key_value",
        "gpt_neox.layers.{}.attention.dense",
    ),
    "bloom": (
        "transformer.h.{}.self_attention.query_key_value",
        "transformer.h.{}.self_attention.dense",
    ),
    "phi3": ("model.layers.{}.self_attn.qkv_proj", "model.layers.{}.self_attn.o_proj"),
    "modernbert": ("model.layers.{}.attn.Wqkv", "model.layers.{}.attn.Wo"),
}


#: What attention has besides q, k, v and o.
MORE = {
    "deberta_v2": [
        f"deberta.encoder.layer.{{}}.attention.self.pos_{n}_proj" for n in ("key", "query")
    ]
}


def _both_layers(name: str) -> set[str]:
    return {name.format(layer) for layer in (0, 1)}


def test_every_family_is_covered() -> None:
    assert set(ROLES) | set(FUSED) == set(ALL)


@pytest.mark.parametrize("family", ROLES)
def test_a_role_is_exactly_its_matrices(family: str) -> None:
    model = tiny(family)
    for role, name in ROLES[family].items():
        assert set(find_targets(model, [role])) == _both_layers(name), role


@pytest.mark.parametrize("family", FUSED)
def test_a_role_inside_a_fused_matrix_is_its_rows(family: str) -> None:
    fused, o = FUSED[family]
    model = tiny(family)
    for role in "qkv":
        found = find_targets(model, [role])
        assert set(found) == _both_layers(f"{fused}.{role}")
        assert all(target.rows is not None for target in found.values())
    both = find_targets(model, ["v", "q"])
    assert [name.rpartition(".")[2] for name in both] == ["q", "v"] * 2
    assert set(find_targets(model, ["o"])) == _both_layers(o)
    assert set(find_targets(model, [fused.rpartition(".")[2]])) == _both_layers(fused)


@pytest.mark.parametrize("family", ALL)
def test_attention_is_all_of_it_and_nothing_else(family: str) -> None:
    names = [*(ROLES[family].values() if family in ROLES else FUSED[family]), *MORE.get(family, [])]
    want = set().union(*map(_both_layers, names))
    assert set(find_targets(tiny(family), ["attention"])) == want


@pytest.mark.parametrize("family", [family for family in ALL if family != "t5_encoder"])
def test_all_linear_takes_every_linear_but_output_and_head(family: str) -> None:
    model = tiny(family)
    kinds = tuple({*ADAPTABLE} - {nn.Embedding})
    heads = tuple(f"{name}." for name in ["lm_head", *find_heads(model)])
    linear = {n for n, m in model.named_modules() if isinstance(m, kinds)}
    want = {name for name in linear if not f"{name}.".startswith(heads)}
    inject(model, LoraConfig(target_modules=["all-linear"]))
    assert set(adapter_layers(model)) == want
    assert linear - want, "the family has an output layer or a head to leave alone"


@pytest.mark.parametrize("family", ENCODERS)
@pytest.mark.parametrize("target", ["all-linear", "o", "attention"])
def test_no_role_catches_a_head(family: str, target: str) -> None:
    model = tiny(family)
    heads = find_heads(model)
    report = inject(model, LoraConfig(target_modules=[target]))
    assert heads
    assert set(report.modules_to_save) == set(heads)
    assert not [m.name for m in report.adapted_modules if m.name.startswith(tuple(heads))]


def test_a_head_that_is_named_as_a_target_is_an_error() -> None:
    with pytest.raises(TargetError, match="both a target and fully trained"):
        inject(tiny("bert"), LoraConfig(target_modules=["classifier"]))


@pytest.mark.parametrize("targets", [["q_porj"], ["q", "q_porj"], ["re:.*q_porj"]])
def test_what_matches_nothing_is_an_error_that_lists_the_modules(targets: list[str]) -> None:
    with pytest.raises(TargetError) as error:
        find_targets(tiny("llama"), targets)
    text = str(error.value)
    assert "q_porj" in text
    assert "model.layers.{0-1}.self_attn.q_proj" in text
    assert "model.layers.{0-1}.mlp.down_proj" in text


def test_a_near_name_is_proposed() -> None:
    with pytest.raises(TargetError, match="did you mean 'q_proj'"):
        find_targets(tiny("llama"), ["q_prj"])


def test_what_was_asked_for_is_not_proposed() -> None:
    """The model lacks the role, and no other target has a similar name."""
    model = nn.ModuleDict({"in_proj": nn.Linear(2, 2), "dt": nn.Linear(2, 2)})
    for role in ("q", "k", "o", "attention"):
        with pytest.raises(TargetError) as error:
            find_targets(model, [role])
        assert "did you mean" not in str(error.value)


def test_suffixes_and_patterns() -> None:
    model = tiny("llama")
    assert set(find_targets(model, ["mlp.down_proj"])) == _both_layers(
        "model.layers.{}.mlp.down_proj"
    )
    assert set(find_targets(model, ["1.mlp.down_proj"])) == {"model.layers.1.mlp.down_proj"}
    with pytest.raises(TargetError):
        find_targets(model, ["own_proj"])  # a suffix consists of complete parts of the name
    first = find_targets(model, ["all-linear"], [0], ["lm_head"])
    assert set(find_targets(model, [r"re:.*\.0\..*_proj"])) == set(first)
    assert set(find_targets(model, ["embed_tokens"])) == {"model.embed_tokens"}


@pytest.mark.parametrize("layers", [[1], "1", "1-1"])
def test_layers_keep_only_those(layers: list[int] | str) -> None:
    found = find_targets(tiny("llama"), ["q", "v"], layers)
    assert list(found) == ["model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.v_proj"]


def test_a_layer_that_is_not_there_is_an_error() -> None:
    with pytest.raises(TargetError, match="no layer 2, 7 among the targets; allowed: 0 to 1"):
        find_targets(tiny("llama"), ["q"], [1, 2, 7])


def test_what_multihead_attention_reads_past_forward_is_not_adapted() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16)
    assert set(find_targets(layer, ["all-linear"])) == {"linear1", "linear2"}


def test_names_are_described_in_short() -> None:
    names = [f"layers.{i}.q" for i in range(3)] + ["head"]
    assert describe_modules(names) == "layers.{0-2}.q, head"


def test_keys_and_values_of_an_mlp_are_no_attention() -> None:
    model = hybrid("rwkv")
    for role, name in (("k", "key"), ("v", "value")):
        assert set(find_targets(model, [role])) == _both_layers(
            f"rwkv.blocks.{{}}.attention.{name}"
        )
    assert not [name for name in find_targets(model, ["attention"]) if "feed_forward" in name]
    assert len(find_targets(model, ["key"])) == 4


@pytest.mark.parametrize(
    "target",
    [
        "model.language_model.layers.3.self_attn.q_proj",
        "language_model.model.layers.3.self_attn.q_proj",
        r"re:model\.language_model\..*\.q_proj",
    ],
)
def test_names_of_the_base_s_own_class_fit_its_text_part(target: str) -> None:
    found = find_targets(hybrid("qwen3_5_text"), [target])
    assert set(found) == {"model.layers.3.self_attn.q_proj"}
    with pytest.raises(TargetError, match="matches no"):
        find_targets(tiny("llama"), [target.replace("3", "1")])


@pytest.mark.parametrize("target", ["visual", "re:.*visual.*", "vision_tower"])
def test_a_vision_tower_that_is_not_loaded(target: str) -> None:
    with pytest.raises(TargetError, match="only the language model of this multimodal base is"):
        find_targets(hybrid("qwen3_5_text"), [target])


@pytest.mark.parametrize("kind", [nn.Linear, nn.Embedding])
@pytest.mark.parametrize("target", ["all-linear", "q", "proj"])
def test_a_model_that_is_one_layer(kind: type[nn.Module], target: str) -> None:
    with pytest.raises(TargetError, match=f"the model is itself a {kind.__name__}"):
        inject(kind(8, 8), LoraConfig(target_modules=[target]))


@pytest.mark.parametrize("target", ["A_log", "D", "re:.*A_log"])
def test_a_parameter_is_said_to_be_one(target: str) -> None:
    with pytest.raises(TargetError, match=r"are parameters of MambaMixer, not a linear layer"):
        find_targets(hybrid("mamba"), [target])


@pytest.mark.parametrize(
    ("target", "meant"), [("Q_proj", "q_proj"), ("V_PROJ", "v_proj"), ("All-Linear", "all-linear")]
)
def test_a_name_in_other_case_is_proposed(target: str, meant: str) -> None:
    with pytest.raises(TargetError, match=f"did you mean '{meant}'"):
        find_targets(tiny("llama"), [target])
