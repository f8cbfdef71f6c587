"""DoRA in lorakit and PEFT: the same training, and each reads the other's adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig as PeftLora
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn

from lorakit.adapters.peft.place import load_adapter
from lorakit.adapters.peft.write import save_adapter
from lorakit.injection import inject, trainable_state
from lorakit.methods.dora import DoraConfig
from tests.families import logits, randomized, tiny, token_ids

pytestmark = pytest.mark.filterwarnings("ignore")


def task_of(family: str) -> Any:
    return "SEQ_CLS" if family == "bert" else "CAUSAL_LM"


OURS: dict[str, tuple[str, dict[str, Any]]] = {
    "roles": ("llama", {}),
    "ranks": (
        "llama",
        {"rank_pattern": {"0.self_attn.q_proj": 2}, "alpha_pattern": {"v_proj": 3}, "use_rslora": True},
    ),
    "all": ("llama", {"target_modules": ["all-linear"]}),
    "Conv1D": ("gpt2", {"target_modules": ["c_attn", "c_proj"]}),
    "embeddings": ("gpt2", {"target_modules": ["wte", "wpe"]}),
    "scaled embeddings": ("gemma3", {"target_modules": ["embed_tokens", "v"]}),
    "parts": ("gpt2", {"target_modules": ["q", "v"]}),
    "parts that interleave": ("gpt_neox", {"target_modules": ["k", "v"]}),
    "pissa": ("llama", {"init": "pissa"}),
    "orthogonal": ("llama", {"init": "orthogonal"}),
    "a classifier with biases": ("bert", {"bias": "lora_only"}),
}  # fmt: skip


@pytest.mark.parametrize("case", OURS)
def test_peft_reads_ours(case: str, tmp_path: Path) -> None:
    family, keys = OURS[case]
    model, config = tiny(family), DoraConfig(**{"r": 4, "target_modules": ["q", "v"], **keys})
    inject(model, config)
    ours, before = logits(randomized(model)), logits(tiny(family))
    save_adapter(
        tmp_path / "a", model, config, base_model_name_or_path="b", task_type=task_of(family)
    )
    theirs = PeftModel.from_pretrained(tiny(family), str(tmp_path / "a")).eval()
    assert (ours - before).abs().max() > 1e-3, "the adapter does something"
    torch.testing.assert_close(logits(theirs), ours, atol=1e-5, rtol=0)
    again = tiny(family)
    assert load_adapter(again, tmp_path / "a").method == "dora"
    torch.testing.assert_close(logits(again), ours, atol=1e-6, rtol=0)


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox"])
def test_rows_outside_of_the_parts_do_not_change_in_peft(family: str, tmp_path: Path) -> None:
    model, config = tiny(family), DoraConfig(r=2, target_modules=["q", "v"])
    inject(model, config)
    randomized(model)
    save_adapter(tmp_path / "a", model, config, base_model_name_or_path="b", task_type="CAUSAL_LM")
    theirs = PeftModel.from_pretrained(tiny(family), str(tmp_path / "a")).merge_and_unload()
    changed = {n: (p, theirs.get_parameter(n)) for n, p in tiny(family).named_parameters()}
    seen = 0
    for name, (old, new) in changed.items():
        if "c_attn.weight" in name or "query_key_value.weight" in name:
            old, new = (t.t() if family == "gpt2" else t for t in (old, new))
            heads = 1 if family == "gpt2" else 4
            old, new = (t.detach().view(heads, 3, 16 // heads, -1) for t in (old, new))
            torch.testing.assert_close(new[:, 1], old[:, 1], atol=1e-7, rtol=0)
            assert (new[:, [0, 2]] - old[:, [0, 2]]).abs().amax(dim=(2, 3)).min() > 1e-3
            seen += 1
    assert seen == 2


THEIRS: dict[str, tuple[str, dict[str, Any]]] = {
    "suffixes": ("llama", {"target_modules": ["q_proj", "v_proj"]}),
    "ranks": (
        "llama",
        {"target_modules": "all-linear", "rank_pattern": {"q_proj": 2}, "use_rslora": True},
    ),
    "Conv1D": ("gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True}),
    "embedding": ("llama", {"target_modules": ["embed_tokens", "q_proj"]}),
    "classifier": ("bert", {"target_modules": ["query", "value"], "bias": "lora_only"}),
}


@pytest.mark.parametrize("case", THEIRS)
def test_we_read_and_write_what_peft_does(case: str, tmp_path: Path) -> None:
    family, keys = THEIRS[case]
    adapter = PeftLora(r=4, lora_alpha=6, use_dora=True, task_type=task_of(family), **keys)
    theirs = randomized(get_peft_model(tiny(family), adapter))
    theirs.save_pretrained(tmp_path / "theirs")
    ours = tiny(family)
    assert load_adapter(ours, tmp_path / "theirs").method == "dora"
    torch.testing.assert_close(logits(ours), logits(theirs), atol=1e-5, rtol=0)
    assert (logits(theirs) - logits(tiny(family))).abs().max() > 1e-3
    config = DoraConfig(r=4, lora_alpha=6, bias=keys.get("bias", "none"))
    config = config.model_copy(update={"use_rslora": keys.get("use_rslora", False)})
    save_adapter(
        tmp_path / "ours", ours, config, base_model_name_or_path="b", task_type=task_of(family),
        modules_to_save=["classifier"] if family == "bert" else [],
    )  # fmt: skip
    written = {
        who: load_file(tmp_path / who / "adapter_model.safetensors") for who in ("ours", "theirs")
    }
    for name, value in written["ours"].items():
        torch.testing.assert_close(value, written["theirs"][name], atol=0, rtol=0)
    # PEFT adds the frozen weight of an adapted embedding; a bias is written where it trains.
    frozen = {name for name in written["theirs"] if ".base_layer." in name or "bias" in name}
    assert set(written["theirs"]) - frozen == set(written["ours"]) - frozen


def pair(family: str, config: DoraConfig, folder: Path) -> tuple[nn.Module, nn.Module]:
    """Return a model with lorakit's layer and one with PEFT's, with the same adapter, both further
    trained."""
    model = tiny(family, num_hidden_layers=1)
    torch.manual_seed(0)
    inject(model, config)
    save_adapter(folder, model, config, base_model_name_or_path="b", task_type=task_of(family))
    theirs = PeftModel.from_pretrained(
        tiny(family, num_hidden_layers=1), str(folder), is_trainable=True
    )
    return model.train(), theirs.train()


def by_our_names(model: nn.Module) -> dict[str, nn.Parameter]:
    named = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            name = name.removeprefix("base_model.model.").replace(".modules_to_save.default", "")
            name = name.replace("lora_magnitude_vector.default.weight", "lora_magnitude_vector")
            for factor in "AB":
                name = name.replace(f"lora_{factor}.default.weight", f"lora_{factor}")
                name = name.replace(f"lora_embedding_{factor}.default", f"lora_{factor}")
            named[name] = parameter
    return named


def loss_of(model: nn.Module, step: int) -> torch.Tensor:
    torch.manual_seed(step)  # the same masks of dropout
    out: torch.Tensor = model(input_ids=token_ids(2, 7, seed=step)).logits
    return torch.nn.functional.cross_entropy(
        out.reshape(-1, out.shape[-1]), torch.arange(out[..., 0].numel()) % out.shape[-1]
    )


TRAINED = [
    ("llama", {"target_modules": ["q", "v"]}),
    ("llama", {"target_modules": ["all-linear", "embed_tokens"]}),
    ("gpt2", {"target_modules": ["c_attn"], "lora_dropout": 0.2}),
    ("bert", {"target_modules": ["q", "v"]}),
]


@pytest.mark.parametrize(("family", "keys"), TRAINED, ids=str)
def test_50_steps_of_adamw(family: str, keys: dict[str, Any], tmp_path: Path) -> None:
    ours, theirs = pair(family, DoraConfig(r=4, **keys), tmp_path / "a")
    mine, other = trainable_state(ours), by_our_names(theirs)
    assert set(mine) == set(other)
    optimizers = [torch.optim.AdamW(list(p.values()), lr=1e-3) for p in (mine, other)]
    start = {name: value.detach().clone() for name, value in mine.items()}
    for step in range(50):
        losses = []
        for model, optimizer in zip((ours, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            losses.append(loss_of(model, step))
            losses[-1].backward()
            optimizer.step()
        torch.testing.assert_close(*losses, atol=1e-5, rtol=0)
    for name, value in mine.items():
        torch.testing.assert_close(value, other[name], atol=1e-5, rtol=0)
    assert all((mine[n] - start[n]).abs().max() > 1e-3 for n in mine), "all of it was trained"
